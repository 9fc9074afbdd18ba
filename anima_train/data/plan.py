"""The plan: every batch of an epoch, a pure function of (seed, epoch).

A step is made of micro-batches, `gradient_accumulation_steps` for each process. The plan does not know how many
processes there are, only how many micro-batches make a step, so one process with two micro-batches and two processes
with one see the same samples at the same step.

No image is dropped: the last micro-batch of a bucket is as short as the bucket leaves it, and the last step of an
epoch has as many micro-batches as are left.
"""

import itertools
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from anima_train.core.errors import ConfigError
from anima_train.core.random import shuffled
from anima_train.data.buckets import Size
from anima_train.data.samples import Sample

BatchSizes = int | Sequence[Sequence[int]]  # one for all resolutions, or (resolution, number)


@dataclass(frozen=True, slots=True)
class SampleRef:
    """A sample of a micro-batch, by its index, and which repeat of it this is."""

    sample: int  # index into the samples
    repeat: int  # 0 the first since the start of the run; picks caption, view, noise and t


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The samples of one forward and backward pass, all of one size."""

    size: Size
    refs: tuple[SampleRef, ...]


@dataclass(frozen=True)
class Step:
    """The micro-batches of one optimizer update, those of all processes."""

    micro_batches: tuple[MicroBatch, ...]

    @property
    def num_samples(self) -> int:
        """The number of samples in all micro-batches."""
        return sum(len(micro_batch.refs) for micro_batch in self.micro_batches)

    def share(self, rank: int, world_size: int) -> list[tuple[MicroBatch, bool]]:
        """Return (micro-batch, is_padding) for each micro-batch of one process.

        Every process gets the same number, because all take part in every gradient reduction. Where the micro-batches
        do not divide evenly, a process repeats the cheapest one as padding, which must not change the loss. They are
        distributed by descending cost, so that processes have similar work between two reductions.
        """
        order = sorted(
            self.micro_batches, key=lambda batch: (-len(batch.refs) * batch.size.num_tokens, batch.refs[0].sample)
        )
        own = [(micro_batch, False) for micro_batch in order[rank::world_size]]
        each = math.ceil(len(order) / world_size)
        return own + [(order[-1], True)] * (each - len(own))


def batch_size_for(sizes: BatchSizes, resolution: int) -> int:
    """Return the micro-batch size at a resolution: the number itself, or that of the nearest resolution listed."""
    return sizes if isinstance(sizes, int) else batch_entry_for(sizes, resolution)[1]


def batch_entry_for(sizes: Sequence[Sequence[int]], resolution: int) -> tuple[int, int]:
    """Return the (resolution, number) among these whose resolution is nearest."""
    nearest = min(sizes, key=lambda entry: (abs(math.log(entry[0] / resolution)), entry[0]))
    return nearest[0], nearest[1]


@dataclass(frozen=True)
class Plan:
    """The plan of all epochs of a run, computed epoch by epoch from the seed."""

    samples: Sequence[Sample]
    seed: int
    batch_sizes: BatchSizes
    micro_batches_per_step: int

    @cached_property
    def repeat_offsets(self) -> list[tuple[int, int, int]]:
        """The (a, b, c) of each sample: all epochs before epoch e together show it (a * e + b) // c times.

        With num_repeats = p / q that is floor(e * p / q + b / c), where the offset b / c spreads the pictures of a
        directory that have this num_repeats evenly over [0, 1), so that every epoch shows the same number of them, give
        or take one; a picture at all of its resolutions. In integers, because a rounding error would show a sample an
        epoch too early or too late.
        """
        groups: dict[tuple[int, Fraction], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for index, sample in enumerate(self.samples):
            groups[sample.directory, sample.repeats][sample.name].append(index)
        offsets = [(0, 0, 1)] * len(self.samples)
        for (directory, repeats), pictures in groups.items():
            order = shuffled(pictures.values(), lambda own: self.samples[own[0]].id, self.seed, "turns", directory)
            p, q = repeats.as_integer_ratio()
            for place, indices in enumerate(order):
                for index in indices:
                    offsets[index] = p * len(order), q * place, q * len(order)
        return offsets

    def shown_before(self, index: int, epoch: int) -> int:
        """Return how often all epochs before this one show a sample: `num_repeats` times each, on average."""
        a, b, c = self.repeat_offsets[index]
        return (a * epoch + b) // c

    def refs_by_bucket(self, epoch: int) -> dict[tuple[int, Size], list[SampleRef]]:
        """Return the samples of an epoch by bucket, (resolution, size), once for each repeat."""
        buckets: dict[tuple[int, Size], list[SampleRef]] = defaultdict(list)
        for index, sample in enumerate(self.samples):
            for repeat in range(self.shown_before(index, epoch), self.shown_before(index, epoch + 1)):
                buckets[sample.resolution, sample.size].append(SampleRef(index, repeat))
        return buckets

    def epoch(self, epoch: int) -> list[Step]:
        """Return the steps of an epoch, 0 the first."""

        def name(ref: SampleRef) -> str:
            return f"{self.samples[ref.sample].id}#{ref.repeat}"

        micro_batches = []
        for (resolution, size), refs in sorted(self.refs_by_bucket(epoch).items()):
            order = shuffled(refs, name, self.seed, "order", epoch)
            width = batch_size_for(self.batch_sizes, resolution)
            for start in range(0, len(order), width):
                micro_batches.append(MicroBatch(size, tuple(order[start : start + width])))
        mixed = shuffled(micro_batches, lambda batch: name(batch.refs[0]), self.seed, "batches", epoch)
        width = self.micro_batches_per_step
        return [Step(tuple(mixed[start : start + width])) for start in range(0, len(mixed), width)]

    def steps_in(self, epoch: int) -> int:
        """Return the number of steps in an epoch, without planning it."""
        micro_batches = sum(
            math.ceil(len(refs) / batch_size_for(self.batch_sizes, resolution))
            for (resolution, _), refs in self.refs_by_bucket(epoch).items()
        )
        return math.ceil(micro_batches / self.micro_batches_per_step)

    @property
    def period(self) -> int:
        """The number of epochs after which the number of steps per epoch repeats."""
        return math.lcm(*{sample.repeats.denominator for sample in self.samples})

    def lengths(self) -> Iterator[int]:
        """Return the number of steps in each epoch, without end: after `period` epochs they repeat."""
        return itertools.cycle(map(self.steps_in, range(self.period)))

    def largest_batches(self, num_epochs: int) -> dict[tuple[int, Size], int]:
        """Return the largest micro-batch size of each bucket, (resolution, size), in the first epochs."""
        largest: dict[tuple[int, Size], int] = defaultdict(int)
        for epoch in range(min(num_epochs, self.period)):
            for bucket, refs in self.refs_by_bucket(epoch).items():
                number = min(len(refs), batch_size_for(self.batch_sizes, bucket[0]))
                largest[bucket] = max(largest[bucket], number)
        return largest


@dataclass(frozen=True)
class EpochSchedule:
    """The epoch of each step of a run."""

    epoch_starts: Sequence[int]  # the first step of each epoch; the last entry is the step after the last epoch
    num_steps: int  # of the run: all epochs, or max_steps where that is less

    @classmethod
    def of(cls, plan: Plan, epochs: int | None, max_steps: int | None) -> "EpochSchedule":
        """Return the schedule of a run that ends after `epochs` or `max_steps`, whichever is first; one must be given.

        Raises:
            ConfigError: the run would have no step.
        """
        assert plan.samples
        assert epochs is not None or max_steps is not None
        epoch_starts = [0]
        for length in itertools.islice(plan.lengths(), epochs):
            epoch_starts.append(epoch_starts[-1] + length)
            # Not >=: the last entry is beyond all steps, if max_steps ends the run.
            if max_steps is not None and epoch_starts[-1] > max_steps:
                break
        num_steps = epoch_starts[-1] if max_steps is None else min(epoch_starts[-1], max_steps)
        if num_steps == 0:
            raise ConfigError(
                f"no image is shown in {epochs} epochs with this num_repeats; raise epochs or num_repeats"
            )
        return cls(epoch_starts, num_steps)

    def locate(self, step: int) -> tuple[int, int]:
        """Return (epoch, index in the epoch) of a step, 0 the first; epochs without a step are passed over."""
        epoch = bisect_right(self.epoch_starts, step) - 1
        return epoch, step - self.epoch_starts[epoch]

    def epochs_done(self, step: int) -> int:
        """Return the number of epochs that are complete after this step, with those after it that have no step."""
        return self.locate(step + 1)[0]


def short_by(number: int, batch_size: int) -> int:
    """Return the number of images that the last batch of a bucket lacks."""
    return -number % batch_size


def times_seen(plan: Plan, schedule: EpochSchedule, num_steps: int) -> list[int]:
    """Return how often each sample is seen in the first steps of the run."""
    epoch, steps = schedule.locate(num_steps)
    seen = [plan.shown_before(index, epoch) for index in range(len(plan.samples))]
    if steps:  # they end inside an epoch
        for ref in (ref for step in plan.epoch(epoch)[:steps] for batch in step.micro_batches for ref in batch.refs):
            seen[ref.sample] += 1
    return seen
