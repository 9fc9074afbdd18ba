"""The integration of the model's velocity from noise (t = 1) to an image (t = 0), as ComfyUI does it for a flow.

At noise level s a flow has `x = (1 - s) x0 + s n`, so the velocity v tells the clean latents `D = x - s v`. All
samplers but euler and heun step to the next level s' by

    x' = (1 - s') D' + s' (k e + sqrt(1 - k^2) n),    e = (x - (1 - s) D') / s

where e is the noise in x, a share k of it is kept and the rest renewed by n ~ N(0, 1), and D' is what D is expected to
be on the way. They differ in k and in D'; k = 1 with D' = D is euler. The last level is 0, and the last step gives D.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from anima_train.core.settings import Settings, expand_name
from anima_train.objective.timesteps import shifted
from anima_train.sampling.elsewhere import SAMPLERS, named_elsewhere

Velocity = Callable[[Tensor, float], Tensor]  # (latents, t) -> velocity
Levels = Sequence[float]  # noise levels of the steps, falling
StepNoise = Callable[[], Tensor]  # standard normal noise like the latents, new at each call

FIRST_T = 1 - 1e-4  # stands for t = 1 where that has no signal-to-noise ratio
INTEGRATION_POINTS = 200  # of er_sde's integrals


def step_noise(latents: Tensor, seed: int) -> StepNoise:
    """Return a source of the noise that ComfyUI's samplers add on the way: a generator on the device of the latents.

    On the CPU its seed is one more than the image's, or the first step would add the initial noise once more.
    dpmpp_2m_sde gets another noise in ComfyUI, the increments of a Brownian tree (torchsde). They are just as normal
    and independent, so its images are other draws of the same distribution there, not the same images.
    """
    on_cpu = latents.device.type == "cpu"
    generator = torch.Generator(latents.device).manual_seed(seed + 1 if on_cpu else seed)
    return lambda: torch.randn(latents.shape, generator=generator, dtype=latents.dtype, device=latents.device)


class Sampler(Settings):
    """A way to follow the velocity."""

    def sample(self, velocity: Velocity, noise: Tensor, sigmas: Levels, shift: float, step_noise: StepNoise) -> Tensor:
        """Return clean latents from noise.

        Args:
            velocity: the model, guidance included.
            noise: standard normal, float32; what the sampler computes has its dtype.
            sigmas: falling noise levels, the first 1 and the last 0, from a schedule.
            shift: the shift of that schedule.
            step_noise: called once a step by samplers that renew the noise.
        """
        raise NotImplementedError


class Euler(Sampler):
    """Straight on, `x <- x + (s' - s) v(x, s)`; one evaluation a step, order 1."""

    type: Literal["euler"] = "euler"

    def sample(self, velocity: Velocity, noise: Tensor, sigmas: Levels, shift: float, step_noise: StepNoise) -> Tensor:
        x = noise
        for sigma, following in pairwise(sigmas):
            x = x + (following - sigma) * velocity(x, sigma).to(x.dtype)
        return x


class Heun(Sampler):
    """The mean slope of both ends; two evaluations a step, order 2 (Karras et al. 2022, arXiv:2206.00364)."""

    type: Literal["heun"] = "heun"

    def sample(self, velocity: Velocity, noise: Tensor, sigmas: Levels, shift: float, step_noise: StepNoise) -> Tensor:
        x = noise
        for sigma, following in pairwise(sigmas):
            slope = velocity(x, sigma).to(x.dtype)
            if following > 0:
                ahead = x + (following - sigma) * slope
                slope = (slope + velocity(ahead, following).to(x.dtype)) / 2
            x = x + (following - sigma) * slope
        return x


class Denoising(Sampler):
    """A sampler that steps by the denoised latents D, at present and before."""

    needs_snr: ClassVar[bool] = False  # True if (1 - sigma) / sigma must not be 0

    def sample(self, velocity: Velocity, noise: Tensor, sigmas: Levels, shift: float, step_noise: StepNoise) -> Tensor:
        x = noise
        if self.needs_snr and sigmas[0] == 1:
            sigmas = [shifted(FIRST_T, shift), *sigmas[1:]]
        history: list[Tensor] = []
        for step, (sigma, following) in enumerate(pairwise(sigmas)):
            denoised = x - sigma * velocity(x, sigma).to(x.dtype)
            history = [*history[-2:], denoised]
            x = denoised if following == 0 else self.step(x, history, sigmas[: step + 2], step_noise)
        return x

    def step(self, x: Tensor, history: Sequence[Tensor], sigmas: Levels, step_noise: StepNoise) -> Tensor:
        """Return the latents after one step, from level sigmas[-2] to sigmas[-1] > 0.

        Args:
            x: the latents at sigmas[-2].
            history: up to three D: the last one is at sigmas[-2], the one before it at sigmas[-3], ...
            sigmas: the levels so far.
            step_noise: called where noise is renewed.
        """
        raise NotImplementedError


class EulerAncestral(Denoising):
    """Euler to below the next level and back up to it with new noise.

    `down = s' (1 + eta (s'/s - 1))`: the step goes there, and noise is added until signal and noise are as at s'.
    """

    type: Literal["euler_ancestral"] = "euler_ancestral"
    eta: float = Field(default=1.0, ge=0, le=1)
    """Strength of the renewal of noise; 0 is euler."""

    def step(self, x: Tensor, history: Sequence[Tensor], sigmas: Levels, step_noise: StepNoise) -> Tensor:
        sigma, following = sigmas[-2:]
        down = following * (1 + self.eta * (following / sigma - 1))
        kept = noise_ratio(down) / noise_ratio(following)
        return advance(x, history[-1], sigma, following, kept, step_noise)


class Dpmpp2M(Denoising):
    """DPM-Solver++(2M): D on the line through the last two; order 2 (Lu et al. 2022, arXiv:2211.01095).

    The line is drawn over -log s, as in k-diffusion and ComfyUI; diffusers draws it over log((1 - s) / s).
    """

    type: Literal["dpmpp_2m"] = "dpmpp_2m"

    def step(self, x: Tensor, history: Sequence[Tensor], sigmas: Levels, step_noise: StepNoise) -> Tensor:
        denoised = half_a_step_on(history, [-math.log(sigma) for sigma in sigmas[-3:]])
        return advance(x, denoised, sigmas[-2], sigmas[-1], 1.0, step_noise)


class Dpmpp2MSde(Denoising):
    """DPM-Solver++(2M) SDE, midpoint: D on the line through the last two over l = log((1 - s) / s).

    `k = exp(-eta (l' - l))` (Lu et al. 2022, arXiv:2211.01095).
    """

    type: Literal["dpmpp_2m_sde"] = "dpmpp_2m_sde"
    needs_snr: ClassVar[bool] = True
    eta: float = Field(default=1.0, ge=0)
    """Speed of the renewal of noise; 0 is an ODE solver like dpmpp_2m."""

    def step(self, x: Tensor, history: Sequence[Tensor], sigmas: Levels, step_noise: StepNoise) -> Tensor:
        log_snrs = [-math.log(noise_ratio(sigma)) for sigma in sigmas[-3:]]
        kept = math.exp(-self.eta * (log_snrs[-1] - log_snrs[-2]))
        return advance(x, half_a_step_on(history, log_snrs), sigmas[-2], sigmas[-1], kept, step_noise)


class ErSde(Denoising):
    """Extended reverse-time SDE, VP ER-SDE-Solver-3 (Cui et al. 2023, arXiv:2309.06169).

    With the noise ratio r = s / (1 - s) and the paper's f(r) = r (exp(r^0.3) + 10), the step to r' takes D at u between
    them to be D + D1 (u - r) + D2 (u - r)^2 / 2, where D1 and D2 are the divided differences of the last three D:

        k = (f(r') / r') / (f(r) / r)
        x' = the step with this k and D + (1 - s') sum over j = 1, 2 of Dj times
             the integral of (f(r') / f(u) - 1) (u - r)^(j-1) / (j-1)! du from r' to r

    As the authors do it, D1 is the slope of the last step, not that at r, and 1 / f is summed at 200 points: the error
    falls like order 2, and in the end, in hundreds of steps, like order 1.
    """

    type: Literal["er_sde"] = "er_sde"
    needs_snr: ClassVar[bool] = True

    def step(self, x: Tensor, history: Sequence[Tensor], sigmas: Levels, step_noise: StepNoise) -> Tensor:
        ratios = [noise_ratio(sigma) for sigma in sigmas[-4:]]
        start, end = ratios[-2:]
        x = advance(x, history[-1], sigmas[-2], sigmas[-1], er_growth(end) / er_growth(start), step_noise)
        if len(history) == 1:
            return x
        width = (start - end) / INTEGRATION_POINTS
        points = [end + number * width for number in range(INTEGRATION_POINTS)]
        weights = [width * end * er_growth(end) / (point * er_growth(point)) for point in points]
        slope = (history[-1] - history[-2]) / (start - ratios[-3])
        x = x + (1 - sigmas[-1]) * (sum(weights) - (start - end)) * slope
        if len(history) == 2:
            return x
        slope_before = (history[-2] - history[-3]) / (ratios[-3] - ratios[-4])
        bend = (slope - slope_before) / ((start - ratios[-4]) / 2)
        moment = sum(weight * (point - start) for weight, point in zip(weights, points, strict=True))
        return x + (1 - sigmas[-1]) * (moment + (start - end) ** 2 / 2) * bend


def advance(x: Tensor, denoised: Tensor, sigma: float, following: float, kept: float, step_noise: StepNoise) -> Tensor:
    """Take the step at the head of this file, to the level `following`, with `kept` for k and `denoised` for D'."""
    noise = kept * (x - (1 - sigma) * denoised) / sigma
    if kept < 1:
        noise = noise + math.sqrt(1 - kept**2) * step_noise()
    return (1 - following) * denoised + following * noise


def half_a_step_on(history: Sequence[Tensor], times: Sequence[float]) -> Tensor:
    """Return D in the middle of the step from times[-2] to times[-1], on the line through the last two D."""
    if len(history) == 1:
        return history[-1]
    before, now, following = times
    return history[-1] + (following - now) / (now - before) / 2 * (history[-1] - history[-2])


def noise_ratio(sigma: float) -> float:
    """Return noise over signal, `s / (1 - s)`."""
    return sigma / (1 - sigma)


def er_growth(ratio: float) -> float:
    """Return ER-SDE's f(r) / r, the speed at which noise is renewed: the paper's `exp(r^0.3) + 10`."""
    return math.exp(ratio**0.3) + 10


AnySampler = Annotated[Euler | EulerAncestral | Heun | ErSde | Dpmpp2M | Dpmpp2MSde, Field(discriminator="type")]
SamplerSetting = Annotated[
    AnySampler,
    BeforeValidator(expand_name, json_schema_input_type=str | AnySampler),
    BeforeValidator(named_elsewhere(SAMPLERS), json_schema_input_type=str | AnySampler),
]
