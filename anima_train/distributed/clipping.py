"""The norm of a gradient of which each process may hold a part."""

from collections.abc import Sequence

import torch.distributed
from accelerate import Accelerator
from torch import Tensor, nn


def clip_gradients(
    accelerator: Accelerator, parameters: Sequence[nn.Parameter], max_norm: float, is_divided: bool
) -> Tensor:
    """Scale the gradients down to a norm of at most `max_norm`; return the norm that they had, of all processes.

    Nothing waits for the device.

    Args:
        accelerator: of the run.
        parameters: with gradients.
        max_norm: infinity: nothing is scaled.
        is_divided: True if each process holds other rows of the parameters; False: all hold the same.
    """
    if not is_divided:
        norm: Tensor = accelerator.clip_grad_norm_(parameters, max_norm)
        return norm
    gradients = [each.grad for each in parameters if each.grad is not None]
    squared = torch.nn.utils.get_total_norm(gradients).float().square().to(accelerator.device)
    torch.distributed.all_reduce(squared)
    norm = squared.sqrt()
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
