"""Steps that the device skips, against steps that were never made."""

import pytest
import torch
from torch import nn

from anima_train.optim.ema import Ema, WeightAverage
from anima_train.optim.optimizers import AdamW, AdamWKahan
from anima_train.optim.rules import KahanAdamW
from anima_train.optim.skipping import step_unless

SHAPES = ((16, 8), (8,), (3, 4, 5), (1,))
SKIPPED = (0, 1, 5, 12, 13, 14)

OPTIMIZERS = [
    (AdamW(lr=1e-3), torch.float32),
    (AdamW(lr=1e-3), torch.bfloat16),
    (AdamWKahan(lr=1e-3), torch.bfloat16),
    (AdamWKahan(lr=1e-3, moments_dtype="bfloat16"), torch.bfloat16),
    (AdamWKahan(lr=1e-3, moments_dtype="bfloat16"), torch.float32),
]


class Trained:
    """Parameters with their optimizer and average."""

    def __init__(self, settings, dtype):
        generator = torch.Generator().manual_seed(0)
        self.parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
        with torch.no_grad():
            self.parameters[0][0, 0] = -0.0
        groups = [{"params": self.parameters[:2], "weight_decay": 0.1}, {"params": self.parameters[2:]}]
        self.optimizer = settings.build(groups)
        self.average = WeightAverage({str(i): each for i, each in enumerate(self.parameters)}, Ema(decay=0.9))

    def give_gradients(self, step, is_finite=True):
        for index, parameter in enumerate(self.parameters):
            generator = torch.Generator().manual_seed(100 * step + index)
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if not is_finite:
            self.parameters[0].grad[1] = torch.nan
            self.parameters[3].grad[0] = torch.inf

    def bits(self):
        states = [self.optimizer.state[each] for each in self.parameters]
        tensors = [*self.parameters, *self.average.tensors.values(), *(v for state in states for v in state.values())]
        return [tensor.detach().reshape(-1).view(torch.uint8).clone() for tensor in tensors]


def same(first, second):
    return len(first) == len(second) and all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("chunk", [1, 2**24])
@pytest.mark.parametrize(("settings", "dtype"), OPTIMIZERS, ids=str)
def test_a_skipped_step_is_one_that_was_not_made(settings, dtype, chunk, monkeypatch):
    """The first ones, too, and those in a row: weights, moments, step counts, average; and what follows."""
    monkeypatch.setattr("anima_train.optim.split.CHUNK", chunk)  # one large parameter, or many small ones at once
    skipping, other = Trained(settings, dtype), Trained(settings, dtype)
    for step in range(20):
        skipping.give_gradients(step, is_finite=step not in SKIPPED)
        skips, before = torch.tensor(step in SKIPPED), skipping.bits()
        step_unless(skipping.optimizer, skips)
        skipping.average.update(step + 1, skips)
        if step in SKIPPED:
            assert step == 0 or same(before, skipping.bits())
            continue
        assert not same(before, skipping.bits())
        other.give_gradients(step)
        other.optimizer.step()
        other.average.update(step + 1)
        assert same(skipping.bits(), other.bits())
    assert {int(state["step"]) for state in skipping.optimizer.state.values()} == {20 - len(SKIPPED)}
    assert not hasattr(skipping.optimizer, "found_inf")


def test_the_average_of_a_negative_zero_keeps_its_sign_where_a_step_is_skipped():
    weight = nn.Parameter(torch.tensor([-0.0, 1.0]))
    average = WeightAverage({"weight": weight}, Ema(decay=0.999))
    average.update(10**6, torch.tensor(True))
    assert average.tensors["weight"].signbit().tolist() == [True, False]
    average.update(10**6, torch.tensor(False))
    assert average.tensors["weight"].signbit().tolist() == [False, False]  # what a step does


@pytest.mark.parametrize("skips", [False, True])
def test_an_optimizer_that_knows_no_flag_is_asked_before(skips):
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    weight.grad = torch.ones(3)
    step_unless(optimizer, torch.tensor(skips))
    assert weight.tolist() == [1.0 if skips else 0.5] * 3


def test_parameters_that_take_part_in_different_steps_are_corrected_by_their_own_number_of_steps():
    """Neither the number of calls nor that of gradients tells who goes together: the skipped steps are not known."""

    def trained(members):
        parameters = {name: nn.Parameter(torch.full((4,), 0.5)) for name in members}
        optimizer = KahanAdamW([{"params": list(parameters.values())}], 1e-2, (0.9, 0.99), 1e-8)
        for step, present in enumerate(["ab", "a", "ab", "b", "ab"]):
            for name, parameter in parameters.items():
                parameter.grad = torch.full((4,), 1.0 + step) if name in present else None
            step_unless(optimizer, torch.tensor(step == 1))
        steps = {name: int(optimizer.state[parameter]["step"]) for name, parameter in parameters.items()}
        return {name: (steps[name], parameter.tolist()) for name, parameter in parameters.items()}

    both = trained("ab")
    assert both == trained("a") | trained("b")
    assert {name: step for name, (step, _) in both.items()} == {"a": 3, "b": 4}
