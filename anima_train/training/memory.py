"""The peak of a device's memory, and the message when there is not enough."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from anima_train.config.config import Config
from anima_train.core.device import is_out_of_memory
from anima_train.core.errors import SpaceError
from anima_train.core.format import count, format_bytes
from anima_train.data.buckets import Size

ASKED = re.compile(r"ried to allocate ([0-9.]+) (bytes|KiB|MiB|GiB|TiB)")
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def start_peak(device: torch.device) -> None:
    """Forget how much memory was in use until now, as far as the device can."""
    if device.type not in ("cpu", "mps"):
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Return the most bytes that were in use: on the CPU by the process so far, else by tensors since `start_peak`."""
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()  # of the pool, which keeps what it once held
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    if psutil.LINUX:
        # psutil has no peak here, and `ru_maxrss` begins with that of the process that started this one.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))  # on a Mac, which has no peak, what is in use now


@dataclass(frozen=True)
class MicroBatchShape:
    """The shape of what goes through the transformer at once."""

    resolution: int
    size: Size
    batch_size: int
    is_evaluation: bool = False  # without a backward pass

    def __str__(self) -> str:
        return f"{count(self.batch_size, 'image')} of {self.size} at once"

    @property
    def cost(self) -> tuple[int, int]:
        """Grows with the memory that is needed: image tokens, then captions."""
        return self.batch_size * self.size.num_tokens, self.batch_size


@dataclass
class MemoryContext:
    """The present use of the memory; it changes as the run goes on."""

    doing: str
    shape: MicroBatchShape | None = None  # None: nothing goes through the transformer
    config: Config | None = None  # with the settings that save memory; None: they are not chosen yet

    def __str__(self) -> str:
        return self.doing if self.shape is None else f"{self.doing}, with {self.shape}"


@contextlib.contextmanager
def memory_errors(
    device: torch.device, context: MemoryContext, suggestions: Callable[[MicroBatchShape | None], Sequence[str]]
) -> Iterator[None]:
    """Report memory that runs out as a `SpaceError` about what was being done then.

    Args:
        device: that trains.
        context: kept up to date by the caller.
        suggestions: what to change where this shape does not fit, that of least cost first.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        peak, asked = peak_bytes(device), asked_bytes(str(error))
        need = f"{format_bytes(peak)} in use at most until then"
        if asked is not None:
            need = f"more than {format_bytes(peak + asked)} ({need}, {format_bytes(asked)} more asked for)"
        changes = [f"\n  {number}. {change}" for number, change in enumerate(suggestions(context.shape), start=1)]
        raise SpaceError(
            f"out of memory in {context}. Needed: {need}; {limits(device)}. What to change, in order of least cost:"
            f"{''.join(changes)}"
        ) from error


def asked_bytes(message: str) -> int | None:
    """Return the bytes that could not be had; None if torch's message does not say. CUDA rounds them."""
    found = ASKED.search(message)
    return None if found is None else round(float(found[1]) * UNITS[found[2]])


def limits(device: torch.device) -> str:
    """Describe how much memory there is."""
    if device.type == "mps":
        return f"the device has {format_bytes(torch.mps.recommended_max_memory())}"
    if device.type != "cpu":
        free, total = torch.accelerator.get_memory_info(device)
        others = max(0, total - free - torch.accelerator.memory_reserved(device))
        in_use = f"{format_bytes(others)} of it in use for other things than this training"
        return f"the device has {format_bytes(total)}, {in_use}"
    text = f"the computer has {format_bytes(psutil.virtual_memory().total)}"
    if psutil.LINUX and (limit := psutil.Process().rlimit(psutil.RLIMIT_AS)[0]) != psutil.RLIM_INFINITY:
        text += f", of which a process may take {format_bytes(limit)} (ulimit -v)"
    return text
