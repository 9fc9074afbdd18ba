"""The part of a run's configuration that the environment of its launch may contradict."""

from dataclasses import dataclass

from anima_train.model.recompute import Recompute


@dataclass(frozen=True)
class LaunchSettings:
    """Settings that accelerate's configuration has, too."""

    dtype: str  # that is computed in
    compiles: bool | None
    recompute: Recompute
    gradient_accumulation_steps: int
    gradient_clipping: float
    shards: bool
    num_processes: int
