"""The showings of training images whose target is the base's own velocity, so that it is not forgotten."""

import math
from dataclasses import dataclass

from anima_train.core.random import derive, uniform
from anima_train.data.samples import Caption, Sample


@dataclass(frozen=True)
class Preservation:
    """The samples that keep the base: pictures that it has drawn, or a share of the showings of each training image."""

    share: float  # of all samples that are seen
    weight: float = 1.0  # of their loss
    captions: tuple[str, ...] = ()  # that training images get; (): they have none, and pictures are added

    def times(self, sample: Sample, seed: int, number: int) -> int:
        """Return how many of the first showings of a sample keep the base."""
        if sample.role != "train" or not self.captions:
            return number if sample.is_preserved else 0
        return math.floor(number * self.share + uniform(seed, "preservation", sample.id))

    def caption(self, sample: Sample, seed: int, repeat: int) -> Caption | None:
        """Return the caption with which a repeat of a sample, 0 the first, keeps the base; None: it is learned.

        They are spread evenly over the repeats, each image with a phase of its own; their captions are drawn.
        """
        if sample.is_preserved or self.times(sample, seed, repeat + 1) == self.times(sample, seed, repeat):
            return None
        return Caption(self.captions[derive(seed, "preserved caption", sample.id, repeat) % len(self.captions)])
