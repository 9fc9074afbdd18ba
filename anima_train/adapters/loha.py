"""LoHa (Hyeon-Woo et al. 2022, arXiv:2108.06098): updates that are products, value by value, of two low-rank ones."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from anima_train.adapters.addition import Addition
from anima_train.adapters.names import module_key
from anima_train.core.random import stream
from anima_train.model.factor_linear import FactorLinear
from anima_train.model.lora_linear import AdaptedLinear

DEVIATIONS = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_a": 0.0, "hada_w2_b": 1.0}


class Loha(Addition):
    """Updates of the linears in the blocks that are two low-rank ones multiplied value by value: of rank times rank.

    A step takes longer than a LoRA's: the whole update is made, forward and backward.
    """

    type: Literal["loha"] = "loha"
    rank: int = Field(default=16, ge=1)
    """Width of each of the two; 16 has the parameters of a LoRA of 32."""
    lycoris: ClassVar[str | None] = "loha"
    zero_factors: ClassVar[tuple[str, ...]] = (".hada_w2_a",)

    def layer(self, name: str, base: nn.Linear, weight: Tensor | None, seed: int) -> FactorLinear:
        """Return a linear with its four factors, of which one is zero."""
        rank = self.rank_of(name)
        factors = {}
        for part, deviation in DEVIATIONS.items():
            shape = (base.out_features, rank) if part.endswith("_a") else (rank, base.in_features)
            draw = torch.randn(shape, generator=stream(seed, "lora", f"{name} {part}"))
            factors[part] = self.made(draw * deviation if deviation else torch.zeros(shape), base)
        return FactorLinear(base, "loha", factors, "hada_w2_a", self.scale_of(name), self.dropout)

    def file_tensors(self, name: str, layer: AdaptedLinear, weight: Tensor | None) -> dict[str, Tensor]:
        """Return the factors, the scale folded into one, and the alpha with which readers scale by 1."""
        assert isinstance(layer, FactorLinear)
        tensors = {module_key(name, part): layer.get_parameter(part).detach() for part in layer.names}
        tensors[module_key(name, layer.zero)] = tensors[module_key(name, layer.zero)] * layer.scale
        tensors[module_key(name, "alpha")] = torch.tensor(float(layer.get_parameter("hada_w1_a").shape[1]))
        return tensors
