"""The diffusion transformer (`MiniTrainDIT` of Cosmos-Predict2), written for `torch.compile`.

Module and parameter names are those of the official file. The token grid is flattened before the first block, nothing
branches on shapes, and dtypes are the caller's: the residual stream runs in the dtype of the input.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anima_train.core.shapes import LATENT_CHANNELS
from anima_train.core.text_batch import TextStates, pad_rows
from anima_train.model.llm_adapter import LLMAdapter, RMSNorm, rotate
from anima_train.model.safetensors_io import Entry, count_blocks

PATCH = 2  # latent pixels per token side


@dataclass(frozen=True)
class TransformerShape:
    """The dimensions of a transformer, read off its tensors."""

    num_blocks: int
    width: int
    head_dim: int
    in_channels: int  # 16, or 17 with a mask channel; the padding mask comes on top
    context_width: int
    adaln_lora_dim: int

    @classmethod
    def of(cls, entries: Mapping[str, Entry]) -> "TransformerShape":
        """Read the shape off a file's entries (keys without prefix)."""
        width, patch_features = entries["x_embedder.proj.1.weight"].shape
        return cls(
            num_blocks=count_blocks(entries, "blocks"),
            width=width,
            head_dim=entries["blocks.0.self_attn.q_norm.weight"].shape[0],
            in_channels=patch_features // PATCH**2 - 1,  # the padding mask is counted in the file
            context_width=entries["blocks.0.cross_attn.k_proj.weight"].shape[1],
            adaln_lora_dim=entries["blocks.0.adaln_modulation_self_attn.1.weight"].shape[0],
        )


def rope_angles(height: int, width: int, head_dim: int, ntk: float, device: torch.device) -> Float[Tensor, "N d"]:
    """Return the rotary angles of a height x width token grid in one frame, in float32, row by row.

    The head is divided among time, height and width (in this order); base 10000 is scaled by `ntk ** (d / (d - 2))`
    for the two spatial axes (NTK-aware extrapolation). One frame is at time 0, where every angle is zero.
    """
    axis_dim = head_dim // 6 * 2
    time_dim = head_dim - 2 * axis_dim
    theta = 10000.0 * ntk ** (axis_dim / (axis_dim - 2))
    # In float32 whatever the model computes in: bfloat16 cannot tell neighbouring positions of a large grid apart.
    frequencies = theta ** (-torch.arange(0, axis_dim, 2, device=device, dtype=torch.float32) / axis_dim)
    rows = torch.arange(height, device=device, dtype=torch.float32)[:, None, None] * frequencies
    columns = torch.arange(width, device=device, dtype=torch.float32)[None, :, None] * frequencies
    time = torch.zeros(height, width, time_dim // 2, device=device)
    shape = (height, width, axis_dim // 2)
    half = torch.cat((time, rows.expand(shape), columns.expand(shape)), dim=-1)
    return torch.cat((half, half), dim=-1).flatten(0, 1)  # (N, d); both halves, as `rotate` pairs them


def timestep_sinusoid(t: Float[Tensor, "B 1"], width: int) -> Float[Tensor, "B 1 D"]:
    """Return `[cos(t f), sin(t f)]` with `f_i = 10000^(-2i / width)`, in float32; t in [0, 1], not scaled."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, :, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class Attention(nn.Module):
    """Multi-head attention with RMSNorm on q and k per head, self or cross; no bias anywhere."""

    def __init__(self, width: int, context_width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(context_width, width, bias=False)
        self.v_proj = nn.Linear(context_width, width, bias=False)
        self.output_proj = nn.Linear(width, width, bias=False)
        self.q_norm = RMSNorm(head_dim)
        self.k_norm = RMSNorm(head_dim)

    def forward(self, x: Tensor, context: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """Let x (B, N, D) attend to context (B, L, C).

        Args:
            x: image tokens.
            context: x itself, or the text. It is not masked: rows past the caption are zeros, and take part.
            rope: (cos, sin), each (N, d); None for cross-attention, as text rows have no place in the image.
        """
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)  # (B, heads, N, d)
        k = self.k_norm(self.k_proj(context).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        v = self.v_proj(context).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        out = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype))
        return self.output_proj(out.transpose(1, 2).flatten(-2))  # (B, N, D)


class MLP(nn.Module):
    """Linear, exact GELU, linear; four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(width, 4 * width, bias=False)
        self.layer2 = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(F.gelu(self.layer1(x)))


def modulation(width: int, inner: int, chunks: int) -> nn.Sequential:
    """Return SiLU and the two AdaLN-LoRA linears; their keys in the file are `1` and `2`."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, inner, bias=False), nn.Linear(inner, chunks * width, bias=False))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return `norm(x) * (1 + scale) + shift`, where the LayerNorm has no parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6).to(x.dtype) * (1 + scale) + shift


class Block(nn.Module):
    """Self-attention, cross-attention, MLP; each shifted, scaled and gated by the timestep."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        width = shape.width
        self.self_attn = Attention(width, width, shape.head_dim)
        self.cross_attn = Attention(width, shape.context_width, shape.head_dim)
        self.mlp = MLP(width)
        self.adaln_modulation_self_attn = modulation(width, shape.adaln_lora_dim, 3)
        self.adaln_modulation_cross_attn = modulation(width, shape.adaln_lora_dim, 3)
        self.adaln_modulation_mlp = modulation(width, shape.adaln_lora_dim, 3)

    def forward(self, x: Tensor, emb: Tensor, adaln_lora: Tensor, context: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the tokens after this block, (B, N, D).

        Args:
            x: tokens before it, (B, N, D).
            emb: the timestep, (B, 1, D).
            adaln_lora: what all blocks share of the modulation, (B, 1, 3D).
            context: of the text, (B, L, C).
            cos: of the rotary angles, (N, d).
            sin: of the same.
        """
        shift, scale, gate = (self.adaln_modulation_self_attn(emb) + adaln_lora).chunk(3, dim=-1)
        h = modulate(x, shift, scale)
        x = x + gate * self.self_attn(h, h, (cos, sin))
        shift, scale, gate = (self.adaln_modulation_cross_attn(emb) + adaln_lora).chunk(3, dim=-1)
        x = x + gate * self.cross_attn(modulate(x, shift, scale), context, None)
        shift, scale, gate = (self.adaln_modulation_mlp(emb) + adaln_lora).chunk(3, dim=-1)
        return x + gate * self.mlp(modulate(x, shift, scale))


class PatchEmbed(nn.Module):
    """The linear that turns a 2 x 2 patch into a token; its key is `proj.1`."""

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Identity(), nn.Linear(in_features, width, bias=False))

    def forward(self, patches: Tensor) -> Tensor:
        return self.proj(patches)


class TimestepMLP(nn.Module):
    """Linear, SiLU, linear: from the sinusoid to the modulation that all blocks share."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, width, bias=False)
        self.linear_2 = nn.Linear(width, 3 * width, bias=False)

    def forward(self, sinusoid: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoid)))


class FinalLayer(nn.Module):
    """Modulated LayerNorm and the linear to the velocity of each patch."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.linear = nn.Linear(shape.width, PATCH**2 * LATENT_CHANNELS, bias=False)
        self.adaln_modulation = modulation(shape.width, shape.adaln_lora_dim, 2)

    def forward(self, x: Tensor, emb: Tensor, adaln_lora: Tensor) -> Tensor:
        shared = adaln_lora[:, :, : 2 * x.shape[-1]]  # there is no gate here
        shift, scale = (self.adaln_modulation(emb) + shared).chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))


class MiniTrainDIT(nn.Module):
    """The transformer of Anima: (noisy latents, t, text) -> velocity.

    Args:
        shape: of the transformer.
        llm_adapter: inside when it trains; None when its output is cached.
    """

    def __init__(self, shape: TransformerShape, llm_adapter: LLMAdapter | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.checkpoint_blocks = False  # recompute each block in the backward pass instead of keeping its activations
        self.x_embedder = PatchEmbed((shape.in_channels + 1) * PATCH**2, shape.width)
        self.t_embedder = nn.Sequential(nn.Identity(), TimestepMLP(shape.width))
        self.t_embedding_norm = RMSNorm(shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_blocks))
        self.final_layer = FinalLayer(shape)
        if llm_adapter is not None:
            self.llm_adapter = llm_adapter

    def forward(
        self, x: Float[Tensor, "B C 1 H W"], t: Float[Tensor, "B 1"], text: Tensor | TextStates
    ) -> Float[Tensor, "B 16 1 H W"]:
        """Return the velocity `noise - x0` at x.

        Args:
            x: noisy latents, H and W even; 17 channels for models with a mask channel.
            t: noise level, 0 clean to 1 noise, float32.
            text: the context (B, L, C), unmasked, its rows past the caption exact zeros; or what the
                LLM adapter reads.
        """
        batch, _, _, height, width = x.shape
        rows, columns = height // PATCH, width // PATCH
        context = self.context(text) if isinstance(text, TextStates) else text
        x = F.pad(x.squeeze(2), (0, 0, 0, 0, 0, 1))  # one channel of zeros: the padding mask
        x = x.unflatten(3, (columns, PATCH)).unflatten(2, (rows, PATCH))  # (B, C, rows, m, columns, n)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, C m n)
        x = self.x_embedder(x)

        # The official configurations scale the rotary base by 4, and by 3 where the model reads a mask channel.
        ntk = 4.0 if self.shape.in_channels == LATENT_CHANNELS else 3.0
        angles = rope_angles(rows, columns, self.shape.head_dim, ntk, x.device)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        sinusoid = timestep_sinusoid(t, self.shape.width).to(x.dtype)
        emb = self.t_embedding_norm(sinusoid)  # each block has linears of its own for it
        adaln_lora = self.t_embedder(sinusoid)  # and adds this, the same in all
        context = context.to(x.dtype)

        for block in self.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():  # without gradients nothing is kept anyway
                x = checkpoint(block, x, emb, adaln_lora, context, cos, sin, use_reentrant=False)
            else:
                x = block(x, emb, adaln_lora, context, cos, sin)

        x = self.final_layer(x, emb, adaln_lora)  # (B, N, p1 p2 16)
        # The channel is the last part here, unlike in the patches above: this is not their inverse.
        x = x.view(batch, rows, columns, PATCH, PATCH, LATENT_CHANNELS).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(batch, LATENT_CHANNELS, 1, height, width)

    def context(self, text: TextStates) -> Float[Tensor, "B L C"]:
        """Run the LLM adapter inside this model; pad its output to the rows that cross-attention expects."""
        return pad_rows(self.llm_adapter(text.qwen, text.t5_ids, text.qwen_mask, text.t5_mask))
