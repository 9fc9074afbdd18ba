"""The generation of a picture from a prompt's context and a seed; equal to ComfyUI up to rounding."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from anima_train.core.errors import NumericError
from anima_train.core.settings import Settings, quoted
from anima_train.core.shapes import LATENT_CHANNELS, LATENT_PIXELS
from anima_train.sampling.elsewhere import prompt_fault
from anima_train.sampling.noise_schedules import TABLE_SIZE, ScheduleSetting, Simple
from anima_train.sampling.samplers import ErSde, SamplerSetting, Velocity, step_noise

if TYPE_CHECKING:
    from anima_train.model.vae import SingleFrameVAE  # imports diffusers; the settings here are read without it

Tell = Callable[[float], object]  # gets a noise level
Transformer = Callable[[Tensor, Tensor, Tensor], Tensor]  # (latents, t (B, 1), context) -> velocity


class PictureSettings(Settings):
    """The settings of a picture beside its prompt."""

    cfg: float = Field(default=4.0, ge=0)
    """Strength of the prompt against the negative prompt. 1 does without the latter, and takes half the time; it is the
    default for a transformer whose file is called Turbo."""
    negative_prompt: str = ""
    """Things not to draw."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Of the noise; the same as ComfyUI's."""
    width: int = Field(default=1024, ge=16, le=8192, multiple_of=16)
    """In pixels, a multiple of 16. About a million pixels in all."""
    height: int = Field(default=1024, ge=16, le=8192, multiple_of=16)
    """The same."""
    steps: int = Field(default=30, ge=1, le=TABLE_SIZE)
    """Noise levels on the way from noise to the picture; for Turbo the default is 10."""
    shift: float = Field(default=3.0, ge=0.1)
    """Spends more of the steps near noise: t <- s t / (1 + (s - 1) t)."""
    sampler: SamplerSetting = ErSde()
    """The way to take the steps: a name, or a table {type = "...", ...} with the sampler's own keys."""
    schedule: ScheduleSetting = Simple()
    """Spacing of the noise levels."""

    @field_validator("negative_prompt")
    @classmethod
    def is_used(cls, value: str, earlier: ValidationInfo) -> str:
        """Refuse a negative prompt without guidance, which would have no effect."""
        if value and earlier.data.get("cfg") == 1:
            raise ValueError("has no effect with cfg 1 (of Turbo the default); leave it out, or write another cfg")
        return value


def with_shared(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a picture: its own, and those that it shares with others.

    A shared negative prompt is left out where the picture's own cfg makes it useless.
    """
    left_out = ["negative_prompt"] if own.get("cfg") == 1 else []
    return {key: value for key, value in shared.items() if key not in left_out} | dict(own)


class Request(PictureSettings):
    """A picture that is to be drawn."""

    prompt: str
    """The picture in words, as in ComfyUI: (word:1.2) weighs, \\( and \\) are parentheses."""

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def is_for_this_program(cls, value: str) -> str:
        """Refuse what other programs read in a prompt, which would be drawn as words."""
        if (fault := prompt_fault(value)) is not None:
            raise ValueError(fault)
        return value

    @property
    def is_guided(self) -> bool:
        """True if the negative prompt has an effect."""
        return self.cfg != 1


def initial_noise(seed: int, width: int, height: int) -> Float[Tensor, "1 16 1 H W"]:
    """Return the noise that ComfyUI starts from: float32, drawn on the CPU whatever the device. Sizes in pixels."""
    shape = (1, LATENT_CHANNELS, 1, height // LATENT_PIXELS, width // LATENT_PIXELS)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def guided(
    transformer: Transformer, context: Tensor, negative: Tensor | None, cfg: float, dtype: torch.dtype
) -> Velocity:
    """Return the velocity with classifier-free guidance, `v_u + cfg (v_c - v_u)`, in float32; without negative, `v_c`.

    Args:
        transformer: gets latents in `dtype`.
        context: of the prompt.
        negative: of the negative prompt; None for cfg 1. It may have another number of rows.
        cfg: strength of the prompt.
        dtype: what the transformer computes in.
    """

    def predict(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return transformer(x.to(dtype), t, text).float()

    def velocity(x: Tensor, level: float) -> Tensor:
        t = torch.full((len(x), 1), level, dtype=torch.float32, device=x.device)
        with_prompt = predict(x, t, context)
        if negative is None:
            return with_prompt
        without = predict(x, t, negative)
        return without + cfg * (with_prompt - without)

    return velocity


@torch.no_grad()
def generate(
    transformer: Transformer,
    request: Request,
    context: Float[Tensor, "1 L C"],
    negative: Float[Tensor, "1 L C"] | None,
    device: torch.device,
    dtype: torch.dtype,
    tell: Tell = lambda sigma: None,
) -> Float[Tensor, "1 16 1 H W"]:
    """Return the latents of a picture, in float32, on the device.

    Args:
        transformer: gives the velocity of latents in `dtype`.
        request: the picture.
        context: of the prompt.
        negative: of the negative prompt; not needed, and not used, where `request.is_guided` is false.
        device: of the transformer.
        dtype: what the transformer computes in.
        tell: gets the noise level before each pass, from 1 down; the same one more than once.

    Raises:
        NumericError: the latents are not finite.
    """
    assert request.is_guided <= (negative is not None)
    without = negative.to(device) if request.is_guided and negative is not None else None
    silent = guided(transformer, context.to(device), without, request.cfg, dtype)

    def velocity(x: Tensor, level: float) -> Tensor:
        tell(level)
        return silent(x, level)

    noise = initial_noise(request.seed, request.width, request.height).to(device)
    levels = request.schedule.sigmas(request.steps, request.shift)
    latents = request.sampler.sample(velocity, noise, levels, request.shift, step_noise(noise, request.seed))
    if not bool(latents.isfinite().all()):
        raise NumericError(
            f"the picture of {quoted(request.prompt[:60])} became NaN or infinite; use smaller weights in the prompt, "
            "or a lower cfg"
        )
    return latents


@torch.no_grad()
def decode(vae: "SingleFrameVAE", latents: Float[Tensor, "1 16 1 H W"]) -> Image.Image:
    """Return the picture of these latents; values are cut to 8 bits, not rounded, as in ComfyUI."""
    pixels = vae.decode(latents)[0].permute(1, 2, 0)  # (h, w, 3) in [-1, 1]
    values = ((pixels + 1) / 2).clamp(0, 1).cpu().numpy() * 255.0
    return Image.fromarray(values.astype(np.uint8))
