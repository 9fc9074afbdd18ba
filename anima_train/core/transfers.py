"""Copies between host and device that nobody waits for: through pinned memory on CUDA, as always elsewhere."""

import torch
from torch import Tensor


def is_asynchronous(device: torch.device) -> bool:
    """Return True for a device that works behind the host's back, from and into pinned memory.

    Others may do so, too, but there nothing is gained, and nothing was tried.
    """
    return device.type == "cuda"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on the device; on CUDA it may still be on its way, in order with what follows."""
    return pinned_copy(tensor).to(device, non_blocking=True) if is_asynchronous(device) else tensor.to(device)


def pinned_copy(tensor: Tensor) -> Tensor:
    """Return a copy in pinned memory of the host; of a tensor of a CUDA device, a copy that is still on its way."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class HostCopy:
    """A copy of a tensor in the host's memory, perhaps on its way; it is of now, whatever happens to the tensor later.

    Views of `values` can be taken at once, and read once `wait` is back.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.device = tensor.device
        self.event: torch.cuda.Event | None = None
        if is_asynchronous(tensor.device):
            self.values = pinned_copy(tensor)
            # Who waits for it sleeps, and leaves the core to the threads that decode and load. Waking up takes tens of
            # microseconds; the device does not notice, as it has been told the next step or batch by then.
            self.event = torch.cuda.Event(blocking=True)
            self.event.record(torch.cuda.current_stream(tensor.device))
        else:
            self.values = tensor.to("cpu", copy=True)

    def wait(self) -> Tensor:
        """Return the values; wait until the device has made them, but for nothing that it was told after that."""
        if self.event is not None:
            with torch.cuda.device(self.device):  # a thread without one would use, and so occupy, the first one
                self.event.synchronize()
        return self.values
