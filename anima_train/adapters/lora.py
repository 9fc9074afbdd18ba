"""LoRA (Hu et al. 2021, arXiv:2106.09685) on the linears of `Block` and `TransformerBlock`."""

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from anima_train.adapters.addition import Addition
from anima_train.adapters.names import lora_key, module_key
from anima_train.adapters.starts import Init, down_matrix
from anima_train.model.lora_linear import SHORTEST, AdaptedLinear, DoraLinear, LoraLinear
from anima_train.optim.groups import Component, LearningRates


class Lora(Addition):
    """Low-rank updates of the linears in the blocks; the base weights stay as they are."""

    type: Literal["lora"] = "lora"
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of each LoRA input set to zero in training; never in evaluation."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Of the trained LoRA weights. bfloat16 halves their memory and wants optimizer type "adamw_optimi"."""
    init_from_existing: str | None = None
    """A LoRA to begin with: a .safetensors file in the keys of ComfyUI, kohya, diffusers or PEFT, or a folder with one.
    Its rank may be lower than rank, and its alpha another one: the first step computes what `anima sample` draws with
    it. A resumed run has its weights in its training state, and does not read the file. Absent: begin as the base."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv:2312.03732), so that a larger rank does not learn more slowly. Without
    alpha that is sqrt(rank): write alpha = 1 or a small number."""
    b_lr_ratio: float = Field(default=1.0, gt=0)
    """The learning rate of B, in multiples of A's (LoRA+, arXiv:2402.12354): its authors say 16, at a lower learning
    rate; 2 to 4 are careful."""
    init: Init = "kaiming"
    """The A to begin with; B is zero, so the model begins as the base with any. "kaiming": uniform; "orthogonal": its
    rows at right angles; "svd": the leading right singular vectors of each weight, whose inputs it passes on most."""
    use_dora: bool = False
    """Also train the lengths of the rows of the weights (DoRA, arXiv:2402.09353): between a LoRA and a full fine-tune,
    for steps that take longer. Needs the base weights as they are, and is not divided among processes."""
    min_rank: int | None = Field(default=None, ge=1)
    """Train a T-LoRA (arXiv:2507.05964), against learning a few pictures by heart: at noise level t, 1 is noise, only
    the first floor((1 - t)^alpha_rank_scale (rank - min_rank)) + min_rank of the rank's components act, of each linear
    in the transformer; those of the LLM adapter all do. The authors take half of the rank. The file is a plain LoRA,
    which ComfyUI applies whole at every t: evaluations and previews show that, and `loss_as_trained` is the loss with
    the mask. A LoRA of init_from_existing is masked, too. Absent: all components act always."""
    alpha_rank_scale: float = Field(default=1.0, gt=0)
    """The way the rank of a T-LoRA falls with noise: 1 evenly, more than 1 at less noise already, less than 1 later:
    with shift = 3 only one sample in seven has t below 0.5."""
    zero_factors: ClassVar[tuple[str, ...]] = (".lora_B.weight",)

    @field_validator("use_dora")
    @classmethod
    def begins_as_the_base(cls, value: bool, earlier: ValidationInfo) -> bool:
        """Refuse the LoRA to begin with, whose rows have other lengths."""
        if value and earlier.data.get("init_from_existing"):
            raise ValueError("excludes init_from_existing, a LoRA whose rows have other lengths; remove one of them")
        return value

    @field_validator("min_rank")
    @classmethod
    def masks_something(cls, value: int | None, earlier: ValidationInfo) -> int | None:
        """Refuse a rank to fall to that linears do not have, or all have anyway, and lengths of whole updates."""
        if value is None:
            return value
        if earlier.data.get("use_dora"):
            raise ValueError("excludes use_dora, whose rows have the lengths of the whole update; remove one of them")
        rank = max(earlier.data.get("rank", value + 1), *earlier.data.get("rank_pattern", {}).values(), 1)
        if value >= rank:
            raise ValueError(f"is not below the rank, {rank}: write a smaller number, such as half of it")
        return value

    @field_validator("init_from_existing")
    @classmethod
    def or_nothing(cls, value: str | None) -> str | None:
        """Take an empty text, diffusion-pipe's way to say no, as absent."""
        return value or None

    def scale_of(self, name: str) -> float:
        """Return the factor on the update of a linear: alpha / rank, or alpha / sqrt(rank)."""
        scale = super().scale_of(name)
        return scale * math.sqrt(self.rank_of(name)) if self.use_rslora else scale

    def learning_rates(self, by_component: Mapping[Component, float]) -> LearningRates:
        """Return the learning rates of the trained weights, B's in multiples of A's."""
        return LearningRates(by_component, tuple(self.lr_pattern.items()), self.b_lr_ratio)

    @property
    def reads_base(self) -> str | None:
        """The setting with which the base weights' values are read; None: there is none."""
        return "use_dora" if self.use_dora else 'init = "svd"' if self.init == "svd" else None

    @property
    def is_plain(self) -> bool:
        """True if the trained weights are a LoRA's up and down, and no others."""
        return not self.use_dora

    @property
    def masks_ranks(self) -> bool:
        """True if ranks fall with noise in training, and the file acts otherwise."""
        return self.min_rank is not None

    def layer(self, name: str, base: nn.Linear, weight: Tensor | None, seed: int) -> LoraLinear:
        """Return a linear with its LoRA: B is zero."""
        rank = self.rank_of(name)
        shape = torch.empty(base.out_features, base.in_features, device="meta")
        lora_a = self.made(down_matrix(self.init, rank, shape if weight is None else weight, seed, name), base)
        lora_b = self.made(torch.zeros(base.out_features, rank), base)
        if not self.use_dora:
            limits = None
            if self.min_rank is not None:
                limits = rank_limits(rank, self.min_rank, self.alpha_rank_scale).to(base.weight.device)
            return LoraLinear(base, lora_a, lora_b, self.scale_of(name), self.dropout, limits)
        assert weight is not None
        norms = weight.float().norm(dim=1).to(base.weight.device)  # of more digits than bfloat16 has
        return DoraLinear(base, lora_a, lora_b, self.scale_of(name), self.dropout, norms)

    def file_tensors(self, name: str, layer: AdaptedLinear, weight: Tensor | None) -> dict[str, Tensor]:
        """Return A and B, alpha / rank folded into B; of DoRA also the lengths of rows, as ComfyUI reads them."""
        assert isinstance(layer, LoraLinear)
        down, up = layer.lora_A.detach(), layer.lora_B.detach() * layer.scale
        tensors = {lora_key(name, "lora_A"): down, lora_key(name, "lora_B"): up}
        if isinstance(layer, DoraLinear):
            assert weight is not None
            # It divides by ||W||, not by ||W + B A||: what is divided by there is multiplied by here.
            exact = weight.to(down.device).float()
            ratio = exact.norm(dim=1) / (exact + up.float() @ down.float()).norm(dim=1).clamp_min(SHORTEST)
            lengths = layer.lora_magnitude.detach().float() * ratio
            tensors[module_key(name, "dora_scale")] = lengths[:, None]
        return tensors


def rank_limits(rank: int, min_rank: int, alpha_rank_scale: float) -> Float[Tensor, " rank"]:
    """Return the highest noise level at which each component of a T-LoRA acts, 1 for the first `min_rank`.

    Component i, counted from 1, acts while `i <= floor((1 - t)^a (rank - min_rank)) + min_rank`, the rule of the paper
    (arXiv:2507.05964, a = 1) and of its authors' code: while `1 - t >= ((i - min_rank) / (rank - min_rank))^(1 / a)`.
    """
    above = (torch.arange(1, rank + 1, dtype=torch.float64) - min_rank).clamp_min(0)
    return (1 - (above / max(1, rank - min_rank)) ** (1 / alpha_rank_scale)).float()


def lora_layers(transformer: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yield (full name, module) of every linear that carries a LoRA."""
    for name, module in transformer.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module
