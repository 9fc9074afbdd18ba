"""The learning rate as a function of the step: a factor on every group's base rate, nothing to save."""

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from anima_train.core.settings import Settings, expand_name


class Schedule(Settings):
    """A factor in [0, 1] over a run's progress after the warmup."""

    def factor(self, progress: float) -> float:
        """Return the factor at `progress`, 0 just after the warmup, towards 1 at the last step."""
        raise NotImplementedError


class WithFloor(Schedule):
    """A schedule that falls from 1 to a floor."""

    min_factor: float = Field(default=0.0, ge=0, le=1)
    """The end of the schedule, as a share of the peak learning rate."""

    def falling(self, remaining: float) -> float:
        """Return `remaining` (1 to 0) scaled onto 1 to the floor."""
        return self.min_factor + (1 - self.min_factor) * remaining


class Constant(Schedule):
    """The peak learning rate throughout."""

    type: Literal["constant"] = "constant"

    def factor(self, progress: float) -> float:
        return 1.0


class Linear(WithFloor):
    """A straight line down."""

    type: Literal["linear"] = "linear"

    def factor(self, progress: float) -> float:
        return self.falling(1 - progress)


class Cosine(WithFloor):
    """Half a cosine wave down."""

    type: Literal["cosine"] = "cosine"

    def factor(self, progress: float) -> float:
        return self.falling((1 + math.cos(math.pi * progress)) / 2)


class CosineWithRestarts(WithFloor):
    """Several half waves, each from the peak again."""

    type: Literal["cosine_with_restarts"] = "cosine_with_restarts"
    num_cycles: int = Field(default=3, ge=1)
    """Number of half waves in the run."""

    def factor(self, progress: float) -> float:
        if progress >= 1:
            return self.falling(0)
        return self.falling((1 + math.cos(math.pi * (progress * self.num_cycles % 1))) / 2)


class Polynomial(WithFloor):
    """A power of the remaining share of the run."""

    type: Literal["polynomial"] = "polynomial"
    power: float = Field(default=2.0, gt=0)
    """1 is a straight line; larger falls earlier."""

    def factor(self, progress: float) -> float:
        return self.falling((1 - progress) ** self.power)


class WarmupStableDecay(WithFloor):
    """The peak until the last part of the run, then a straight line down."""

    type: Literal["wsd"] = "wsd"
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """The share of the run, after the warmup, that the decay takes."""

    def factor(self, progress: float) -> float:
        return self.falling(min(1.0, (1 - progress) / self.decay_fraction))


class Rex(WithFloor):
    """Reflected exponential: slow at first, fast at the end (Chen et al. 2021, arXiv:2107.04197)."""

    type: Literal["rex"] = "rex"

    def factor(self, progress: float) -> float:
        return self.falling((1 - progress) / (1 - progress / 2))


AnySchedule = Annotated[
    Constant | Linear | Cosine | CosineWithRestarts | Polynomial | WarmupStableDecay | Rex, Field(discriminator="type")
]
ScheduleSetting = Annotated[AnySchedule, BeforeValidator(expand_name, json_schema_input_type=str | AnySchedule)]


def lr_factor(schedule: Schedule, step: int, num_steps: int, warmup_steps: int) -> float:
    """Return the factor on the base learning rates for optimizer step `step` (0 the first) of `num_steps`.

    The warmup rises linearly and is never 0: step 0 of a warmup of n has 1/n, step n - 1 has 1.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return schedule.factor((step - warmup_steps) / max(1, num_steps - warmup_steps))
