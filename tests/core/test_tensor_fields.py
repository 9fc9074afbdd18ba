"""Dataclasses of tensors that change device together."""

from dataclasses import dataclass

import torch
from torch import Tensor

from anima_train.core.tensor_fields import TensorFields


@dataclass(frozen=True)
class Inner(TensorFields):
    rows: Tensor
    length: int


@dataclass(frozen=True)
class Outer(TensorFields):
    x: Tensor
    inner: Inner
    absent: Tensor | None
    names: tuple[str, ...]


def test_every_tensor_goes_along_and_nothing_else_changes():
    outer = Outer(torch.ones(3), Inner(torch.ones(2, dtype=torch.int64), 7), None, ("a", "b"))
    moved = outer.to(torch.device("meta"))
    assert (moved.x.device.type, moved.inner.rows.device.type) == ("meta", "meta")
    assert (moved.x.shape, moved.inner.rows.dtype) == ((3,), torch.int64)
    assert (moved.inner.length, moved.absent, moved.names) == (7, None, ("a", "b"))
    assert outer.x.device.type == "cpu"


def test_a_dataclass_inside_may_change_in_a_way_of_its_own():
    outer = Outer(torch.ones(3), Inner(torch.ones(2), 7), None, ())
    doubled = outer.changed(lambda value: value if isinstance(value, Inner) else value * 2)
    assert doubled.inner is outer.inner
    assert doubled.x.tolist() == [2.0] * 3
