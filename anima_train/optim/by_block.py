"""An optimizer's step on a model whose blocks are not all on the device at once."""

from collections.abc import Callable, Iterable

from torch import nn
from torch.optim import Optimizer

from anima_train.model.block_swap import BlockSwap


def step_by_block(optimizer: Optimizer, swap: BlockSwap | None, step: Callable[[], object]) -> None:
    """Make an optimizer's step: that of trained swapped blocks one block after the other, each while it is there.

    Right for optimizers to which one parameter's update is nothing to that of another.

    Args:
        optimizer: that `step` makes a step of.
        swap: the swapped blocks; None: there are none.
        step: called once if none of them trains, else once for all other parameters, and once for each of them.
    """
    if swap is None or not swap.trains:
        step()
        return
    everything: list[list[nn.Parameter]] = [group["params"] for group in optimizer.param_groups]

    def step_of(parameters: Iterable[nn.Parameter]) -> None:
        chosen = set(parameters)
        for group, members in zip(optimizer.param_groups, everything, strict=True):
            group["params"] = [parameter for parameter in members if parameter in chosen]
        step()

    swapped = {parameter for parameters in swap.trained for parameter in parameters}
    try:
        step_of(parameter for members in everything for parameter in members if parameter not in swapped)
        for parameters in swap.updates():
            step_of(parameters)
    finally:
        for group, members in zip(optimizer.param_groups, everything, strict=True):
            group["params"] = members
