"""The LLM adapter: T5 token ids attend to Qwen3's states, and give the transformer's text context.

Module and parameter names are those of the official file, so its keys load as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from anima_train.model.layers import RMSNorm, rope_values, rotate
from anima_train.model.safetensors_io import Entry, count_blocks

ROPE_THETA = 10000.0  # the base of both sides' positions


@dataclass(frozen=True)
class LLMAdapterShape:
    """The dimensions of an LLM adapter, read off its tensors."""

    num_blocks: int
    width: int  # of the blocks
    head_dim: int
    source_width: int  # of the Qwen3 states
    target_width: int  # of the embedding and the output
    vocab_size: int  # embedding rows; the T5 tokenizer may have fewer tokens

    @classmethod
    def of(cls, entries: Mapping[str, Entry]) -> "LLMAdapterShape":
        """Read the shape off a file's entries (keys without prefix)."""
        vocab_size, target_width = entries["embed.weight"].shape
        width, source_width = entries["blocks.0.cross_attn.k_proj.weight"].shape
        head_dim = entries["blocks.0.cross_attn.q_norm.weight"].shape[0]
        return cls(count_blocks(entries, "blocks"), width, head_dim, source_width, target_width, vocab_size)


def positions(length: int, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `rotate` wants for positions from 0: angles in float32, values in the dtype of `like`."""
    frequencies = ROPE_THETA ** (-torch.arange(0, head_dim, 2, device=like.device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, device=like.device, dtype=torch.float32), frequencies)
    return rope_values(angles, like.dtype)


class Attention(nn.Module):
    """Multi-head attention with RMSNorm and rotary positions on q and k, each side counting from 0."""

    def __init__(self, width: int, source_width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(source_width, width, bias=False)
        self.v_proj = nn.Linear(source_width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.q_norm = RMSNorm(head_dim)
        self.k_norm = RMSNorm(head_dim)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        """Let x (B, L, D) attend to source (B, S, D'); mask (B, S) is true where the source may be seen."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)  # (B, heads, L, d)
        k = self.k_norm(self.k_proj(source).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        v = self.v_proj(source).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        # In cross-attention too: each token has the place that it has in its own tokenizer's sequence.
        q = rotate(q, *positions(q.shape[2], self.head_dim, q))
        k = rotate(k, *positions(k.shape[2], self.head_dim, k))
        visible = None
        if mask is not None:
            # A row that may see nothing (the empty caption) is NaN on some SDPA backends. Such a row sees everything
            # instead, and its output is then set to the zero that no values weigh to.
            any_visible = mask.any(dim=-1, keepdim=True)
            visible = (mask | ~any_visible)[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        out = out.transpose(1, 2).flatten(-2)  # (B, L, D)
        if mask is not None:
            out = out * any_visible[:, :, None].to(out.dtype)
        return self.o_proj(out)


class TransformerBlock(nn.Module):
    """Self-attention over the T5 tokens, cross-attention to the Qwen states, MLP; pre-norm, residual."""

    def __init__(self, shape: LLMAdapterShape) -> None:
        super().__init__()
        width = shape.width
        self.norm_self_attn = RMSNorm(width)
        self.self_attn = Attention(width, width, shape.head_dim)
        self.norm_cross_attn = RMSNorm(width)
        self.cross_attn = Attention(width, shape.source_width, shape.head_dim)
        self.norm_mlp = RMSNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, source: Tensor, x_mask: Tensor | None, source_mask: Tensor | None) -> Tensor:
        h = self.norm_self_attn(x)
        x = x + self.self_attn(h, h, x_mask)
        x = x + self.cross_attn(self.norm_cross_attn(x), source, source_mask)
        return x + self.mlp(self.norm_mlp(x))


class Conditioner(nn.Module):
    """The map from encoded texts to contexts, called as `LLMAdapter` is."""

    @property
    def place(self) -> tuple[torch.device, torch.dtype]:
        """The device and the dtype that it computes in."""
        raise NotImplementedError


class LLMAdapter(Conditioner):
    """The map from Qwen3 states and T5 ids to the context that the transformer's cross-attention reads."""

    def __init__(self, shape: LLMAdapterShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocab_size, shape.target_width)
        same = shape.width == shape.target_width
        self.in_proj = nn.Identity() if same else nn.Linear(shape.target_width, shape.width)
        self.blocks = nn.ModuleList(TransformerBlock(shape) for _ in range(shape.num_blocks))
        self.out_proj = nn.Linear(shape.width, shape.target_width)
        self.norm = RMSNorm(shape.target_width)

    @property
    def place(self) -> tuple[torch.device, torch.dtype]:
        """The device and the dtype that it computes in."""
        return self.embed.weight.device, self.embed.weight.dtype

    def forward(
        self,
        source: Float[Tensor, "B S D"],
        ids: Int[Tensor, "B L"],
        source_mask: Bool[Tensor, "B S"] | None = None,
        ids_mask: Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L C"]:
        """Return the context of each T5 token; rows at padded tokens are exact zeros.

        Args:
            source: Qwen3's last hidden states after the final norm, zero at padding.
            ids: T5 token ids, ending with `</s>` (1), padded with 0.
            source_mask: true at real Qwen tokens; all false for the empty caption. None: all real.
            ids_mask: true at real T5 tokens. None: all real.
        """
        source = source.to(self.out_proj.weight.dtype)
        x = self.in_proj(self.embed(ids))
        for block in self.blocks:
            x = block(x, source, ids_mask, source_mask)
        x = self.norm(self.out_proj(x))
        # Cross-attention masks no row, so that padding has to be zeros.
        return x if ids_mask is None else x * ids_mask[:, :, None].to(x.dtype)
