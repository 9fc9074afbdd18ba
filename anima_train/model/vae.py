"""The Qwen-Image VAE for single images: exact 2-D convolutions in place of the causal 3-D ones.

A causal convolution sees the first frame behind frames of zeros, so of its kernel only the last temporal tap counts:
a 2-D convolution with that slice is equal, needs a third of the memory and is several times faster. diffusers, which
takes seconds, is imported when a VAE is loaded: a run with a whole cache needs none.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from anima_train.core.shapes import LATENT_CHANNELS
from anima_train.core.transfers import to_device
from anima_train.model.file_kinds import open_slot, validate_kind
from anima_train.model.safetensors_io import TensorFile, match_keys, read_tensors

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d

STAGE = 4  # modules per decoder stage in the Wan file: three residual blocks and an upsampler

# Parts of diffusers' keys -> what the Wan file calls them; decoder stages are counted in `wan_key`.
RENAMES: tuple[tuple[str, str], ...] = (
    (r"\.norm1\.", ".residual.0."),
    (r"\.conv1\.", ".residual.2."),
    (r"\.norm2\.", ".residual.3."),
    (r"\.conv2\.", ".residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.", ".downsamples."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
)


def wan_key(key: str) -> str:
    """Return the name in the original Wan file of a key in diffusers' names: the inverse of diffusers' converter."""
    for pattern, replacement in RENAMES:
        key = re.sub(pattern, replacement, key)
    if match := re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", key):
        stage, kind, position = int(match[1]), match[2], int(match[3])
        index = STAGE * stage + (position if kind == "resnets" else STAGE - 1)
        key = f"decoder.upsamples.{index}.{key[match.end() :]}"
    return key


class FrameConv(nn.Conv2d):
    """The causal 3-D convolution of the first frame of a clip; its weight is the last temporal tap."""

    def __init__(self, conv: "QwenImageCausalConv3d") -> None:
        _, rows, columns = conv.kernel_size
        super().__init__(conv.in_channels, conv.out_channels, (rows, columns), padding=(rows // 2, columns // 2))

    def forward(self, x: Float[Tensor, "B C 1 h w"], cache_x: None = None) -> Float[Tensor, "B D 1 h w"]:
        return super().forward(x.squeeze(2)).unsqueeze(2)


class SingleFrameVAE(nn.Module):
    """The VAE for one frame per sample: pixels to normalised latents, and back.

    Args:
        vae: diffusers' VAE, whose modules are taken over and changed in place; its convolution weights are not kept,
            so it may as well be on the meta device.
    """

    def __init__(self, vae: "AutoencoderKLQwenImage") -> None:
        from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d

        super().__init__()
        self.encoder = vae.encoder
        self.quant_conv = vae.quant_conv
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder
        # Plain numbers, not buffers: `.to(bfloat16)` must not round them.
        self.latents_mean: Sequence[float] = vae.config.latents_mean
        self.latents_std: Sequence[float] = vae.config.latents_std
        for name, module in list(self.named_modules()):
            owner = self.get_submodule(name.rpartition(".")[0])
            attribute = name.rpartition(".")[2]
            if attribute == "time_conv":
                delattr(owner, attribute)  # between frames; a single one never reaches it
            elif isinstance(module, QwenImageCausalConv3d):
                setattr(owner, attribute, FrameConv(module))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and so of the computation."""
        return self.quant_conv.weight.dtype

    def encode(self, pixels: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B 16 1 H W"]:
        """Return the mode of the posterior, `(z - mean) / std` per channel, in float32.

        Args:
            pixels: in [-1, 1]; height and width divisible by 8.
        """
        moments = self.quant_conv(self.encoder(pixels.to(self.dtype).unsqueeze(2)))  # (B, 32, 1, H, W)
        mode = moments[:, :LATENT_CHANNELS].float()  # the rest is the log-variance
        return (mode - per_channel(self.latents_mean, mode)) / per_channel(self.latents_std, mode)

    def decode(self, latents: Float[Tensor, "B 16 1 H W"]) -> Float[Tensor, "B 3 h w"]:
        """Return pixels in [-1, 1], clamped, in float32, from normalised latents."""
        z = latents.float() * per_channel(self.latents_std, latents) + per_channel(self.latents_mean, latents)
        pixels: Tensor = self.decoder(self.post_quant_conv(z.to(self.dtype)))
        return pixels.squeeze(2).float().clamp(-1, 1)


def to_pixels(images: UInt8[Tensor, "B h w 3"]) -> Float[Tensor, "B 3 h w"]:
    """Return RGB images as the VAE reads them: float32 in [-1, 1], channels first."""
    return (images.float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def per_channel(values: Sequence[float], like: Tensor) -> Float[Tensor, "1 C 1 1 1"]:
    """Return one number per channel, in float32, on the device of `like`, to be broadcast over latents."""
    return to_device(torch.tensor(values, dtype=torch.float32), like.device).view(1, -1, 1, 1, 1)


def open_vae(path: Path) -> tuple[TensorFile, "AutoencoderKLQwenImage", Mapping[str, str]]:
    """Return the VAE file's header, diffusers' module on the meta device, and diffusers' key -> key in the file.

    Raises:
        ModelFileError: as `load_vae`.
    """
    from diffusers import AutoencoderKLQwenImage
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    file = open_slot(path, "vae")
    validate_kind(file, "vae")
    names: Mapping[str, str] = convert_wan_vae_to_diffusers({name: name for name in file.entries})
    found = {name: file.entries[wan_name] for name, wan_name in names.items()}
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage(base_dim=found["encoder.down_blocks.0.norm1.gamma"].shape[0])
    match_keys(found, vae.state_dict(), f"model.vae_path: {path} (keys as diffusers names them)")
    return file, vae, names


def load_vae(path: Path, dtype: torch.dtype, device: torch.device) -> SingleFrameVAE:
    """Load the VAE from its official file (Wan names); only what a single frame uses is read.

    Args:
        path: a safetensors file.
        dtype: of the weights and the computation.
        device: of the weights.

    Raises:
        ModelFileError: missing or damaged file, another kind of model, or tensors missing, unexpected or misshapen.
    """
    file, full, wan_names = open_vae(path)
    with torch.device("meta"):
        vae = SingleFrameVAE(full)
    names = {wan_names[name]: name for name in vae.state_dict()}
    state: dict[str, Tensor] = {}
    for wan_name, tensor in read_tensors(file, names):
        last_tap = tensor[:, :, -1] if tensor.dim() == 5 else tensor
        state[names[wan_name]] = last_tap.contiguous().to(device=device, dtype=dtype)
    vae.load_state_dict(state, assign=True)
    return vae.eval().requires_grad_(False)
