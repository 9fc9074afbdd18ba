"""Updates in the backward pass against those after it."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from anima_train.optim.optimizers import Adafactor, AdamW8bit, AdamWKahan, Lion, Muon
from anima_train.optim.release import GradientRelease

KINDS = {
    "Kahan": AdamWKahan(lr=1e-2, gradient_release=True),
    "stochastic": AdamWKahan(lr=1e-2, gradient_release=True, rounding="stochastic"),
    "8 bits on the host": AdamW8bit(lr=1e-2, gradient_release=True, moments_device="cpu"),
    "lion": Lion(lr=1e-3, gradient_release=True),
    "adafactor": Adafactor(lr=1e-2, gradient_release=True),
    "muon": Muon(lr=1e-2, gradient_release=True),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Model(nn.Module):
    """Linears, of which one is used twice, one is recomputed and one gets no gradient."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4)).to(dtype)

    def forward(self, x):
        x = self.layers[0](x).tanh()
        x = checkpoint(lambda y: self.layers[1](y).tanh(), x, use_reentrant=False)
        return self.layers[0](self.layers[2](x).tanh())


def made(settings, dtype, releases):
    model = Model(dtype)
    optimizer = settings.build([{"params": list(model.parameters()), "weight_decay": 0.1}])
    return model, optimizer, GradientRelease(optimizer) if releases else None


def backward(model, step, factor=1.0):
    x = draw(8, 64, seed=step).to(model.layers[0].weight.dtype)
    ((model(x) * factor).float() - draw(8, 64, seed=step + 100)).square().mean().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_released_gradients_give_the_same_bits(kind, dtype):
    (model, optimizer, _), (other, others, release) = made(KINDS[kind], dtype, False), made(KINDS[kind], dtype, True)
    for step in range(4):
        for group in (*optimizer.param_groups, *others.param_groups):
            group["step_index"] = step
        backward(model, step)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
        release.begin(torch.tensor(False))
        backward(other, step)
        assert all(parameter.grad is None for parameter in other.parameters())
        torch.testing.assert_close(release.end(), norm.float(), rtol=0.01, atol=0)
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), other.parameters(), strict=True))


def test_no_more_than_one_gradient_is_in_memory():
    model, _, release = made(KINDS["Kahan"], torch.float32, True)
    held = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(each.grad is not None for each in model.parameters()))
        )
    release.begin(torch.tensor(False))
    backward(model, 0)
    assert len(held) == 6
    assert set(held) == {0}  # after ours, that of the parameter itself is gone, too


def test_without_a_step_gradients_are_freed_and_nothing_moves():
    """The trial of the largest micro-batch before a run."""
    model, optimizer, _ = made(KINDS["Kahan"], torch.float32, True)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    backward(model, 0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert not any(optimizer.state.values())


def test_a_loss_that_is_not_finite_changes_no_bit_and_a_gradient_none_after_it():
    model, optimizer, release = made(KINDS["Kahan"], torch.float32, True)
    release.begin(torch.tensor(False))
    backward(model, 0)
    release.end()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    release.begin(torch.tensor(True))
    backward(model, 1)
    assert release.end().isfinite()
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert {int(state["step"]) for state in optimizer.state.values() if state} == {1}

    # Infinity begins at layer 1: the two that come before it in the pass are updated, those after it are not.
    model.layers[1].weight.register_hook(lambda gradient: gradient * torch.inf)
    model.layers[1].bias.register_hook(lambda gradient: gradient * torch.inf)
    release.begin(torch.tensor(False))
    backward(model, 2)
    assert not release.end().isfinite()
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert moved == [False, False, False, False, True, True, False, False]
