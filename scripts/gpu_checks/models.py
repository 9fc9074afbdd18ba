"""The models that are compared, and the sizes they are compared in."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch._dynamo
import torch.nn.functional as F
from benchmarks import models
from torch import Tensor, nn

from anima_train.core.text_batch import fold_rows, pad_rows
from anima_train.model.block_swap import BlockSwap
from anima_train.model.compiled import CompiledBlocks
from anima_train.model.dit import TransformerShape
from anima_train.model.llm_adapter import LLMAdapterShape
from anima_train.model.recompute import runner
from anima_train.optim.groups import COMPONENTS, LearningRates

Policy = Literal[
    "eager", "selective", "checkpointing", "compiled", "compiled selective", "swap", "int8", "compiled int8", "float8",
]  # fmt: skip
RATES = LearningRates(dict.fromkeys(COMPONENTS, 1e-4))


@dataclass(frozen=True)
class Scale:
    """The sizes of everything: of the real model, or small ones that show on a CPU that nothing here is broken."""

    shape: TransformerShape
    curve_shape: TransformerShape  # of the model whose losses are compared
    llm_adapter: LLMAdapterShape
    text_encoder: dict[str, int]  # of Qwen3
    vae_width: int
    sides: tuple[int, ...]  # of square images, in pixels; the largest first, as it takes the most memory
    batch_sizes: tuple[int, ...]
    rank: int
    rounds: int  # of each timing
    curve_steps: int
    gemm: tuple[int, int, int]


QWEN = {"vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
FULL = Scale(
    shape=TransformerShape(28, 2048, 128, 16, 1024, 256),
    curve_shape=TransformerShape(2, 2048, 128, 16, 1024, 256),
    llm_adapter=LLMAdapterShape(6, 1024, 64, 1024, 1024, 32_128),
    text_encoder=QWEN | HEADS,
    vae_width=96,
    sides=(1024, 768, 512),
    batch_sizes=(1, 4),
    rank=32,
    rounds=5,
    curve_steps=200,
    gemm=(4096, 2048, 8192),
)
SMALL_QWEN = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
SMALL_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
SMOKE = Scale(
    shape=TransformerShape(1, 64, 32, 16, 32, 16),
    curve_shape=TransformerShape(1, 64, 32, 16, 32, 16),
    llm_adapter=LLMAdapterShape(1, 32, 16, 32, 32, 64),
    text_encoder=SMALL_QWEN | SMALL_HEADS,
    vae_width=8,
    sides=(96, 64),
    batch_sizes=(1,),
    rank=2,
    rounds=2,
    curve_steps=3,
    gemm=(64, 64, 64),
)


@dataclass(frozen=True)
class Case:
    """A model with a LoRA on all 16 linears of a block."""

    whose: Literal["ours", "diffusers"]
    policy: Policy
    shape: TransformerShape
    rank: int
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Inputs:
    """A batch."""

    latents: Tensor  # (B, 16, 1, H, W)
    t: Tensor  # (B, 1), float32
    text: Tensor  # (B, L, C), without its zeros
    target: Tensor  # as latents


@dataclass(frozen=True)
class Built:
    """A model in training."""

    model: nn.Module
    velocity: Callable[[Inputs], Tensor]

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that get updates."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def loss(self, inputs: Inputs) -> Tensor:
        """Run the forward pass, and return its loss."""
        return F.mse_loss(self.velocity(inputs).float(), inputs.target.float())


def random_inputs(
    shape: TransformerShape, side: int, batch_size: int, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Inputs:
    """Return a batch of square images of `side` pixels."""
    generator = torch.Generator().manual_seed(seed)
    size = (batch_size, 16, 1, side // 8, side // 8)
    latents, target = (torch.randn(size, generator=generator).to(device, dtype) for _ in range(2))
    text = torch.randn(batch_size, models.REAL_ROWS, shape.context_width, generator=generator).to(device, dtype)
    t = torch.rand(batch_size, 1, generator=generator).to(device)
    return Inputs(latents, t, text, target)


def build(case: Case) -> Built:
    """Return a model with random weights."""
    return build_ours(case) if case.whose == "ours" else build_diffusers(case)


def build_ours(case: Case) -> Built:
    """Return our transformer with its LoRA."""
    policy = "checkpointing" if case.policy == "swap" else case.policy
    model = models.build_ours(case.shape, case.rank, policy, case.device, case.dtype)
    if case.policy == "swap":  # all blocks; to be compared with checkpointing alone
        model.block_swap = BlockSwap(model, case.shape.num_blocks, case.device)
        model.run_block = model.block_swap.around(model.run_block)
    if case.policy.startswith("compiled") and case.device.type != "cuda":
        model.run_block = CompiledBlocks(runner("nothing"), "eager")
    return Built(model, lambda inputs: model(inputs.latents, inputs.t, fold_rows(inputs.text)))


def build_diffusers(case: Case) -> Built:
    """Return diffusers' transformer with PEFT's LoRA in float32, as its training scripts have it."""
    model = models.build_diffusers(case.shape, case.rank, case.device, case.dtype)
    if case.policy == "checkpointing":
        model.enable_gradient_checkpointing()
    if case.policy == "compiled":
        compile_all(model.transformer_blocks, case.device)

    def velocity(inputs: Inputs) -> Tensor:
        padded = torch.cat([inputs.latents, torch.zeros_like(inputs.latents[:, :1])], dim=1)
        with autocast(case):
            return model(padded, inputs.t[:, 0], pad_rows(inputs.text), return_dict=False)[0]

    return Built(model, velocity)


def autocast(case: Case) -> torch.autocast:
    """Return what Accelerate's `mixed_precision` puts around a forward pass."""
    return torch.autocast(case.device.type, torch.bfloat16, enabled=case.dtype == torch.bfloat16)


def compile_all(blocks: nn.ModuleList, device: torch.device) -> None:
    """Compile the blocks, for any number of tokens; on a CPU they are only traced, which takes less time."""
    torch._dynamo.config.recompile_limit = 32  # beyond it dynamo goes on without compiling, and the time means nothing
    for block in blocks:
        block.compile(dynamic=True, backend="inductor" if device.type == "cuda" else "eager")
