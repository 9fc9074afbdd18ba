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


class CopyStream:
    """Copies between host and device beside what the device computes, in their order; elsewhere than on CUDA at once.

    A copy begins when the device has done all that it was told before the copy.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if is_asynchronous(device) else None

    def host_buffer(self, num_bytes: int) -> Tensor:
        """Return a buffer of the host's memory that copies can be made from and into."""
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=self.stream is not None)

    def copy(self, source: Tensor, target: Tensor) -> torch.cuda.Event | None:
        """Copy a flat buffer between host and device, as far as both reach; return the event of its end, on CUDA."""
        source, target = source[: len(target)], target[: len(source)]
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self.stream)
        return event

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Have the device wait for a copy before what it is told next."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def finish(self) -> None:
        """Wait until all copies are made."""
        if self.stream is not None:
            self.stream.synchronize()
