"""How much memory a device has had in use."""

import sys
from pathlib import Path

import torch


def start_peak(device: torch.device) -> None:
    """Forget how much memory was in use until now, as far as the device can."""
    if device.type not in ("cpu", "mps"):
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The most memory that was in use: on the CPU by the process since it began, else by tensors since `start_peak`."""
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()  # of the pool, which keeps what it once held
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    if sys.platform == "linux":
        # Not `ru_maxrss`, which begins with that of the process that started this one.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    elif sys.platform == "win32":  # noqa: RET505  # mypy knows which branch it can reach
        import psutil  # which Accelerate needs

        return psutil.Process().memory_info().peak_wset
    else:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes, on a Mac
