"""The part of a run's configuration that the environment of its launch may contradict."""

from dataclasses import dataclass

from anima_train.config.config import Config
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


def launch_settings(config: Config, num_processes: int) -> LaunchSettings:
    """Return what the environment of a launch with so many processes may contradict."""
    return LaunchSettings(
        config.model.dtype, config.compile, config.recompute, config.gradient_accumulation_steps,
        config.gradient_clipping, config.sharding is not None, num_processes,
    )  # fmt: skip
