"""The loss of a batch: training and evaluation call the same function."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anima_train.data.loader import Batch
from anima_train.objective.flow import add_noise, velocity_target
from anima_train.objective.losses import Loss


def predict(transformer: nn.Module, batch: Batch) -> Float[Tensor, "B C 1 H W"]:
    """Return the velocity that the transformer predicts for each sample of a batch, noise added."""
    velocity: Tensor = transformer(add_noise(batch.latents, batch.noise, batch.t), batch.t[:, None], batch.text)
    return velocity


def compute_loss(transformer: nn.Module, batch: Batch, loss: Loss) -> Float[Tensor, " B"]:
    """Return the loss of each sample of a batch: add noise, predict the velocity, compare in float32.

    The target is the true velocity, and that of the base model for preserved samples.
    """
    target = velocity_target(batch.latents, batch.noise)
    if batch.preserved is not None and batch.base_velocity is not None:
        target = target.index_copy(0, batch.preserved, batch.base_velocity.to(target.dtype))
    return loss(predict(transformer, batch), target, batch.mask)


@torch.no_grad()
def with_base_velocity(
    transformer: nn.Module, batch: Batch, as_base: Callable[[], AbstractContextManager[None]]
) -> Batch:
    """Return the batch with the base model's velocity for its preserved samples, on the same noise.

    Args:
        transformer: in training.
        batch: with preserved samples, on the device.
        as_base: makes the transformer the base model while its context is open.
    """
    assert batch.preserved is not None
    part = batch if len(batch.preserved) == batch.size else batch.at(batch.preserved)
    with as_base():
        return replace(batch, base_velocity=predict(transformer, part))
