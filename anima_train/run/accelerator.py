"""The `Accelerator` of a run: device, processes and autocast."""

from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator, InitProcessGroupKwargs

from anima_train.core.device import choose_device

TIMEOUT = timedelta(minutes=15)  # after which a process that waits in vain for another one ends the run


def make_accelerator(dtype: str, trackers: list[str], folder: Path) -> Accelerator:
    """Return what decides about device, processes and autocast.

    Args:
        dtype: of the computation, "bfloat16" or "float32".
        trackers: Accelerate's names of those that it opens.
        folder: of the run, where the trackers write.
    """
    return Accelerator(
        cpu=choose_device().type == "cpu",
        mixed_precision="bf16" if dtype == "bfloat16" else "no",
        log_with=trackers or None,
        project_dir=str(folder),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
    )
