"""Full fine-tuning: the adapter that adds nothing, and trains the weights themselves."""

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import model_validator
from torch import Tensor

from anima_train.adapters.names import checkpoint_key
from anima_train.core.settings import Settings
from anima_train.model.dit import MiniTrainDIT
from anima_train.optim.groups import Component, LearningRates


class Full(Settings):
    """The training of every weight of the transformer, and of the LLM adapter unless its lr is 0."""

    leaves_base: ClassVar[bool] = False
    is_plain: ClassVar[bool] = False  # no LoRA
    masks_ranks: ClassVar[bool] = False
    zero_factors: ClassVar[tuple[str, ...]] = ()
    type: Literal["full"] = "full"

    @model_validator(mode="before")
    @classmethod
    def begins_with_a_model(cls, data: Any) -> Any:
        """Refuse the LoRA that only a LoRA can begin with, with the way to begin otherwise."""
        if isinstance(data, dict) and data.get("init_from_existing"):
            raise ValueError(
                "init_from_existing is a LoRA, with which the training of a whole model cannot begin; give the model "
                'to begin with as transformer_path, in [model], or write type = "lora"'
            )
        return data if not isinstance(data, dict) else {k: v for k, v in data.items() if k != "init_from_existing"}

    def learning_rates(self, by_component: Mapping[Component, float]) -> LearningRates:
        """Return the learning rates of the parameters."""
        return LearningRates(by_component)

    def attach(self, transformer: MiniTrainDIT, rates: LearningRates, seed: int) -> None:
        """Mark every parameter whose component is not frozen as trainable."""
        for name, parameter in transformer.named_parameters():
            parameter.requires_grad_(not rates.is_frozen(name))

    def as_base(self, transformer: MiniTrainDIT) -> contextlib.AbstractContextManager[None]:
        """Leave the transformer as it is: the base model is no longer in memory."""
        return contextlib.nullcontext()

    def tensors(self, transformer: MiniTrainDIT) -> dict[str, Tensor]:
        """Return every parameter under its checkpoint key; the caller adds an LLM adapter that was not in memory."""
        return {checkpoint_key(name): weight for name, weight in transformer.weights().items()}

    def outside(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights that were not in memory, given by their names in the transformer, under checkpoint keys."""
        return {checkpoint_key(name): tensor for name, tensor in tensors.items()}

    def is_without_effect(self, tensors: Iterable[tuple[str, Tensor]]) -> bool:
        """Return False: the file is a whole model."""
        return False

    def metadata(self) -> dict[str, str]:
        """Return the metadata that file managers read of an adapter: none."""
        return {}
