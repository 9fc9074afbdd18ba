"""The part of an adapter that all share which are added to linears, whose own weights stay as they are."""

import contextlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from anima_train.adapters.selection import Patterns, Selection, of_pattern
from anima_train.core.device import DTYPES
from anima_train.model.dit import MiniTrainDIT
from anima_train.model.lora_linear import AdaptedLinear
from anima_train.optim.groups import Component, LearningRates

AtLeast1 = Annotated[int, Field(ge=1)]
Above0 = Annotated[float, Field(gt=0)]
TOLD_ELSEWHERE = {"type", "rank", "alpha", "dropout", "dtype", "init_from_existing"}  # or without effect on the file
DYNAMIC = "Dynamic"  # kohya's word in `ss_network_dim` where modules differ


class Addition(Selection):
    """Updates of the linears in the blocks; the base weights stay as they are."""

    leaves_base: ClassVar[bool] = True
    lycoris: ClassVar[str | None] = None  # its name in LyCORIS, whose files managers know
    rank: int = Field(default=32, ge=1)
    """Width of the update. 16 to 32 for a style or a character; more learns, and forgets, more."""
    alpha: float | None = Field(default=None, gt=0)
    """The update is scaled by alpha / rank; absent: alpha = rank, scale 1. Folded into the saved file."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of each update's inputs set to zero in training; never in evaluation."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Of the trained weights. bfloat16 halves their memory and wants optimizer type "adamw_optimi"."""
    rank_pattern: dict[str, AtLeast1] = Field(default={})
    """Ranks of linears by a regular expression over their full names, such as { ".*[.]mlp[.].*" = 64 }; the first that
    matches counts, and rank holds for the others."""
    alpha_pattern: dict[str, Above0] = Field(default={})
    """The same for alpha."""

    @property
    def patterns(self) -> Mapping[str, Patterns]:
        """The expressions of each key that have to match one of the linears chosen."""
        return {**super().patterns, "rank_pattern": list(self.rank_pattern), "alpha_pattern": list(self.alpha_pattern)}

    def rank_of(self, name: str) -> int:
        """Return the rank of a linear, by its full name."""
        found = of_pattern(self.rank_pattern, name)
        return self.rank if found is None else int(found)

    def scale_of(self, name: str) -> float:
        """Return the factor on the update of a linear: alpha / rank."""
        alpha = of_pattern(self.alpha_pattern, name) or self.alpha
        return 1.0 if alpha is None else alpha / self.rank_of(name)

    def attach(self, transformer: MiniTrainDIT, rates: LearningRates, seed: int) -> None:
        """Add the trained weights to every linear that is chosen and not frozen; only they train.

        The model starts as the base. With every component of the blocks frozen nothing is added.

        Raises:
            ConfigError: an expression matches nothing.
        """
        transformer.requires_grad_(False)
        weights = {} if self.reads_base is None else transformer.weights()  # of swapped blocks on the host
        for name in self.selected(transformer, rates):
            base = transformer.get_submodule(name)
            assert isinstance(base, nn.Linear)
            transformer.set_submodule(name, self.layer(name, base, weights.get(f"{name}.weight"), seed))
        transformer.rank_mask = "training" if self.masks_ranks else "none"

    def learning_rates(self, by_component: Mapping[Component, float]) -> LearningRates:
        """Return the learning rates of the trained weights."""
        return LearningRates(by_component, tuple(self.lr_pattern.items()))

    @property
    def reads_base(self) -> str | None:
        """The setting with which the base weights' values are read; None: there is none."""
        return None

    @abstractmethod
    def layer(self, name: str, base: nn.Linear, weight: Tensor | None, seed: int) -> AdaptedLinear:
        """Return a linear with its update, which begins at zero.

        Args:
            name: in the transformer.
            base: the linear without it.
            weight: its weight's values, wherever they are; None: it is quantised.
            seed: of the random ones of its weights.
        """

    @abstractmethod
    def file_tensors(self, name: str, layer: AdaptedLinear, weight: Tensor | None) -> dict[str, Tensor]:
        """Return what a file holds of a linear's update, by full keys.

        Args:
            name: of the linear in the transformer.
            layer: with its update.
            weight: the base's, wherever it is; None: it is quantised.
        """

    @property
    def is_plain(self) -> bool:
        """True if the trained weights are a LoRA's up and down, and no others."""
        return False

    @property
    def masks_ranks(self) -> bool:
        """True if ranks fall with noise in training, and the file acts otherwise."""
        return False

    def made(self, values: Tensor, base: nn.Linear) -> Tensor:
        """Return values in the dtype of the trained weights, where the base is."""
        return values.to(base.weight.device, DTYPES[self.dtype])

    @contextlib.contextmanager
    def as_base(self, transformer: nn.Module) -> Iterator[None]:
        """Make the transformer the base model while this is open: updates are zero, in the same memory."""
        starts = [start for _, layer in adapted_layers(transformer) for start in layer.starts()]
        kept = [parameter.detach().clone() for parameter, _ in starts]
        for parameter, start in starts:
            parameter.detach().zero_() if start is None else parameter.detach().copy_(start)
        try:
            yield
        finally:
            for (parameter, _), values in zip(starts, kept, strict=True):
                parameter.detach().copy_(values)

    def tensors(self, transformer: MiniTrainDIT) -> dict[str, Tensor]:
        """Return the trained weights under their file keys, the scale folded into them so that it is 1 everywhere."""
        tensors: dict[str, Tensor] = {}
        weights = {} if self.reads_base is None else transformer.weights()
        for name, layer in adapted_layers(transformer):
            tensors |= self.file_tensors(name, layer, weights.get(f"{name}.weight"))
        return tensors

    zero_factors: ClassVar[tuple[str, ...]]  # parts of file keys: where all of these are zero, so is the update

    def is_without_effect(self, tensors: Iterable[tuple[str, Tensor]]) -> bool:
        """Return True if a file with these tensors changes nothing: every update is zero, as before training."""
        zero = (bool(tensor.any()) for name, tensor in tensors if name.endswith(self.zero_factors))
        return not any(zero)

    def metadata(self) -> dict[str, str]:
        """Return the metadata that file managers read."""
        # Folded: a reader that scales must scale by 1.
        rank = DYNAMIC if self.rank_pattern else str(self.rank)
        others = self.model_dump(mode="json", exclude_defaults=True, exclude=TOLD_ELSEWHERE)
        if self.lycoris is not None:
            others = {"algo": self.lycoris, **others}
        return {
            **({} if self.lycoris is None else {"ss_network_module": "lycoris.kohya"}),
            "ss_network_dim": rank,
            "ss_network_alpha": rank,
            "ss_network_dropout": str(self.dropout),
            **({"ss_network_args": json.dumps(others)} if others else {}),
        }


def adapted_layers(transformer: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """Yield (full name, module) of every linear that carries an update."""
    for name, module in transformer.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module
