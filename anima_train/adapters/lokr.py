"""LoKr (Yeh et al. 2023, arXiv:2309.14859): updates that are Kronecker products."""

import math
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from anima_train.adapters.addition import DYNAMIC, Addition
from anima_train.adapters.names import module_key
from anima_train.adapters.starts import uniform
from anima_train.model.factor_linear import FactorLinear
from anima_train.model.lora_linear import AdaptedLinear


class Lokr(Addition):
    """Updates of the linears in the blocks that are Kronecker products: few parameters for a high rank."""

    type: Literal["lokr"] = "lokr"
    rank: int = Field(default=32, ge=1)
    """Width of the second factor's own factors; of half of its sides and more, that factor is whole."""
    alpha: float | None = Field(default=None, gt=0)
    """The update is scaled by alpha / rank, but by 1 where both factors are whole; absent: 1. Folded into the file."""
    decompose_factor: int = Field(default=8, ge=-1)
    """Largest side of the first factor: of 8, a weight of 2048 x 2048 is made of one of 8 x 8 and one of 256 x 256. A
    larger one is a smaller file that learns less, down to sides near the square root, which -1 takes."""
    full_matrix: bool = False
    """The second factor is whole, whatever rank is."""
    lycoris: ClassVar[str | None] = "lokr"
    zero_factors: ClassVar[tuple[str, ...]] = (".lokr_w2", ".lokr_w2_a")

    @model_validator(mode="after")
    def has_a_rank(self) -> Self:
        """Refuse what has no effect on whole factors, and no factor at all."""
        given = {"alpha": self.alpha, "rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        if self.full_matrix and (scaled := [key for key, value in given.items() if value]):
            raise ValueError(f"full_matrix has no rank: remove {' and '.join(scaled)}, or full_matrix")
        if self.decompose_factor == 0:
            raise ValueError("decompose_factor: found 0, expected -1, or at least 1")
        return self

    def metadata(self) -> dict[str, str]:
        """Return the metadata that file managers read; whole factors have no rank."""
        told = super().metadata()
        return told | dict.fromkeys(("ss_network_dim", "ss_network_alpha"), DYNAMIC) if self.full_matrix else told

    def layer(self, name: str, base: nn.Linear, weight: Tensor | None, seed: int) -> FactorLinear:
        """Return a linear with its factors: the outer one of the second is zero, the others uniform."""
        rank = self.rank_of(name)
        (out_1, out_2), (in_1, in_2) = (
            divided(side, self.decompose_factor) for side in (base.out_features, base.in_features)
        )
        factors = {"lokr_w1": uniform(seed, f"{name} w1", out_1, in_1)}
        if is_whole := self.full_matrix or 2 * rank >= max(out_2, in_2):
            factors["lokr_w2"] = torch.zeros(out_2, in_2)
        else:
            factors["lokr_w2_a"] = torch.zeros(out_2, rank)
            factors["lokr_w2_b"] = uniform(seed, f"{name} w2", rank, in_2)
        trained = {part: self.made(values, base) for part, values in factors.items()}
        scale = 1.0 if is_whole else self.scale_of(name)
        return FactorLinear(base, "lokr", trained, list(trained)[1], scale, self.dropout)

    def file_tensors(self, name: str, layer: AdaptedLinear, weight: Tensor | None) -> dict[str, Tensor]:
        """Return the factors, the scale folded into the second, and the alpha with which readers scale by 1."""
        assert isinstance(layer, FactorLinear)
        tensors = {module_key(name, part): layer.get_parameter(part).detach() for part in layer.names}
        tensors[module_key(name, layer.zero)] = tensors[module_key(name, layer.zero)] * layer.scale
        is_low = "lokr_w2_b" in layer.names
        rank = len(layer.get_parameter("lokr_w2_b")) if is_low else 1
        tensors[module_key(name, "alpha")] = torch.tensor(float(rank))
        return tensors


def divided(side: int, factor: int) -> tuple[int, int]:
    """Return a side as a product, the smaller number first: it is at most the factor, or the root of the side if -1."""
    most = math.isqrt(side) if factor == -1 else min(factor, math.isqrt(side))
    first = next(number for number in range(most, 0, -1) if side % number == 0)
    return first, side // first
