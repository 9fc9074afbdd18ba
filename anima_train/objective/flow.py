"""The straight path between an image and noise, and the velocity along it.

t = 0 is the clean image, t = 1 is noise.
"""

from jaxtyping import Float
from torch import Tensor

Latents = Float[Tensor, "B C 1 H W"]


def add_noise(latents: Latents, noise: Latents, t: Float[Tensor, " B"]) -> Latents:
    """Return `x_t = (1 - t) x0 + t noise`."""
    t = t.view(-1, 1, 1, 1, 1)
    return (1 - t) * latents + t * noise


def velocity_target(latents: Latents, noise: Latents) -> Latents:
    """Return `noise - x0`: the derivative of `add_noise` with respect to t."""
    return noise - latents
