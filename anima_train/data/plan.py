"""The plan: every batch of an epoch, a pure function of (seed, epoch).

A step is made of micro-batches, `gradient_accumulation_steps` for each process. The plan does not know how many
processes there are, only how many micro-batches make a step, so one process with two micro-batches and two processes
with one see the same samples at the same step.

No image is dropped: the last micro-batch of a bucket is as short as the bucket leaves it, and the last step of an
epoch has as many micro-batches as are left.
"""

import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from anima_train.core.random import shuffled
from anima_train.data.buckets import Size
from anima_train.data.sources import Sample

BatchSizes = int | Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Draw:
    """One showing of a sample."""

    sample: int  # index into the samples
    showing: int  # how often the sample was shown before this, since the start of the run: picks the caption variant


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the transformer at once: one size."""

    size: Size
    draws: tuple[Draw, ...]


@dataclass(frozen=True)
class Step:
    """What one optimizer update sees."""

    micro_batches: tuple[MicroBatch, ...]

    @property
    def num_samples(self) -> int:
        """Samples in all micro-batches."""
        return sum(len(micro_batch.draws) for micro_batch in self.micro_batches)

    def share(self, rank: int, world_size: int) -> list[tuple[MicroBatch, bool]]:
        """The micro-batches of one process, and whether each counts.

        Every process gets the same number, so that all meet at every gradient reduction; where they do not divide,
        some process repeats one that does not count. Dealt by descending cost, so that processes meet after similar
        work.
        """
        order = sorted(
            self.micro_batches, key=lambda batch: (-len(batch.draws) * batch.size.num_tokens, batch.draws[0].sample)
        )
        mine = [(micro_batch, True) for micro_batch in order[rank::world_size]]
        each = math.ceil(len(order) / world_size)
        return mine + [(order[-1], False)] * (each - len(mine))


def batch_size_for(sizes: BatchSizes, resolution: int) -> int:
    """The micro-batch size at a resolution: the number itself, or the entry whose resolution is nearest."""
    if isinstance(sizes, int):
        return sizes
    return min(sizes, key=lambda entry: (abs(math.log(entry[0] / resolution)), entry[0]))[1]


@dataclass(frozen=True)
class Plan:
    """All epochs of a run."""

    samples: Sequence[Sample]
    seed: int
    batch_sizes: BatchSizes
    micro_batches_per_step: int

    @cached_property
    def phases(self) -> list[float]:
        """Where each sample stands in its directory's turn-taking, evenly spread over [0, 1)."""
        by_directory: dict[int, list[int]] = defaultdict(list)
        for index, sample in enumerate(self.samples):
            by_directory[sample.directory].append(index)
        phases = [0.0] * len(self.samples)
        for directory, indices in by_directory.items():
            order = shuffled(indices, lambda index: self.samples[index].id, self.seed, "turns", directory)
            for place, index in enumerate(order):
                phases[index] = place / len(order)
        return phases

    def shown_before(self, index: int, epoch: int) -> int:
        """How often a sample is shown in all epochs before this one: `num_repeats` per epoch, fractions by turns."""
        # The small number keeps 3 * 0.1 from falling below the 0.3 that was meant.
        repeats = self.samples[index].rules.num_repeats
        return math.floor(epoch * repeats + self.phases[index] + 1e-9)

    def draws(self, epoch: int) -> dict[tuple[int, Size], list[Draw]]:
        """The showings of an epoch by bucket."""
        buckets: dict[tuple[int, Size], list[Draw]] = defaultdict(list)
        for index, sample in enumerate(self.samples):
            for showing in range(self.shown_before(index, epoch), self.shown_before(index, epoch + 1)):
                buckets[sample.resolution, sample.size].append(Draw(index, showing))
        return buckets

    def epoch(self, epoch: int) -> list[Step]:
        """The steps of an epoch, 0 the first."""

        def name(draw: Draw) -> str:
            return f"{self.samples[draw.sample].id}#{draw.showing}"

        micro_batches = []
        for (resolution, size), draws in sorted(self.draws(epoch).items()):
            order = shuffled(draws, name, self.seed, "order", epoch)
            width = batch_size_for(self.batch_sizes, resolution)
            for start in range(0, len(order), width):
                micro_batches.append(MicroBatch(size, tuple(order[start : start + width])))
        mixed = shuffled(micro_batches, lambda batch: name(batch.draws[0]), self.seed, "batches", epoch)
        width = self.micro_batches_per_step
        return [Step(tuple(mixed[start : start + width])) for start in range(0, len(mixed), width)]

    def steps_in(self, epoch: int) -> int:
        """The number of steps in an epoch, without planning it."""
        micro_batches = sum(
            math.ceil(len(draws) / batch_size_for(self.batch_sizes, resolution))
            for (resolution, _), draws in self.draws(epoch).items()
        )
        return math.ceil(micro_batches / self.micro_batches_per_step)

    def steps_before(self, num_epochs: int) -> list[int]:
        """Steps before each epoch: entry e is the first step of epoch e, the last entry the total."""
        if all(sample.rules.num_repeats == int(sample.rules.num_repeats) for sample in self.samples):
            lengths = [self.steps_in(0)] * num_epochs
        else:
            lengths = [self.steps_in(epoch) for epoch in range(num_epochs)]
        return [0, *accumulate(lengths)]

    def bucket_counts(self) -> Counter[Size]:
        """Samples per size."""
        return Counter(sample.size for sample in self.samples)


@dataclass(frozen=True)
class Timetable:
    """Which epoch each step of a run belongs to."""

    first_steps: Sequence[int]  # of each epoch; the last entry is the step after the last epoch
    num_steps: int  # of the run: all epochs, or max_steps where that is less

    @classmethod
    def of(cls, plan: Plan, epochs: int | None, max_steps: int | None) -> "Timetable":
        """The timetable of a run that ends after `epochs` or `max_steps`, whichever is first; one must be given."""
        if epochs is not None:
            first_steps = plan.steps_before(epochs)
        else:
            assert max_steps is not None
            first_steps = [0]
            while first_steps[-1] < max_steps:
                epoch = len(first_steps) - 1
                first_steps.append(first_steps[-1] + plan.steps_in(epoch))
        total = first_steps[-1]
        return cls(first_steps, total if max_steps is None else min(total, max_steps))

    def place(self, step: int) -> tuple[int, int]:
        """(epoch, index in the epoch) of a step, 0 the first."""
        epoch = bisect_right(self.first_steps, step) - 1
        return epoch, step - self.first_steps[epoch]

    def ends_epoch(self, step: int) -> int | None:
        """The number of epochs that are complete after this step, if it is the last of one."""
        epoch, _ = self.place(step)
        return epoch + 1 if self.first_steps[epoch + 1] == step + 1 else None
