"""The bytes of an optimizer's state, counted on the meta device."""

import pytest
import torch

from anima_train.optim.optimizers import Adafactor, AdamW, AdamW8bit, AdamWKahan, Lion, Muon, Prodigy, ScheduleFree
from anima_train.optim.state_shapes import optimizer_state
from anima_train.training.costs import gradient_and_state_bytes


@pytest.mark.parametrize(
    ("settings", "expected"),  # of a bfloat16 weight: itself, its gradient, what is kept beside it, the moments
    [
        (AdamW(lr=1.0), 2 + 2 + 0 + 4),
        (AdamWKahan(lr=1.0), 2 + 2 + 2 + 8),
        (AdamWKahan(lr=1.0, moments_dtype="bfloat16", gradient_release=True), 2 + 0 + 2 + 4),
        (AdamWKahan(lr=1.0, moments_device="cpu", gradient_release=True), 2 + 0 + 2 + 0),
        (AdamW8bit(lr=1.0, gradient_release=True), 2 + 0 + 2 + 2 * (1 + 4 / 256)),
        (AdamW8bit(lr=1.0, rounding="stochastic", gradient_release=True), 2 + 0 + 0 + 2 * (1 + 4 / 256)),
        (AdamW8bit(lr=1.0, rounding="stochastic", moments_device="cpu"), 2 + 2 + 0 + 0),
        (Lion(lr=1.0), 2 + 2 + 2 + 4),
        (Adafactor(lr=1.0), 2 + 2 + 2 + 0),
        (Muon(lr=1.0, rounding="stochastic"), 2 + 2 + 0 + 4),
        (ScheduleFree(lr=1.0), 2 + 2 + 2 + 8),
        (Prodigy(lr=1.0), 2 + 2 + 2 + 2 * 2 / 11),
    ],
)  # fmt: skip
def test_bytes_of_a_trained_weight(settings, expected):
    assert 2 + gradient_and_state_bytes(settings, "bfloat16") == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    "settings", [AdamW8bit(lr=1e-3), Adafactor(lr=1e-3), Muon(lr=1e-3), ScheduleFree(lr=1e-3), Prodigy(lr=1.0)]
)
def test_the_state_that_is_estimated_is_that_of_a_step(settings):
    trained = [torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in ((64, 96), (96,), (8, 8))]
    optimizer = settings.build([{"params": trained}])
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = optimizer.state_dict()["state"]
    for index, estimated in enumerate(optimizer_state(settings, trained)):
        kept = {name: (value.shape, value.dtype) for name, value in saved[index].items()}
        expected = {name: (value.shape, value.dtype) for name, value in estimated.items()}
        kept.pop("group", None)  # the numbers of a group, with its first parameter
        assert kept == expected
