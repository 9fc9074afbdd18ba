"""The layers' own backward passes, against torch's of the same formulas."""

import torch
from torch import Tensor

from anima_train.model.layers import add_gated, rope_values, rotate


def test_a_rotation_turns_pairs_and_its_gradient_turns_back() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(5, 4, generator=generator)
    cos, signed_sin = (table[:, None] for table in rope_values(angles, torch.float64))

    first, second = x.chunk(2, dim=-1)
    turned = torch.polar(torch.ones(5, 1, 4).double(), angles[:, None].double()) * torch.complex(first, second)
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(rotate(x, cos, signed_sin), expected, rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, signed_sin), (x,))


def test_a_gated_sum_has_the_gradients_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    x, update = (torch.randn(2, 5, 8, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gate = torch.randn(2, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(add_gated(x, update, gate), x + gate[:, None] * update)
    assert torch.autograd.gradcheck(add_gated, (x, update, gate))


def test_a_frozen_gate_gets_no_gradient() -> None:
    x, update = (torch.ones(1, 2, 4, requires_grad=True) for _ in range(2))
    gate: Tensor = torch.full((1, 4), 0.5)
    add_gated(x, update, gate).sum().backward()
    assert gate.grad is None
    assert update.grad is not None
    assert bool((update.grad == 0.5).all())
