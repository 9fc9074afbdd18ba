"""Where the numbers go: metrics.jsonl always, TensorBoard and W&B through Accelerate."""

import os
from collections.abc import Mapping

from accelerate import Accelerator

from anima_train.config.config import Monitoring
from anima_train.core.errors import ConfigError


def tracker_names(monitoring: Monitoring) -> list[str]:
    """Accelerate's names of the trackers that are on.

    Raises:
        ConfigError: W&B is on but not installed.
    """
    names = []
    if monitoring.tensorboard:
        names.append("tensorboard")
    if monitoring.enable_wandb:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise ConfigError('monitoring.enable_wandb: needs W&B: pip install "anima-train[wandb]"') from None
        names.append("wandb")
    return names


def start_trackers(accelerator: Accelerator, monitoring: Monitoring, run_name: str) -> None:
    """Open the trackers; only the main process writes."""
    if monitoring.wandb_api_key and accelerator.is_main_process:
        os.environ["WANDB_API_KEY"] = monitoring.wandb_api_key  # the one way to hand it over that stores it nowhere
    options = {"wandb": {"name": monitoring.wandb_run_name or run_name, "dir": accelerator.project_dir}}
    accelerator.init_trackers(
        monitoring.wandb_tracker_name or "anima-train",
        init_kwargs={name: options[name] for name in options if monitoring.enable_wandb},
    )


def track(accelerator: Accelerator, values: Mapping[str, float], x: int) -> None:
    """Send numbers to every open tracker."""
    accelerator.log(dict(values), step=x)
