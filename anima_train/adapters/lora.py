"""LoRA (Hu et al. 2021, arXiv:2106.09685) on the linears of `Block` and `TransformerBlock`."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from anima_train.adapters.names import lora_key
from anima_train.core.device import DTYPES
from anima_train.core.random import stream
from anima_train.core.settings import Settings
from anima_train.model.dit import Block, MiniTrainDIT
from anima_train.model.llm_adapter import TransformerBlock
from anima_train.model.lora_linear import LoraLinear
from anima_train.optim.groups import LearningRates


class Lora(Settings):
    """Low-rank updates of every linear in the blocks; the base weights stay as they are."""

    type: Literal["lora"] = "lora"
    rank: int = Field(default=32, ge=1)
    """Width of the update. 16 to 32 for a style or a character; more learns, and forgets, more."""
    alpha: float | None = Field(default=None, gt=0)
    """The update is scaled by alpha / rank; absent: alpha = rank, scale 1. Folded into the saved file."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of each LoRA input set to zero in training; never in evaluation."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Of the trained LoRA weights. bfloat16 halves their memory and wants optimizer type "adamw_optimi"."""
    init_from_existing: str | None = None
    """A LoRA to begin with: a .safetensors file in the keys of ComfyUI, kohya, diffusers or PEFT, or a folder with one.
    Its rank may be lower than rank, and its alpha another one: the first step computes what `anima sample` draws with
    it. A resumed run has its weights in its training state, and does not read the file. Absent: begin as the base."""

    @field_validator("init_from_existing")
    @classmethod
    def or_nothing(cls, value: str | None) -> str | None:
        """Take an empty text, diffusion-pipe's way to say no, as absent."""
        return value or None

    @property
    def scale(self) -> float:
        """The factor on the update, alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def attach(self, transformer: MiniTrainDIT, rates: LearningRates, seed: int) -> None:
        """Add A and B to every targeted linear of a component that is not frozen; only they train.

        A is Kaiming-uniform (a = sqrt 5) from a stream of its own per module, B zero: the model starts as the base.
        With every component of the blocks frozen nothing is added.
        """
        transformer.requires_grad_(False)
        for name in target_modules(transformer):
            if rates.is_frozen(name):
                continue
            base = transformer.get_submodule(name)
            assert isinstance(base, nn.Linear)
            bound, device = 1 / math.sqrt(base.in_features), base.weight.device
            draw = torch.rand((self.rank, base.in_features), generator=stream(seed, "lora", name))
            lora_a = (draw * 2 - 1).mul_(bound).to(device, DTYPES[self.dtype])
            lora_b = torch.zeros(base.out_features, self.rank, dtype=DTYPES[self.dtype], device=device)
            transformer.set_submodule(name, LoraLinear(base, lora_a, lora_b, self.scale, self.dropout))

    @contextlib.contextmanager
    def as_base(self, transformer: nn.Module) -> Iterator[None]:
        """Make the transformer the base model while this is open: B is zero, in the same memory, and then as before."""
        ups = [layer.lora_B.detach() for _, layer in lora_layers(transformer)]
        kept = [up.clone() for up in ups]
        for up in ups:
            up.zero_()
        try:
            yield
        finally:
            for up, values in zip(ups, kept, strict=True):
                up.copy_(values)

    def tensors(self, transformer: MiniTrainDIT) -> dict[str, Tensor]:
        """Return A and B under their file keys, alpha / rank folded into B so that the scale is 1 everywhere."""
        tensors = {}
        for name, layer in lora_layers(transformer):
            tensors[lora_key(name, "lora_A")] = layer.lora_A.detach()
            tensors[lora_key(name, "lora_B")] = layer.lora_B.detach() * self.scale
        return tensors

    def is_without_effect(self, tensors: Iterable[tuple[str, Tensor]]) -> bool:
        """Return True if a file with these tensors changes nothing: every up-projection is zero, as before training."""
        return not any(bool(tensor.any()) for name, tensor in tensors if "lora_B" in name)

    def metadata(self) -> dict[str, str]:
        """Return the metadata that file managers read."""
        return {
            "modelspec.architecture": "anima-2b/lora",
            "ss_network_module": "networks.lora_anima",
            "ss_network_dim": str(self.rank),
            "ss_network_alpha": str(self.rank),  # folded: a reader that scales must scale by 1
            "ss_network_dropout": str(self.dropout),
        }


def target_modules(transformer: nn.Module) -> list[str]:
    """Return the full names of all linears inside a `Block` or `TransformerBlock`, in the model's order."""
    return [
        f"{block_name}.{name}"
        for block_name, block in transformer.named_modules()
        if isinstance(block, Block | TransformerBlock)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]


def lora_layers(transformer: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yield (full name, module) of every linear that carries a LoRA."""
    for name, module in transformer.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module
