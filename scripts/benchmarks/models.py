"""Our transformer and diffusers' with the same LoRA, and what both read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import CosmosTransformer3DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from anima_train.adapters.lora import Lora
from anima_train.core.text_batch import TextContext, fold_rows, pad_rows
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.quantized import Quantization, quantize_blocks
from anima_train.model.recompute import Recompute
from anima_train.optim.groups import COMPONENTS, LearningRates
from anima_train.run.accelerator import make_accelerator
from anima_train.training.build import block_runner

CONTEXT = 1024  # width of the text
REAL_ROWS = 96  # of the text's 512; the others are zeros

POLICIES: dict[str, Recompute] = {
    "": "nothing", "eager": "nothing", "selective": "selective", "checkpointing": "blocks", "offload": "offload",
}  # fmt: skip

# Where diffusers has the 16 linears of each block.
DIFFUSERS_TARGETS = (
    r"transformer_blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)|norm[123]\.linear_[12])"
)


@dataclass(frozen=True)
class Side:
    """A model in training, and a call of it."""

    model: nn.Module
    call: Callable[[], Tensor]  # -> velocity
    inputs: "Inputs"

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that get updates."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def loss(self) -> Tensor:
        """Run the forward pass, and return its loss."""
        return F.mse_loss(self.call().float(), self.inputs.target)


@dataclass(frozen=True)
class Inputs:
    """The batch that both models read."""

    latents: Tensor  # (B, 16, 1, H, W), float32
    target: Tensor  # the same
    t: Tensor  # (B, 1), float32
    context: TextContext  # of the text
    text: Tensor  # the same with all its rows, (B, 512, 1024)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.latents, self.target, self.t, self.context.rows, self.text


def shape_of(width: int, num_blocks: int) -> TransformerShape:
    """Return the dimensions of Anima's transformer at this width and depth."""
    return TransformerShape(num_blocks, width, 128 if width % 128 == 0 else 64, 16, CONTEXT, 256)


def random_inputs(size: tuple[int, int], batch_size: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Return a batch of images of height and width `size` in pixels, the text in the dtype of the computation."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, 16, 1, size[0] // 8, size[1] // 8)
    latents, target = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    text = torch.randn(batch_size, REAL_ROWS, CONTEXT, generator=generator).to(device, dtype)
    t = torch.full((batch_size, 1), 0.5, device=device)
    return Inputs(latents, target, t, fold_rows(text), pad_rows(text))


def build_ours(shape: TransformerShape, rank: int, policy: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return our transformer with a LoRA on all 16 linears of a block, prepared as a run prepares it.

    Args:
        shape: of the transformer.
        rank: of the LoRA, whose weights are float32.
        policy: one of `POLICIES`, "compiled", "int8" or "float8" before it or not.
        device: of the model.
        dtype: of the base weights and of the computation.

    Raises:
        SystemExit: there is no such policy.
    """
    words = policy.split()
    kinds = [word for word in words if word in get_args(Quantization)]
    recompute = POLICIES.get(" ".join(word for word in words if word not in ("compiled", *kinds)))
    if recompute is None:
        raise SystemExit(
            f'there is no case "{policy}"; known are {", ".join(filter(None, POLICIES))}, compiled ones, and those on '
            "int8 and float8"
        )
    with device:  # random numbers for two billion weights: not on the host
        transformer = MiniTrainDIT(shape)
    transformer.to(dtype)
    for kind in kinds:
        quantize_blocks(transformer, kind)
    Lora(rank=rank).attach(transformer, LearningRates(dict.fromkeys(COMPONENTS, 1e-4)), seed=0)
    transformer.batch_modulations()
    transformer.run_block = block_runner(recompute, "compiled" in words, device)
    transformer.train()
    return accelerator_on(device).prepare(transformer)


def accelerator_on(device: torch.device) -> Accelerator:
    """Return a run's accelerator, on this device even where Accelerate finds no GPU."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()  # Accelerate keeps one configuration per process
    accelerator = make_accelerator(False)
    PartialState().device = accelerator.state.device = device
    return accelerator


def ours(model: nn.Module, inputs: Inputs) -> Side:
    """Return our side of a comparison."""
    return Side(model, lambda: model(inputs.latents, inputs.t, inputs.context), inputs)


def build_diffusers(shape: TransformerShape, rank: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return diffusers' transformer with PEFT's LoRA, float32, on the same 16 linears."""
    transformer = CosmosTransformer3DModel(
        in_channels=shape.in_channels + 1,  # the padding mask given as a channel: its resize needs torchvision
        num_attention_heads=shape.width // shape.head_dim,
        attention_head_dim=shape.head_dim,
        num_layers=shape.num_blocks,
        text_embed_dim=shape.context_width,
        adaln_lora_dim=shape.adaln_lora_dim,
        max_size=(128, 240, 240),
        rope_scale=(1.0, 4.0, 4.0),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
    ).to(device, dtype)
    transformer.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=DIFFUSERS_TARGETS), transformer)
    for module in transformer.modules():
        if isinstance(module, nn.Linear) and module.weight.requires_grad:
            module.float()  # as its training scripts do
    transformer.train()
    return transformer


def diffusers(model: nn.Module, inputs: Inputs, dtype: torch.dtype) -> Side:
    """Return diffusers' side of a comparison, under the autocast that its training scripts have from Accelerate."""
    device_type = inputs.latents.device.type

    def call() -> Tensor:
        padded = torch.cat([inputs.latents, torch.zeros_like(inputs.latents[:, :1])], dim=1).to(dtype)
        with torch.autocast(device_type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model(padded, inputs.t[:, 0], inputs.text, return_dict=False)[0]

    return Side(model, call, inputs)
