"""The averages that schedule-free optimizers keep, in the place of the weights that train."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@runtime_checkable
class ScheduleFreeOptimizer(Protocol):
    """An optimizer that trains weights beside their average, which is what is looked at and saved."""

    def averaged(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> Tensor:
        """Return the average of a parameter, in float32."""


@contextlib.contextmanager
def averages_in_place(optimizer: Optimizer) -> Iterator[None]:
    """Give the weights of a schedule-free optimizer their averages; afterwards they are bitwise what they were.

    Others keep theirs. Takes as much memory again as the weights, while it lasts.
    """
    if not isinstance(optimizer, ScheduleFreeOptimizer):
        yield
        return
    pairs = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
    kept = [parameter.detach().clone() for parameter, _ in pairs]
    try:
        with torch.no_grad():
            for parameter, group in pairs:
                parameter.copy_(optimizer.averaged(parameter, group))
        yield
    finally:
        with torch.no_grad():
            for (parameter, _), weight in zip(pairs, kept, strict=True):
                parameter.copy_(weight)
