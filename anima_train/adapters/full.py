"""Full fine-tuning: the adapter that adds nothing, and trains the weights themselves."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from anima_train.adapters.names import checkpoint_key
from anima_train.core.settings import Settings
from anima_train.model.dit import MiniTrainDIT
from anima_train.optim.groups import LearningRates


class Full(Settings):
    """Train every weight of the transformer, and of the LLM adapter where its lr is not 0."""

    type: Literal["full"] = "full"

    @property
    def compute_dtypes(self) -> set[torch.dtype]:
        """Dtypes of added parameters: none."""
        return set()

    def attach(self, transformer: MiniTrainDIT, rates: LearningRates, seed: int) -> None:
        """Mark every parameter whose component is not frozen as trainable."""
        for name, parameter in transformer.named_parameters():
            parameter.requires_grad_(not rates.frozen(name))

    def tensors(self, transformer: MiniTrainDIT) -> dict[str, Tensor]:
        """Every parameter under its checkpoint key; the caller adds an adapter that was not in memory."""
        return {checkpoint_key(name): parameter.detach() for name, parameter in transformer.named_parameters()}

    def outside(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights that were not in memory, by their names in the transformer, under their checkpoint keys."""
        return {checkpoint_key(name): tensor for name, tensor in tensors.items()}

    def is_without_effect(self, tensors: Mapping[str, Tensor]) -> bool:
        """Never: the file is a whole model."""
        return False

    def metadata(self) -> dict[str, str]:
        """What file managers read."""
        return {"modelspec.architecture": "anima-2b"}
