"""Accelerate: device, processes and autocast."""

from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator, InitProcessGroupKwargs

from anima_train.config.config import Config
from anima_train.core.device import DTYPES, choose_device, describe_device
from anima_train.run.trackers import tracker_names


def make_accelerator(config: Config, run_path: Path) -> Accelerator:
    """Return what decides about device, processes and autocast; the device is printed."""
    accelerator = Accelerator(
        cpu=choose_device().type == "cpu",
        mixed_precision="bf16" if config.model.dtype == "bfloat16" else "no",
        log_with=tracker_names(config.monitoring) or None,
        project_dir=str(run_path),
        # One process may encode for hours while the others wait.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=2))],
    )
    accelerator.print(describe_device(accelerator.device, DTYPES[config.model.dtype]))
    return accelerator
