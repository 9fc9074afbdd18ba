"""The diffusion transformer (`MiniTrainDIT` of Cosmos-Predict2), written for `torch.compile`.

Module and parameter names are those of the official file. The token grid is flattened before the first block, nothing
branches on shapes, and dtypes are the caller's: the residual stream runs in the dtype of the input.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from anima_train.core.shapes import LATENT_CHANNELS
from anima_train.core.text_batch import TextContext, TextStates, fold_rows
from anima_train.model.attention import attend_with_zeros, can_fold
from anima_train.model.layers import RMSNorm, add_gated, modulate, rope_values, rotate
from anima_train.model.llm_adapter import LLMAdapter
from anima_train.model.lora_linear import project
from anima_train.model.modulations import LinearBatch, modulation_of, split_modulations
from anima_train.model.safetensors_io import Entry, count_blocks

if TYPE_CHECKING:
    from anima_train.model.block_swap import BlockSwap

# When the ranks of updates with limits fall with noise: in training, or in evaluation, too. Their file has no limits.
RankMask = Literal["none", "training", "always"]
PATCH = 2  # latent pixels per token side
MAX_TABLES = 64  # of rotary values; 2 MB each at 1024 pixels


@dataclass(frozen=True)
class TransformerShape:
    """The dimensions of a transformer, read off its tensors."""

    num_blocks: int
    width: int
    head_dim: int
    in_channels: int  # 16, or 17 with a mask channel; the padding mask comes on top
    context_width: int
    adaln_lora_dim: int

    @property
    def num_quantizable(self) -> int:
        """The number of weights that may have a byte each: those of the blocks' attention and MLPs."""
        return self.num_blocks * self.width * (14 * self.width + 2 * self.context_width)

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


def rope_angles(height: int, width: int, head_dim: int, ntk: float, device: torch.device) -> Float[Tensor, "N d/2"]:
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
    return torch.cat((time, rows.expand(shape), columns.expand(shape)), dim=-1).flatten(0, 1)


def timestep_sinusoid(t: Float[Tensor, "B 1"], width: int) -> Float[Tensor, "B D"]:
    """Return `[cos(t f), sin(t f)]` with `f_i = 10000^(-2i / width)`, in float32; t in [0, 1], not scaled."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float() * frequencies
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

    def attend_self(self, x: Tensor, cos: Tensor, signed_sin: Tensor, t: Tensor | None) -> Tensor:
        """Let x (B, N, D) attend to itself; cos and signed sin (N, d) are those of `rotate`, t as for `project`."""
        q, k, v = self.heads(x, t, self.q_proj, self.k_proj, self.v_proj)
        cos, signed_sin = cos[:, None], signed_sin[:, None]  # the same for all heads
        q, k = rotate(self.q_norm(q), cos, signed_sin), rotate(self.k_norm(k), cos, signed_sin)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return project(out.transpose(1, 2).flatten(-2), self.output_proj, t=t)[0]

    def attend_text(self, x: Tensor, text: Tensor, log_zeros: Tensor | None, t: Tensor | None) -> Tensor:
        """Let x (B, N, D) attend to text (B, L, C) and exp(log_zeros) rows of zeros: they are not masked.

        There is no rotation, as text rows have no place in the image.
        """
        (q,) = self.heads(x, t, self.q_proj)
        k, v = self.heads(text, t, self.k_proj, self.v_proj)
        q, k = self.q_norm(q), self.k_norm(k)
        out = attend_with_zeros(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), log_zeros)
        return project(out.transpose(1, 2).flatten(-2), self.output_proj, t=t)[0]

    def heads(self, x: Tensor, t: Tensor | None, *linears: nn.Linear) -> list[Tensor]:
        """Return the projections of x, each (B, N, heads, d)."""
        return [out.unflatten(-1, (-1, self.head_dim)) for out in project(x, *linears, t=t)]


class MLP(nn.Module):
    """Linear, exact GELU, linear; four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(width, 4 * width, bias=False)
        self.layer2 = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        return project(F.gelu(project(x, self.layer1, t=t)[0]), self.layer2, t=t)[0]


def modulation(width: int, inner: int, chunks: int) -> nn.Sequential:
    """Return SiLU and the two AdaLN-LoRA linears; their keys in the file are `1` and `2`."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, inner, bias=False), nn.Linear(inner, chunks * width, bias=False))


class Block(nn.Module):
    """Self-attention, cross-attention, MLP; each shifted, scaled and gated by the timestep."""

    def __init__(self, shape: TransformerShape, index: int) -> None:
        super().__init__()
        self.index = index  # of the block in its transformer
        width = shape.width
        self.self_attn = Attention(width, width, shape.head_dim)
        self.cross_attn = Attention(width, shape.context_width, shape.head_dim)
        self.mlp = MLP(width)
        self.adaln_modulation_self_attn = modulation(width, shape.adaln_lora_dim, 3)
        self.adaln_modulation_cross_attn = modulation(width, shape.adaln_lora_dim, 3)
        self.adaln_modulation_mlp = modulation(width, shape.adaln_lora_dim, 3)

    @property
    def modulations(self) -> tuple[nn.Sequential, nn.Sequential, nn.Sequential]:
        """The pairs of linears that shift, scale and gate the three parts."""
        return self.adaln_modulation_self_attn, self.adaln_modulation_cross_attn, self.adaln_modulation_mlp

    def forward(
        self, x: Tensor, modulations: tuple[Tensor, ...], text: Tensor, log_zeros: Tensor | None, cos: Tensor,
        sin: Tensor, t: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Return the tokens after this block, (B, N, D).

        Args:
            x: tokens before it, (B, N, D).
            modulations: shift, 1 + scale and gate, each (B, D), of self-attention, cross-attention and MLP.
            text: the rows that cross-attention sees, (B, L, C).
            log_zeros: logarithm of the number of rows of zeros after them; None: there is none.
            cos: of the rotary angles, (N, d).
            sin: of the same, signed.
            t: noise levels, (B, 1), for updates with limits; None: there is none.
        """
        shift, one_plus_scale, gate = modulations[:3]
        h = self.self_attn.attend_self(modulate(x, shift, one_plus_scale), cos, sin, t)
        x = add_gated(x, h, gate)
        shift, one_plus_scale, gate = modulations[3:6]
        h = self.cross_attn.attend_text(modulate(x, shift, one_plus_scale), text, log_zeros, t)
        x = add_gated(x, h, gate)
        shift, one_plus_scale, gate = modulations[6:]
        return add_gated(x, self.mlp(modulate(x, shift, one_plus_scale), t), gate)


RunBlock = Callable[..., Tensor]  # (block, and what its forward pass takes) -> tokens


def run_block(block: Block, *inputs: Any) -> Tensor:
    """Run a block as it is: nothing compiled, everything kept for the backward pass."""
    # Not `block(...)`: what gathers the weights of a divided block is around this, see `model.sharding`.
    return Block.forward(block, *inputs)


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

    def forward(self, x: Tensor, emb: Tensor, shared: Tensor) -> Tensor:
        """Return the velocity's patches; emb (B, D) is what the modulation reads, shared (B, 3D) what it adds."""
        out = self.adaln_modulation[2](self.adaln_modulation[1](emb)) + shared[:, : 2 * x.shape[-1]]  # without a gate
        shift, scale = out.chunk(2, dim=-1)
        return self.linear(modulate(x, shift, 1 + scale))


class MiniTrainDIT(nn.Module):
    """The transformer of Anima: (noisy latents, t, text) -> velocity.

    Args:
        shape: of the transformer.
        llm_adapter: inside when it trains; None when its output is cached.
    """

    def __init__(self, shape: TransformerShape, llm_adapter: LLMAdapter | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.run_block: RunBlock = run_block  # another one compiles, or recomputes in the backward pass
        self.block_swap: BlockSwap | None = None  # the blocks whose weights wait in the host's memory
        self.folds_zeros = True  # rows of zeros at the end of the text are counted; False: they are computed
        self.modulation_batches: tuple[LinearBatch, LinearBatch] | None = None
        self.blocks_modulate = False  # True: each block makes its own modulations, see `model.sharding`
        self.rank_mask: RankMask = "none"
        self.rope_tables: dict[tuple[int, int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.x_embedder = PatchEmbed((shape.in_channels + 1) * PATCH**2, shape.width)
        self.t_embedder = nn.Sequential(nn.Identity(), TimestepMLP(shape.width))
        self.t_embedding_norm = RMSNorm(shape.width)
        self.blocks = nn.ModuleList(Block(shape, index) for index in range(shape.num_blocks))
        self.final_layer = FinalLayer(shape)
        if llm_adapter is not None:
            self.llm_adapter = llm_adapter

    def forward(
        self, x: Float[Tensor, "B C 1 H W"], t: Float[Tensor, "B 1"], text: Tensor | TextContext | TextStates
    ) -> Float[Tensor, "B 16 1 H W"]:
        """Return the velocity `noise - x0` at x, in float32 where the model computes in bfloat16.

        Args:
            x: noisy latents, H and W even; 17 channels for models with a mask channel.
            t: noise level, 0 clean to 1 noise, float32.
            text: the context (B, L, C), unmasked; the same with its last rows, zeros, counted; or what the LLM adapter
                reads.
        """
        batch, _, _, height, width = x.shape
        rows, columns = height // PATCH, width // PATCH
        context = self.context(text) if isinstance(text, TextStates) else text
        x = x.to(next(self.x_embedder.parameters()).dtype)
        x = F.pad(x.squeeze(2), (0, 0, 0, 0, 0, 1))  # one channel of zeros: the padding mask
        x = x.unflatten(3, (columns, PATCH)).unflatten(2, (rows, PATCH))  # (B, C, rows, m, columns, n)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, C m n)
        x = self.x_embedder(x)

        # In float32 until the first linear: bfloat16 makes the velocity 5 to 17 % less exact.
        sinusoid = timestep_sinusoid(t, self.shape.width)
        emb = F.silu(self.t_embedding_norm(sinusoid)).to(x.dtype)  # each block has linears of its own for it
        shared = self.t_embedder(sinusoid.to(x.dtype))  # and adds this, the same in all
        text_rows, log_zeros = self.text_rows(context, x)
        cos, sin = self.rope_table(rows, columns, x.device, x.dtype)
        limited = self.limited(t)
        for block, modulations in zip(self.blocks, self.modulations(emb, shared, limited), strict=True):
            x = self.run_block(block, x, modulations, text_rows, log_zeros, cos, sin, limited)

        x = self.final_layer(x, emb, shared)  # (B, N, p1 p2 16)
        # The channel is the last part here, unlike in the patches above: this is not their inverse.
        x = x.view(batch, rows, columns, PATCH, PATCH, LATENT_CHANNELS).permute(0, 5, 1, 3, 2, 4)
        x = x.reshape(batch, LATENT_CHANNELS, 1, height, width)
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def text_rows(self, context: Tensor | TextContext, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the rows that cross-attention computes, in the dtype of `like`, and the logarithm of those it counts.

        None: all are computed. Else there is always a logarithm, so that all batches share a graph; but in those where
        captions of more than 512 tokens are beside shorter ones, a bias that hides rows from these.
        """
        if isinstance(context, Tensor):
            return context.to(like.dtype), None
        rows, num_zeros = context.rows, context.num_zeros
        if context.bias is not None:
            return rows.to(like.dtype), context.bias
        if not (self.folds_zeros and can_fold(like.device, like.dtype, self.shape.head_dim)):
            return F.pad(rows, (0, 0, 0, num_zeros)).to(like.dtype), None
        return rows.to(like.dtype), log_of(num_zeros, like.device)

    def context(self, text: TextStates) -> TextContext:
        """Run the LLM adapter inside this model; count the rows that cross-attention expects after its output."""
        return fold_rows(self.llm_adapter(text.source, text.t5_ids, text.source_mask, text.t5_mask), text.bias)

    def limited(self, t: Float[Tensor, "B 1"]) -> Float[Tensor, "B 1"] | None:
        """Return the noise levels that updates with limits get; 0 where the whole of them acts, in the same graphs."""
        if self.rank_mask == "none":
            return None
        return t if self.training or self.rank_mask == "always" else torch.zeros_like(t)

    def modulations(
        self, emb: Float[Tensor, "B D"], shared: Float[Tensor, "B 3*D"], t: Float[Tensor, "B 1"] | None
    ) -> list[tuple[Tensor, ...]] | list[tuple[Tensor, Tensor, Tensor | None]]:
        """Return what modulates each block, as its forward pass takes it; or what it makes that from."""
        if self.blocks_modulate:
            return [(emb, shared, t)] * len(self.blocks)
        if self.modulation_batches is not None:
            first, second = self.modulation_batches
            return split_modulations(second(first(emb, t), t) + shared)
        return split_modulations(torch.stack([modulation_of(pair, emb, t) for pair in self.modulation_pairs]) + shared)

    @property
    def modulation_pairs(self) -> list[nn.Sequential]:
        """The pairs of linears that give the modulations, three of each block."""
        return [pair for block in self.blocks if isinstance(block, Block) for pair in block.modulations]

    def batch_modulations(self) -> None:
        """Compute the modulations of all blocks as batches from now on, if they are frozen and of one kind."""
        first, second = (
            [linear for pair in self.modulation_pairs if isinstance(linear := pair[place], nn.Linear)]
            for place in (1, 2)
        )
        if LinearBatch.fits(first) and LinearBatch.fits(second):
            self.modulation_batches = LinearBatch(first), LinearBatch(second)

    def weights(self) -> dict[str, Tensor]:
        """Return the values of all parameters, to be read or changed between steps; of swapped blocks on the host."""
        weights = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return weights if self.block_swap is None else weights | dict(self.block_swap.waiting())

    def rope_table(
        self, rows: int, columns: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "N d"], Float[Tensor, "N d"]]:
        """Return cos and signed sin of a token grid's rotary angles; those of the sizes seen last are kept."""
        key = rows, columns, device, dtype
        if key not in self.rope_tables:
            # The official configurations scale the rotary base by 4, and by 3 where the model reads a mask channel.
            ntk = 4.0 if self.shape.in_channels == LATENT_CHANNELS else 3.0
            if len(self.rope_tables) >= MAX_TABLES:
                self.rope_tables.pop(next(iter(self.rope_tables)))
            self.rope_tables[key] = rope_values(rope_angles(rows, columns, self.shape.head_dim, ntk, device), dtype)
        return self.rope_tables[key]


def log_of(number: int, device: torch.device) -> Float[Tensor, ""]:
    """Return a number's logarithm, float32, minus infinity for 0, without waiting for the device."""
    return torch.full((), math.log(number) if number else -math.inf, dtype=torch.float32, device=device)
