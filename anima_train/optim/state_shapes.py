"""The shapes of an optimizer's state, before there is one: for the room it takes on a disk and in memory."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from anima_train.optim.optimizers import AnyOptimizer
from anima_train.optim.split import SplitOptimizer


def optimizer_state(
    settings: AnyOptimizer, parameters: Iterable[Tensor], on_device: bool = False
) -> list[dict[str, Tensor]]:
    """Return the tensors that the optimizer keeps for each parameter, on the meta device, where they take no memory.

    They are those of a step there. Of parameters of one shape and dtype, of which a LoRA has hundreds, one makes it.

    Args:
        settings: of the optimizer.
        parameters: that it is to train, on any device.
        on_device: leave out what waits in the host's memory.
    """
    kinds = [(parameter.shape, parameter.dtype) for parameter in parameters]
    states = {kind: state_of(settings, *kind, on_device) for kind in dict.fromkeys(kinds)}
    return [states[kind] for kind in kinds]


def state_of(
    settings: AnyOptimizer, shape: torch.Size, dtype: torch.dtype, on_device: bool
) -> dict[str, Tensor]:  # fmt: skip
    """Return the state of one parameter, on the meta device; what a library's optimizer keeps of it, at most."""
    # Prodigy looks at the weights, to keep nothing of those that are zero.
    stand_in = nn.Parameter(torch.ones(shape, dtype=dtype, device="cpu" if settings.type == "prodigy" else "meta"))
    stand_in.grad = torch.zeros_like(stand_in)
    optimizer = settings.build([{"params": [stand_in]}])
    if isinstance(optimizer, SplitOptimizer):
        optimizer.start(stand_in, optimizer.param_groups[0])
        names = [name for name in optimizer.state[stand_in] if not (on_device and optimizer.is_on_host(name))]
        return {name: optimizer.state[stand_in][name] for name in names}
    optimizer.step()
    return {name: value.to("meta") for name, value in optimizer.state[stand_in].items() if isinstance(value, Tensor)}
