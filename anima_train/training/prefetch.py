"""The steps of a run as one process sees them, their micro-batches read ahead by threads."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from anima_train.data.loader import Batch, CachedData, read_ahead
from anima_train.data.plan import EpochSchedule, MicroBatch, Plan, Step
from anima_train.training.memory import MicroBatchShape


@dataclass(frozen=True)
class RankMicroBatch:
    """A micro-batch of this process."""

    micro_batch: MicroBatch
    resolution: int
    is_padding: bool  # True: it must not count; it keeps this process in step with the others
    address: int  # among the step's micro-batches of all processes

    @property
    def shape(self) -> MicroBatchShape:
        """The facts about it that decide about memory."""
        return MicroBatchShape(self.resolution, self.micro_batch.size, len(self.micro_batch.refs))


@dataclass(frozen=True)
class RankStep:
    """One optimizer step, and the part of it that this process computes."""

    index: int  # 0 the first
    epoch: int
    planned: Step  # of all processes
    micro_batches: Sequence[RankMicroBatch]


def rank_steps(plan: Plan, schedule: EpochSchedule, start: int, rank: int, world_size: int) -> Iterator[RankStep]:
    """Yield a process's part of every step from `start` to the end of the run; an epoch is planned once."""
    planned_epoch, steps = -1, list[Step]()
    for index in range(start, schedule.num_steps):
        epoch, place = schedule.locate(index)
        if epoch != planned_epoch:
            planned_epoch, steps = epoch, plan.epoch(epoch)
        micro_batches = [
            RankMicroBatch(
                micro_batch, plan.samples[micro_batch.refs[0].sample].resolution, is_padding, rank + number * world_size
            )
            for number, (micro_batch, is_padding) in enumerate(steps[place].share(rank, world_size))
        ]
        yield RankStep(index, epoch, steps[place], micro_batches)


@contextlib.contextmanager
def prefetch_steps(
    steps: Iterator[RankStep], data: CachedData, timestep: Callable[[float, int], float], uncond_fraction: float,
    num_threads: int, pins: bool = False,
) -> Iterator[Iterator[tuple[RankStep, Iterator[Batch]]]]:  # fmt: skip
    """Yield an iterator over steps, each with its batches, which threads read a few ahead, over a step's end too.

    A step's batches are to be used up before the next step is asked for.

    Args:
        steps: from `rank_steps`.
        data: that is trained.
        timestep: (quantile, image tokens) -> t.
        uncond_fraction: share of the captions replaced by the empty one.
        num_threads: that read.
        pins: True if they also put the batches into pinned memory.
    """

    def make(item: tuple[RankStep, RankMicroBatch]) -> Batch:
        step, mine = item
        batch = data.training_batch(mine.micro_batch, step.epoch, mine.is_padding, timestep, uncond_fraction)
        return batch.pin_memory() if pins else batch

    shown, read = itertools.tee(steps)
    items = ((step, micro_batch) for step in read for micro_batch in step.micro_batches)
    with contextlib.closing(read_ahead(items, make, num_threads=num_threads)) as batches:
        yield ((step, itertools.islice(batches, len(step.micro_batches))) for step in shown)
