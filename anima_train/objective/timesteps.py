"""The distributions of t, each given by its quantile function.

A distribution on the real line or [0, 1] is drawn first; then at most one of two shifts moves it towards noise.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

Method = Literal["logit_normal", "uniform"]

T_BINS = 10  # equal ranges of t from 0 to 1, in which losses are logged

FLUX_TOKENS = (256, 4096)  # image tokens at which flux_shift's mu is ...
FLUX_MU = (0.5, 1.15)  # ... this; linear in between and beyond


TENTHS = tuple(round(0.1 * tenth, 1) for tenth in range(1, 10))


@dataclass(frozen=True)
class Timesteps:
    """The distribution of t that a run trains on."""

    method: Method = "logit_normal"
    sigmoid_scale: float = 1.0  # standard deviation of the normal under the sigmoid
    shift: float | None = None
    flux_shift: bool = False

    def at(self, quantile: float, num_tokens: int) -> float:
        """Return t at a quantile in [0, 1] of the distribution before the shift, then shifted.

        Args:
            quantile: a uniform random number gives a sample; a fixed one an evaluation point.
            num_tokens: image tokens (a quarter of the latent pixels); only `flux_shift` looks at it.
        """
        if self.method == "uniform":
            t = quantile
        else:
            # A uniform random number can be exactly 0 or 1; the normal has no such quantiles.
            t = sigmoid(self.sigmoid_scale * NormalDist().inv_cdf(min(max(quantile, 2**-53), 1 - 2**-53)))
        if self.shift is not None:
            return shifted(t, self.shift)
        if self.flux_shift:
            return shifted(t, math.exp(flux_mu(num_tokens)))
        return t


@dataclass(frozen=True)
class Points:
    """The noise levels of an evaluation, each with several noises: level by level, noise by noise."""

    quantiles: tuple[float, ...] = TENTHS  # of the distribution of t before its shift
    sigmas: tuple[float, ...] = ()  # t itself; replaces the quantiles
    repeats: int = 1  # noises at each level

    def __len__(self) -> int:
        """The number of points."""
        return len(self.sigmas or self.quantiles) * self.repeats

    @property
    def names(self) -> tuple[str, ...]:
        """The levels as they are logged."""
        if self.sigmas:
            return tuple(f"sigma_{sigma:.2f}" for sigma in self.sigmas)
        return tuple(f"quantile_{quantile:.2f}" for quantile in self.quantiles)

    def t(self, level: int, timesteps: Timesteps, num_tokens: int) -> float:
        """Return t of a level, 0 the first, for an image of this many tokens."""
        return self.sigmas[level] if self.sigmas else timesteps.at(self.quantiles[level], num_tokens)


def sigmoid(x: float) -> float:
    """Return `1 / (1 + e^-x)`, without overflow for any x."""
    small = math.exp(-abs(x))
    return (1 if x >= 0 else small) / (1 + small)


def shifted(t: float, shift: float) -> float:
    """Return `s t / (1 + (s - 1) t)`, also written `s / (s + 1/t - 1)`; 0 stays 0 and 1 stays 1 exactly."""
    return shift * t / (shift * t + (1 - t))


def flux_mu(num_tokens: int) -> float:
    """Return Flux's resolution-dependent exponent."""
    slope = (FLUX_MU[1] - FLUX_MU[0]) / (FLUX_TOKENS[1] - FLUX_TOKENS[0])
    return FLUX_MU[0] + slope * (num_tokens - FLUX_TOKENS[0])
