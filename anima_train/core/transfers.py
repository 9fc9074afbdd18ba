"""Copies between host and device that nobody waits for: through pinned memory on CUDA, as always elsewhere."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Arrival:
    """The end of a copy from a CUDA device, for which another thread may wait."""

    event: torch.cuda.Event
    device: torch.device

    def wait(self) -> None:
        """Wait until the copy is there."""
        with torch.cuda.device(self.device):  # a thread that has none yet would use, and so occupy, the first one
            self.event.synchronize()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on the device; on CUDA it may still be on its way, in order with what follows."""
    return pinned_copy(tensor).to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_host(tensor: Tensor) -> tuple[Tensor, Arrival | None]:
    """Return a tensor on the host, and when it may be read; None: now."""
    if tensor.device.type != "cuda":
        return tensor.cpu(), None
    copy = pinned_copy(tensor)
    event = torch.cuda.Event(blocking=True)  # who waits for it sleeps
    event.record(torch.cuda.current_stream(tensor.device))
    return copy, Arrival(event, tensor.device)


def pinned_copy(tensor: Tensor) -> Tensor:
    """Return a copy in pinned memory of the host; of a tensor of a CUDA device, a copy that is still on its way."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
