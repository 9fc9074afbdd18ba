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

BatchSizes = int | Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Draw:
    """One showing of a sample."""

    sample: int  # index into the samples
    showing: int  # how often the sample was shown before this, since the start of the run: picks the caption variant


@dataclass(frozen=True, slots=True)
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
    def turns(self) -> list[tuple[int, int, int]]:
        """(a, b, c) for each sample: before epoch e it is shown (a * e + b) // c times.

        With num_repeats = p / q that is floor(e * p / q + b / c), where b / c spreads the samples of a directory that
        have this num_repeats evenly over [0, 1), so that every epoch shows the same number of them, give or take one.
        In integers, because a rounding error would show a sample an epoch too early or too late.
        """
        groups: dict[tuple[int, Fraction], list[int]] = defaultdict(list)
        for index, sample in enumerate(self.samples):
            groups[sample.directory, sample.repeats].append(index)
        turns = [(0, 0, 1)] * len(self.samples)
        for (directory, repeats), indices in groups.items():
            order = shuffled(indices, lambda index: self.samples[index].id, self.seed, "turns", directory)
            for place, index in enumerate(order):
                turns[index] = (
                    repeats.numerator * len(order),
                    repeats.denominator * place,
                    repeats.denominator * len(order),
                )
        return turns

    def shown_before(self, index: int, epoch: int) -> int:
        """How often a sample is shown in all epochs before this one: `num_repeats` per epoch, fractions by turns."""
        a, b, c = self.turns[index]
        return (a * epoch + b) // c

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

    def samples_before(self, schedule: "Timetable", step: int) -> int:
        """Return the number of samples seen in the steps before this one."""
        epoch, place = schedule.place(step) if step else (0, 0)
        whole = sum(self.shown_before(index, epoch) for index in range(len(self.samples)))
        return whole + sum(planned.num_samples for planned in self.epoch(epoch)[:place])

    def steps_in(self, epoch: int) -> int:
        """The number of steps in an epoch, without planning it."""
        micro_batches = sum(
            math.ceil(len(draws) / batch_size_for(self.batch_sizes, resolution))
            for (resolution, _), draws in self.draws(epoch).items()
        )
        return math.ceil(micro_batches / self.micro_batches_per_step)

    @property
    def period(self) -> int:
        """After how many epochs the turns of `num_repeats` repeat."""
        return math.lcm(*{sample.repeats.denominator for sample in self.samples})

    def lengths(self) -> Iterator[int]:
        """The number of steps in each epoch, without end: they repeat as the turns of `num_repeats` do."""
        period = self.period
        known: list[int] = []
        for epoch in itertools.count():
            if epoch < period:
                known.append(self.steps_in(epoch))
            yield known[epoch % period]

    def largest_batches(self, num_epochs: int) -> dict[tuple[int, Size], int]:
        """The most samples that a micro-batch of each bucket, (resolution, size), holds in the first epochs."""
        largest: dict[tuple[int, Size], int] = defaultdict(int)
        for epoch in range(min(num_epochs, self.period)):
            for bucket, draws in self.draws(epoch).items():
                number = min(len(draws), batch_size_for(self.batch_sizes, bucket[0]))
                largest[bucket] = max(largest[bucket], number)
        return largest


@dataclass(frozen=True)
class Timetable:
    """Which epoch each step of a run belongs to."""

    first_steps: Sequence[int]  # of each epoch; the last entry is the step after the last epoch
    num_steps: int  # of the run: all epochs, or max_steps where that is less

    @classmethod
    def of(cls, plan: Plan, epochs: int | None, max_steps: int | None) -> "Timetable":
        """The timetable of a run that ends after `epochs` or `max_steps`, whichever is first; one must be given.

        Raises:
            ConfigError: the run would have no step.
        """
        assert plan.samples
        assert epochs is not None or max_steps is not None
        first_steps = [0]
        for _, length in zip(itertools.count() if epochs is None else range(epochs), plan.lengths(), strict=False):
            first_steps.append(first_steps[-1] + length)
            if (
                max_steps is not None and first_steps[-1] > max_steps
            ):  # not >=: more than all steps, if max_steps ends it
                break
        num_steps = first_steps[-1] if max_steps is None else min(first_steps[-1], max_steps)
        if num_steps == 0:
            raise ConfigError(
                f"no image is shown in {epochs} epochs with this num_repeats; raise epochs or num_repeats"
            )
        return cls(first_steps, num_steps)

    def place(self, step: int) -> tuple[int, int]:
        """(epoch, index in the epoch) of a step, 0 the first; epochs without a step are passed over."""
        epoch = bisect_right(self.first_steps, step) - 1
        return epoch, step - self.first_steps[epoch]

    def epochs_done(self, step: int) -> int:
        """The number of epochs that are complete after this step, with those behind it that have no step."""
        return self.place(step + 1)[0]


def short_by(number: int, batch_size: int) -> int:
    """How many images the last batch of a bucket lacks."""
    return -number % batch_size


def times_seen(plan: Plan, timetable: Timetable, num_steps: int) -> list[int]:
    """How often each sample is seen in the first steps of the run."""
    epoch, steps = timetable.place(num_steps)
    seen = [plan.shown_before(index, epoch) for index in range(len(plan.samples))]
    if steps:  # they end inside an epoch
        for step in plan.epoch(epoch)[:steps]:
            for micro_batch in step.micro_batches:
                for draw in micro_batch.draws:
                    seen[draw.sample] += 1
    return seen
