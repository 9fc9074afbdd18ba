"""Dataclasses whose tensors go from the host to a device together."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorFields:
    """The base of dataclasses of tensors; fields may be such dataclasses, too, and of any other type."""

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """Return it on a device; with `non_blocking` nothing waits for the copy of what is in pinned memory."""
        return self.changed(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Return it in memory of the host from which a device copies by itself."""
        return self.changed(lambda tensor: tensor.pin_memory())

    def changed(self, change: Callable[[Any], Any]) -> Self:
        """Return it with every tensor, or dataclass of tensors, replaced by what `change` makes of it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: change(v) for k, v in values.items() if isinstance(v, Tensor | TensorFields)})
