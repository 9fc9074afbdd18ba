"""The loss of a batch: training and evaluation call the same function."""

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
    """Return the loss of each sample of a batch: add noise, predict the velocity, compare in float32."""
    return loss(predict(transformer, batch), velocity_target(batch.latents, batch.noise), batch.mask)
