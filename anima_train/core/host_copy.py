"""Values on their way from the device to the host, which goes on meanwhile."""

import torch
from jaxtyping import Float
from torch import Tensor


def is_asynchronous(device: torch.device) -> bool:
    """Return True for a device that works behind the host's back, from and into pinned memory.

    Others may do so, too, but there nothing is gained, and nothing was tried.
    """
    return device.type == "cuda"


class HostCopy:
    """A copy of a tensor in the host's memory; it is of now, whatever happens to the tensor later."""

    def __init__(self, tensor: Float[Tensor, " N"]) -> None:
        self.event: torch.Event | None = None
        if is_asynchronous(tensor.device):
            self.values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.values.copy_(tensor, non_blocking=True)
            self.event = torch.Event(tensor.device)
            self.event.record()
        else:
            self.values = tensor.to("cpu", copy=True)

    def read(self) -> list[float]:
        """Return the values; wait until the device has made them, but for nothing that it was told after that."""
        if self.event is not None:
            self.event.synchronize()
        values: list[float] = self.values.tolist()
        return values
