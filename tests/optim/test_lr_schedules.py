"""The learning-rate schedules against torch's and their formulas."""

import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.optim import lr_scheduler

from anima_train.optim.lr_schedules import (
    Constant,
    Cosine,
    CosineWithRestarts,
    Linear,
    Polynomial,
    Rex,
    ScheduleSetting,
    WarmupStableDecay,
    lr_factor,
)

FALLING = [
    Linear(min_factor=0.1),
    Cosine(min_factor=0.1),
    CosineWithRestarts(min_factor=0.1, num_cycles=1),
    Polynomial(min_factor=0.1),
    WarmupStableDecay(min_factor=0.1),
    Rex(min_factor=0.1),
]
ALL = [Constant(), *FALLING, CosineWithRestarts(num_cycles=3)]


def factors(schedule, num_steps, warmup_steps=0):
    return [lr_factor(schedule, step, num_steps, warmup_steps) for step in range(num_steps)]


def torch_factors(num_steps, make):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (Constant(), lambda optimizer: lr_scheduler.ConstantLR(optimizer, factor=1.0)),
        (Cosine(), lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)),
        (Cosine(min_factor=0.2), lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.2)),
        (Linear(), lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=50)),
        (Linear(min_factor=0.2), lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.2, total_iters=50)),
        (Polynomial(), lambda optimizer: lr_scheduler.PolynomialLR(optimizer, total_iters=50, power=2.0)),
        (Polynomial(power=0.5), lambda optimizer: lr_scheduler.PolynomialLR(optimizer, total_iters=50, power=0.5)),
        (
            CosineWithRestarts(num_cycles=5),
            lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=10),
        ),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_factors_are_those_of_torch(schedule, make):
    assert factors(schedule, 50) == pytest.approx(torch_factors(50, make), abs=1e-9)


@pytest.mark.parametrize("schedule", ALL, ids=str)
def test_warmup_rises_to_the_peak_as_torchs_does(schedule):
    found = factors(schedule, 60, warmup_steps=10)
    expected = torch_factors(10, lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=9))
    assert found[:10] == pytest.approx(expected)
    assert found[10:] == factors(schedule, 50)
    assert found[9] == found[10] == 1.0


@pytest.mark.parametrize("schedule", FALLING, ids=str)
def test_schedules_fall_from_the_peak_to_their_floor(schedule):
    assert schedule.factor(0.0) == 1.0
    assert schedule.factor(1.0) == pytest.approx(0.1)
    values = [schedule.factor(step / 100) for step in range(101)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("schedule", ALL, ids=str)
@pytest.mark.parametrize(("num_steps", "warmup_steps"), [(1, 0), (1, 1), (7, 3), (5, 5), (5, 20), (1000, 37)])
def test_factors_are_positive_and_at_most_1_whatever_the_warmup(schedule, num_steps, warmup_steps):
    found = factors(schedule, num_steps, warmup_steps)
    assert all(0 < factor <= 1 for factor in found)
    assert found[:warmup_steps] == [(step + 1) / warmup_steps for step in range(min(warmup_steps, num_steps))]


@pytest.mark.parametrize("num_cycles", [1, 2, 3, 7])
@pytest.mark.parametrize("length", [3, 10, 97])
def test_restarts_come_at_the_exact_step(num_cycles, length):
    found = factors(CosineWithRestarts(num_cycles=num_cycles, min_factor=0.1), num_cycles * length)
    peaks = [step for step, factor in enumerate(found) if factor > 1 - 1e-9]
    assert peaks == [cycle * length for cycle in range(num_cycles)]
    assert CosineWithRestarts(num_cycles=num_cycles, min_factor=0.1).factor(1.0) == pytest.approx(0.1)


def test_wsd_holds_the_peak_until_the_decay():
    found = factors(WarmupStableDecay(decay_fraction=0.25, min_factor=0.2), 100)
    assert found[:76] == [1.0] * 76
    assert found[76:] == pytest.approx([0.2 + 0.8 * (100 - step) / 25 for step in range(76, 100)])


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_rex_is_the_formula_of_its_paper(progress):
    assert Rex().factor(progress) == pytest.approx((1 - progress) / (0.5 + 0.5 * (1 - progress)))


def test_a_name_is_short_for_a_table():
    setting = TypeAdapter(ScheduleSetting)
    for schedule in (Constant(), Linear(), Cosine(), CosineWithRestarts(), Polynomial(), WarmupStableDecay(), Rex()):
        assert setting.validate_python(schedule.type) == schedule
    assert setting.validate_python({"type": "wsd", "decay_fraction": 0.1}) == WarmupStableDecay(decay_fraction=0.1)


@pytest.mark.parametrize(
    "value",
    [
        "cosin",
        {"type": "constant", "min_factor": 0.1},
        {"type": "cosine", "min_factor": 1.5},
        {"type": "cosine", "min_factor": -0.1},
        {"type": "cosine_with_restarts", "num_cycles": 0},
        {"type": "polynomial", "power": 0.0},
        {"type": "wsd", "decay_fraction": 0.0},
        {"type": "wsd", "decay_fraction": 1.1},
        {"type": "rex", "power": 2.0},
        {"min_factor": 0.1},
        3,
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(value):
    with pytest.raises(ValidationError):
        TypeAdapter(ScheduleSetting).validate_python(value)


def test_cosine_is_half_a_wave():
    assert Cosine().factor(0.25) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert Cosine().factor(0.5) == pytest.approx(0.5)
