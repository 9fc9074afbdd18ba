"""The shapes of an optimizer's state, before there is one: for the room it takes on a disk and in memory."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from anima_train.optim.optimizers import AnyOptimizer


def optimizer_state(settings: AnyOptimizer, parameters: Iterable[Tensor]) -> list[dict[str, Tensor]]:
    """Return the tensors that the optimizer keeps for each parameter, on the meta device, where they take no memory.

    They are those of a step there. Of parameters of one shape and dtype, of which a LoRA has hundreds, one makes it.
    """
    kinds = [(parameter.shape, parameter.dtype) for parameter in parameters]
    stand_ins = {
        (shape, dtype): nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
        for shape, dtype in dict.fromkeys(kinds)
    }
    for stand_in in stand_ins.values():
        stand_in.grad = torch.empty_like(stand_in)
    optimizer = settings.build([{"params": list(stand_ins.values())}])
    optimizer.step()
    return [optimizer.state[stand_ins[kind]] for kind in kinds]
