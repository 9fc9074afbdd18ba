"""LoRA (Hu et al. 2021, arXiv:2106.09685) on the linears of `Block` and `TransformerBlock`, through PEFT."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from anima_train.adapters.names import lora_key
from anima_train.core.device import DTYPES
from anima_train.core.random import stream
from anima_train.core.settings import Settings
from anima_train.model.dit import Block, MiniTrainDIT
from anima_train.model.llm_adapter import TransformerBlock
from anima_train.optim.groups import LearningRates

NAME = "default"  # PEFT's name of the one adapter


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

    @property
    def scale(self) -> float:
        """The factor on the update, alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def attach(self, transformer: MiniTrainDIT, rates: LearningRates, seed: int) -> None:
        """Add A and B to every targeted linear of a component that is not frozen; only they train.

        A is Kaiming-uniform (a = sqrt 5) from a stream of its own per module, B zero: the model starts as the base.
        With every component of the blocks frozen nothing is added.
        """
        # Here and below, not at the head: PEFT imports transformers and more, and a configuration is read without it.
        from peft import LoraConfig, inject_adapter_in_model

        transformer.requires_grad_(False)
        targets = [name for name in target_modules(transformer) if not rates.is_frozen(name)]
        if not targets:
            return
        # PEFT matches a list of names by suffix, and `blocks.0.self_attn.q_proj` is a suffix of the LLM adapter's
        # module too. A string is a regular expression over the whole name.
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules="|".join(map(re.escape, targets)),
        )
        # On the meta device, because PEFT's own initial values are drawn from the global generator.
        inject_adapter_in_model(config, transformer, adapter_name=NAME, low_cpu_mem_usage=True)
        layers = dict(lora_layers(transformer))
        assert sorted(layers) == sorted(targets)
        for name, layer in layers.items():
            a, b = layer.lora_A[NAME], layer.lora_B[NAME]
            bound = 1 / math.sqrt(a.in_features)
            draw = torch.rand(a.weight.shape, generator=stream(seed, "lora", name))
            device = layer.get_base_layer().weight.device
            a.weight = nn.Parameter((draw * 2 - 1).mul_(bound).to(device, DTYPES[self.dtype]))
            b.weight = nn.Parameter(torch.zeros(b.weight.shape, device=device, dtype=DTYPES[self.dtype]))

    def tensors(self, transformer: MiniTrainDIT) -> dict[str, Tensor]:
        """Return A and B under their file keys, alpha / rank folded into B so that the scale is 1 everywhere."""
        tensors = {}
        for name, layer in lora_layers(transformer):
            tensors[lora_key(name, "lora_A")] = layer.lora_A[NAME].weight.detach()
            tensors[lora_key(name, "lora_B")] = layer.lora_B[NAME].weight.detach() * self.scale
        return tensors

    def is_without_effect(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return True if a file with these tensors changes nothing: every up-projection is zero, as before training."""
        return not any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name)

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


def lora_layers(transformer: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (full name, PEFT layer) of every module that carries a LoRA."""
    from peft.tuners.lora import LoraLayer

    for name, module in transformer.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module
