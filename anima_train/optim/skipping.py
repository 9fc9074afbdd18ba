"""An optimizer's step that the device leaves out by itself, as only it knows whether the gradient is finite."""

from jaxtyping import Bool
from torch import Tensor
from torch.optim import Optimizer


def step_unless(optimizer: Optimizer, skips: Bool[Tensor, ""]) -> None:
    """Make an optimizer's step; where `skips` is True, change no weight and no state by a bit.

    Nothing waits for the flag: it is handed on as `found_inf`, as torch's `GradScaler` does. To an optimizer that knows
    no such flag (torch's unfused ones) it is read before the step, which costs one wait for the device.

    Args:
        optimizer: whose parameters have gradients.
        skips: on the parameters' device.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, skips.float()  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    elif not skips:
        optimizer.step()
