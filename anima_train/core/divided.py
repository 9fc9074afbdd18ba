"""Tensors of which each process holds some rows: torch's `DTensor`, whose class takes long to import."""

from typing import Any

from torch import Tensor


def is_divided(tensor: Tensor) -> bool:
    """Return True for a tensor of which this process holds some rows."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """Return a tensor with the rows of all processes; all have to call this for the same tensors in the same order."""
    return tensor.detach().full_tensor() if is_divided(tensor) else tensor


def local(tensor: Any) -> Tensor:
    """Return the rows of a tensor that this process holds, in the same memory."""
    return tensor.detach().to_local() if is_divided(tensor) else tensor
