"""The samplers against flows with known solutions, and against diffusers' schedulers."""

import math
from itertools import count, pairwise

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from pydantic import TypeAdapter, ValidationError

from anima_train.core.settings import Settings, validation_problems
from anima_train.objective.timesteps import shifted
from anima_train.sampling.noise_schedules import Simple
from anima_train.sampling.samplers import (
    Dpmpp2M,
    Dpmpp2MSde,
    ErSde,
    Euler,
    EulerAncestral,
    Heun,
    SamplerSetting,
    step_noise,
)

DETERMINISTIC = [Euler(), Heun(), Dpmpp2M(), EulerAncestral(eta=0), Dpmpp2MSde(eta=0)]
STOCHASTIC = [EulerAncestral(), EulerAncestral(eta=0.5), Dpmpp2MSde(), Dpmpp2MSde(eta=0.3), ErSde()]
NAMED = [Euler(), Heun(), EulerAncestral(), ErSde(), Dpmpp2M(), Dpmpp2MSde()]

MEAN, STD = 0.7, 0.5  # of the data in the Gaussian flow
UNEVEN = [0.999, 0.93, 0.8, 0.55, 0.31, 0.3, 0.12, 0.04, 0.0]


def flow_sigmas(steps, shift):
    """`steps + 1` noise levels from 1 to 0, evenly spaced and then shifted."""
    return [shifted(1 - step / steps, shift) for step in range(steps + 1)]


def no_noise():
    raise AssertionError("a deterministic sampler asked for noise")


def denoised_gaussian(x, t, mean=MEAN, std=STD):
    """E[x0 | x_t] for normal data."""
    return mean + std**2 * (1 - t) / ((1 - t) ** 2 * std**2 + t**2) * (x - (1 - t) * mean)


def gaussian_flow(x, t):
    """The velocity of normal data; its ODE takes noise z to MEAN + STD z."""
    return (x - denoised_gaussian(x, t)) / t


def curved_flow(x, t):
    """A velocity that is not linear in anything, and mixes the elements."""
    return torch.tanh(x.flip(-1) * 1.7) * (1 + t) + x * t - 0.3


def trajectory(sampler, velocity, noise, sigmas, noises=no_noise):
    """What the model sees at each evaluation, and the result."""
    seen = []

    def watched(x, t):
        seen.append(x)
        return velocity(x, t)

    result = sampler.sample(watched, noise, sigmas, 3.0, noises)
    return [*seen, result]


def impulses(size):
    """Noise that is 1 in one element only, the next one at each call, so that linear samplers show their weights."""
    numbers = count(1)
    return lambda: torch.eye(size, dtype=torch.float64)[next(numbers)]


def weights_of(sampler, sigmas):
    """The mean of what the sampler makes of normal data, and the weight of each independent noise in it."""
    size = len(sigmas) + 1  # the last element has no noise
    start = torch.eye(size, dtype=torch.float64)[0]
    result = sampler.sample(gaussian_flow, start, sigmas, 3.0, impulses(size))
    return result[-1].item(), (result - result[-1])[:-1]


# ----------------------------------------------------------------- the right distribution, and how fast it is reached


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (Euler(), 1),
        (EulerAncestral(eta=0), 1),
        (EulerAncestral(), 1),
        (Heun(), 2),
        (Dpmpp2M(), 2),
        (Dpmpp2MSde(eta=0), 2),
        (Dpmpp2MSde(), 2),
        (ErSde(), 2),
    ],
    ids=str,
)
def test_error_falls_at_least_with_the_order_when_steps_double(sampler, order):
    errors = []
    for steps in (40, 80):
        mean, weights = weights_of(sampler, [(1 - step / steps) ** 2 for step in range(steps + 1)])
        assert mean == pytest.approx(MEAN, abs=1e-4)  # t = 0.9999 stands for 1 where that has no log-SNR
        errors.append(abs(weights.norm().item() - STD))
    assert errors[1] < (0.02 if order == 1 else 0.001)
    assert math.log2(errors[0] / errors[1]) > order - 0.15


@pytest.mark.parametrize("sampler", [*DETERMINISTIC, *STOCHASTIC], ids=str)
def test_noise_is_as_strong_as_its_level_says(sampler):
    """Data that is 0 leaves only noise in x, and it must have the standard deviation sigma at every step."""
    sigmas = [0.999, *flow_sigmas(12, 3.0)[1:]]
    size = len(sigmas) + 1
    start = sigmas[0] * torch.eye(size, dtype=torch.float64)[0]
    levels = []

    def zero_data(x, t):
        levels.append((t, x.norm().item()))
        return x / t

    assert sampler.sample(zero_data, start, sigmas, 3.0, impulses(size)).norm() < 1e-12
    assert [t for t, _ in levels][:2] == sigmas[:2]
    for t, strength in levels:
        assert strength == pytest.approx(t)


@pytest.mark.parametrize("sampler", NAMED, ids=str)
def test_a_single_image_is_met_exactly(sampler):
    noise, image = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    for steps in (1, 2, 7):
        sigmas = Simple().sigmas(steps, 3.0)
        result = sampler.sample(lambda x, t: (x - image) / t, noise, sigmas, 3.0, step_noise(noise, 0))
        torch.testing.assert_close(result, image, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", NAMED, ids=str)
def test_two_groups_of_images_keep_their_shares(sampler):
    """Data: 30 % near -1, 70 % near 1.5, with standard deviation 0.3."""
    shares, centres, std = torch.tensor([0.3, 0.7]), torch.tensor([-1.0, 1.5]), 0.3

    def mixture(x, t):
        variance = (1 - t) ** 2 * std**2 + t**2
        x = x[:, None]
        share = torch.softmax(shares.log() - (x - (1 - t) * centres) ** 2 / (2 * variance), dim=1)
        return ((x - denoised_gaussian(x, t, centres, std)) / t * share).sum(dim=1)

    noise = torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    found = sampler.sample(mixture, noise, flow_sigmas(60, 1.0), 1.0, step_noise(noise, 1))
    right = found > 0.25
    assert right.float().mean().item() == pytest.approx(0.7, abs=0.015)  # 4 standard errors are 0.013
    for group, centre in [(found[right], 1.5), (found[~right], -1.0)]:
        assert group.mean().item() == pytest.approx(centre, abs=0.03)
        assert group.std().item() == pytest.approx(std, abs=0.06)


# ------------------------------------------------------------------------------------------- other implementations


def noise_to_start(dtype=torch.float32):
    return torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(3)).to(dtype)


def assert_same_path(found, expected):
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_euler_is_that_of_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=UNEVEN[:-1])
    x = noise_to_start()
    expected = [x]
    for t, sigma in zip(scheduler.timesteps, UNEVEN, strict=False):
        x = scheduler.step(curved_flow(x, sigma), t, x).prev_sample
        expected.append(x)
    assert_same_path(trajectory(Euler(), curved_flow, noise_to_start(), UNEVEN), expected)
    torch.testing.assert_close(Euler().sample(curved_flow, noise_to_start(), UNEVEN, 1.0, no_noise), expected[-1])


def test_heun_is_that_of_diffusers():
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(len(UNEVEN) - 1)
    inner = torch.tensor(UNEVEN[1:-1]).repeat_interleave(2)
    scheduler.sigmas = torch.cat([torch.tensor(UNEVEN[:1]), inner, torch.zeros(1)])
    scheduler.set_begin_index(0)
    x = noise_to_start()
    expected = [x]
    for sigma in scheduler.sigmas[:-1].tolist():  # each inner level twice: looking ahead, and starting from there
        x = scheduler.step(curved_flow(x, sigma), torch.tensor(sigma), x).prev_sample
        expected.append(x)
    assert_same_path(trajectory(Heun(), curved_flow, noise_to_start(), UNEVEN), expected)


def dpm_solver(**config):
    """diffusers' DPM-Solver++(2M) at the uneven levels."""
    scheduler = DPMSolverMultistepScheduler(
        solver_order=2, solver_type="midpoint", final_sigmas_type="zero", lower_order_final=False, **config
    )
    scheduler.sigmas = torch.tensor(UNEVEN)
    scheduler.timesteps = scheduler.sigmas[:-1]
    scheduler.num_inference_steps = len(UNEVEN) - 1
    scheduler.set_begin_index(0)
    return scheduler


@pytest.mark.parametrize(("eta", "algorithm"), [(0.0, "dpmsolver++"), (1.0, "sde-dpmsolver++")])
def test_dpmpp_2m_sde_is_that_of_diffusers_for_a_flow(eta, algorithm):
    scheduler = dpm_solver(algorithm_type=algorithm, use_flow_sigmas=True, prediction_type="flow_prediction")
    x = noise_to_start()
    noises = step_noise(x, 5)
    expected = [x]
    for sigma, t in zip(UNEVEN[:-1], scheduler.timesteps, strict=True):
        x = scheduler.step(curved_flow(x, sigma), t, x, variance_noise=noises()).prev_sample
        expected.append(x)
    found = trajectory(Dpmpp2MSde(eta=eta), curved_flow, noise_to_start(), UNEVEN, step_noise(x, 5))
    assert_same_path(found, expected)


def test_dpmpp_2m_is_that_of_diffusers_without_a_flow():
    """k-diffusion's form: levels s of noise on images at full strength, here on diffusers' a (x0 + s n)."""
    scheduler = dpm_solver(algorithm_type="dpmsolver++", prediction_type="sample")
    strengths = [1 / math.sqrt(1 + sigma**2) for sigma in UNEVEN]
    x = noise_to_start()
    expected = [x]
    for number, t in enumerate(scheduler.timesteps):
        denoised = x - UNEVEN[number] * curved_flow(x, UNEVEN[number])
        x = scheduler.step(denoised, t, x * strengths[number]).prev_sample / strengths[number + 1]
        expected.append(x)
    assert_same_path(trajectory(Dpmpp2M(), curved_flow, noise_to_start(), UNEVEN), expected)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_euler_ancestral_steps_down_scales_the_signal_and_adds_noise(eta):
    """ComfyUI's form for a flow: Euler to `down`, then back up to the next level."""
    x = noise_to_start(torch.float64)
    expected, noises = [x], step_noise(x, 4)
    for sigma, following in pairwise(UNEVEN[:-1]):
        down = following * (1 + (following / sigma - 1) * eta)
        x = x + (down - sigma) * curved_flow(x, sigma)
        scale = (1 - following) / (1 - down)
        x = scale * x + math.sqrt(following**2 - (scale * down) ** 2) * noises()
        expected.append(x)
    expected.append(x - UNEVEN[-2] * curved_flow(x, UNEVEN[-2]))
    assert_same_path(trajectory(EulerAncestral(eta=eta), curved_flow, expected[0], UNEVEN, step_noise(x, 4)), expected)


def test_er_sde_integrates_a_parabola_through_what_it_saw():
    """A step without its noise is an integral over the noise ratio r = t / (1 - t) (Cui et al. 2023).

    With y = x / (1 - t) and f(r) = r (exp(r^0.3) + 10): y' = f(r') / f(r) y + f(r') * integral of D df / f^2.
    """

    def f(r):
        return r * (np.exp(r**0.3) + 10)

    sigmas = [0.8, 0.7, 0.58, 0.5, 0.38, 0.3, 0.2]
    ratios = [sigma / (1 - sigma) for sigma in sigmas]
    images = [math.cos(3 * ratio) for ratio in ratios]  # whatever x is
    start = torch.full((1,), 0.4, dtype=torch.float64)
    path = trajectory(
        ErSde(), lambda x, t: (x - images[sigmas.index(t)]) / t, start, sigmas, lambda: torch.zeros_like(start)
    )
    for number, (sigma, following) in enumerate(pairwise(sigmas)):
        u = np.linspace(ratios[number + 1], ratios[number], 20_001)
        away = (u[1:] + u[:-1]) / 2 - ratios[number]
        slopes = [(images[i] - images[i - 1]) / (ratios[i] - ratios[i - 1]) for i in range(1, number + 1)]
        seen = images[number] + (slopes[-1] * away if number > 0 else 0)
        if number > 1:
            seen = seen + (slopes[-1] - slopes[-2]) / (ratios[number] - ratios[number - 2]) * away**2
        integral = np.sum(seen * -np.diff(1 / f(u)))
        y = path[number].item() / (1 - sigma)
        expected = (1 - following) * f(u[0]) * (y / f(u[-1]) + integral)
        assert path[number + 1].item() == pytest.approx(expected, abs=1e-3)  # the rest is its sum of 200 points


# ------------------------------------------------------------------------------------------------- noise and levels


@pytest.mark.parametrize("sampler", NAMED, ids=str)
def test_the_first_level_has_a_signal_where_the_solver_divides_by_it(sampler):
    levels = []

    def velocity(x, t):
        levels.append(t)
        return gaussian_flow(x, t)

    sigmas = Simple().sigmas(4, 3.0)
    result = sampler.sample(velocity, torch.ones(3), sigmas, 3.0, lambda: torch.zeros(3))
    assert result.isfinite().all()
    # ComfyUI: the sigma of the schedule after 1/10,000 of the way, 3 * 0.9999 / (1 + 2 * 0.9999)
    assert levels[0] == (pytest.approx(2.9997 / 2.9998, abs=1e-12) if sampler.type in ("er_sde", "dpmpp_2m_sde") else 1)
    assert sigmas[0] == 1.0


def test_without_renewed_noise_euler_ancestral_is_euler():
    noise = noise_to_start(torch.float64)
    for mine, theirs in zip(
        trajectory(EulerAncestral(eta=0), curved_flow, noise, UNEVEN),
        trajectory(Euler(), curved_flow, noise, UNEVEN),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_without_renewed_noise_dpmpp_2m_sde_tends_to_dpmpp_2m():
    noise = noise_to_start(torch.float64)
    distances = []
    for steps in (50, 100):
        sigmas = [0.999 * (1 - step / steps) ** 2 for step in range(steps + 1)]
        results = [
            sampler.sample(curved_flow, noise, sigmas, 1.0, no_noise) for sampler in (Dpmpp2MSde(eta=0), Dpmpp2M())
        ]
        distances.append((results[0] - results[1]).abs().max().item())
    assert 0 < distances[1] < distances[0] / 3  # both are of order 2, on different clocks


@pytest.mark.parametrize("sampler", NAMED, ids=str)
def test_a_seed_is_an_image(sampler):
    noise, state = noise_to_start(), torch.get_rng_state()
    before = noise.clone()
    first, again, other = (
        sampler.sample(curved_flow, noise, flow_sigmas(6, 3.0), 3.0, step_noise(noise, seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (sampler in DETERMINISTIC)
    assert torch.equal(noise, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_on_the_way_is_comfyuis_and_not_the_initial_one():
    generator = torch.Generator().manual_seed(8)
    draw = step_noise(torch.zeros(2, 5), seed=7)
    for _ in range(3):
        assert torch.equal(draw(), torch.randn(2, 5, generator=generator))


@pytest.mark.parametrize("sampler", NAMED, ids=str)
def test_a_bfloat16_model_is_integrated_in_float32(sampler):
    noise = noise_to_start()

    def velocity(x, t):
        return curved_flow(x, t).bfloat16()

    results = [
        sampler.sample(model, noise, flow_sigmas(6, 3.0), 3.0, step_noise(noise, 0))
        for model in (velocity, lambda x, t: velocity(x, t).float())
    ]
    assert results[0].dtype == torch.float32
    assert torch.equal(*results)


# --------------------------------------------------------------------------------------------------------- settings


def test_a_name_is_short_for_a_table():
    setting = TypeAdapter(SamplerSetting)
    for sampler in NAMED:
        assert setting.validate_python(sampler.type) == setting.validate_python({"type": sampler.type}) == sampler
    assert setting.validate_python({"type": "euler_ancestral", "eta": 0.5}) == EulerAncestral(eta=0.5)


class Preview(Settings):
    sampler: SamplerSetting = ErSde()


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (
            "euler_ancestrall",
            {
                "sampler": 'found "euler_ancestrall" (text), expected one of "euler", "euler_ancestral", "heun", '
                '"er_sde", "dpmpp_2m", "dpmpp_2m_sde"; did you mean "euler_ancestral"?'
            },
        ),
        ({"type": "euler_ancestral", "eta": 1.5}, {"sampler.eta": "found 1.5 (a number), expected at most 1"}),
        ({"type": "dpmpp_2m_sde", "eta": -1.0}, {"sampler.eta": "found -1.0 (a number), expected at least 0"}),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_answered_in_a_sentence(value, problem):
    data = {"sampler": value}
    with pytest.raises(ValidationError) as caught:
        Preview.model_validate(data)
    assert validation_problems(caught.value, data, Preview, {}) == problem
