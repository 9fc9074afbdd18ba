"""Integrating the model's velocity from noise (t = 1) to an image (t = 0)."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]  # (latents, t) -> velocity


def flow_sigmas(steps: int, shift: float) -> list[float]:
    """`steps + 1` noise levels from 1 to 0, evenly spaced and then shifted: `s t / (1 + (s - 1) t)`."""
    levels = [1 - step / steps for step in range(steps + 1)]
    return [shift * level / (1 + (shift - 1) * level) for level in levels]


def euler(velocity: Velocity, noise: Tensor, sigmas: Sequence[float]) -> Tensor:
    """`x <- x + (sigma_next - sigma) v(x, sigma)` along the noise levels."""
    x = noise
    for sigma, following in pairwise(sigmas):
        x = x + (following - sigma) * velocity(x, sigma)
    return x
