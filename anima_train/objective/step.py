"""The loss of a batch: training and evaluation call the same function."""

from jaxtyping import Float
from torch import Tensor, nn

from anima_train.data.loader import Batch
from anima_train.objective.flow import add_noise, velocity_target
from anima_train.objective.losses import Loss


def compute_loss(transformer: nn.Module, batch: Batch, loss: Loss) -> Float[Tensor, " B"]:
    """Return the loss of each sample of a batch: add noise, predict the velocity, compare in float32."""
    noisy = add_noise(batch.latents, batch.noise, batch.t)
    velocity = transformer(noisy, batch.t[:, None], batch.text)
    return loss(velocity, velocity_target(batch.latents, batch.noise), batch.mask)
