"""The `Accelerator` of a run: device, processes and autocast."""

from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator, InitProcessGroupKwargs

from anima_train.config.config import Config
from anima_train.core.device import choose_device
from anima_train.run.trackers import tracker_names

TIMEOUT = timedelta(minutes=15)  # after which a process that waits in vain for another one ends the run


def make_accelerator(config: Config, run_path: Path) -> Accelerator:
    """Return what decides about device, processes and autocast."""
    return Accelerator(
        cpu=choose_device().type == "cpu",
        mixed_precision="bf16" if config.model.dtype == "bfloat16" else "no",
        log_with=tracker_names(config.monitoring) or None,
        project_dir=str(run_path),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
    )
