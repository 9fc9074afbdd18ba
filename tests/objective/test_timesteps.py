"""The distribution of t against the reference's values, its own formulas and samples."""

import math

import pytest
import torch

from anima_train.objective.timesteps import Timesteps, flux_mu

EXTREMES = [0.0, 2**-60, 2**-53, 1 - 2**-53, 1.0]
SETTINGS = [
    Timesteps(method, scale, shift, flux)
    for method, scale in (("uniform", 1.0), ("logit_normal", 0.3), ("logit_normal", 1.3), ("logit_normal", 300.0))
    for shift, flux in ((None, False), (3.0, False), (0.2, False), (None, True))
]


def test_every_golden_value_is_met(golden):
    entries = golden("timesteps.json")
    assert len(entries) == 9
    for entry in entries:
        scale = entry["sigmoid_scale"]
        timesteps = Timesteps(
            entry["timestep_sample_method"], 1.0 if scale is None else scale, entry["shift"], entry["flux_shift"]
        )
        height, width = entry["latent_hw"]
        found = [timesteps.at(quantile, height // 2 * (width // 2)) for quantile in entry["quantiles"]]
        assert found == pytest.approx(entry["t"], abs=1e-6), entry


@pytest.mark.parametrize("timesteps", SETTINGS, ids=str)
def test_t_rises_with_the_quantile_within_0_and_1(timesteps):
    quantiles = sorted([*EXTREMES, *(n / 200 for n in range(1, 200))])
    values = [timesteps.at(quantile, 1024) for quantile in quantiles]
    assert all(math.isfinite(t) and 0 <= t <= 1 for t in values)
    assert values == sorted(values)
    assert values[len(values) // 4] < values[-len(values) // 4]


def test_quantiles_of_drawn_values_are_those_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.sigmoid(1.3 * torch.randn(200_000, generator=generator, dtype=torch.float64))
    drawn = 3 * drawn / (1 + 2 * drawn)
    for quantile in (0.05, 0.3, 0.5, 0.7, 0.95):
        expected = torch.quantile(drawn, quantile)
        assert Timesteps("logit_normal", 1.3, 3.0).at(quantile, 0) == pytest.approx(float(expected), abs=3e-3)


def test_flux_mu_is_the_line_through_its_two_points():
    assert flux_mu(256) == pytest.approx(0.5)
    assert flux_mu(4096) == pytest.approx(1.15)
    assert flux_mu((256 + 4096) // 2) == pytest.approx((0.5 + 1.15) / 2)


def test_flux_shift_moves_larger_images_further_towards_noise():
    timesteps = Timesteps(flux_shift=True)
    values = [timesteps.at(0.5, num_tokens) for num_tokens in (256, 1024, 4096)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(math.exp(0.5) / (math.exp(0.5) + 1))
    assert Timesteps().at(0.5, 256) == Timesteps().at(0.5, 4096) == 0.5
