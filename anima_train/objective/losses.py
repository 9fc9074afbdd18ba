"""Losses between predicted and true velocity, in float32, one number per sample."""

import math
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LATENT_PIXELS = 8  # image pixels per latent pixel and side
MULTISCALE_SIDE = 0.9 * 1024  # image pixels; smaller images have no coarse term

Kind = Literal["mse", "huber", "smooth_l1", "pseudo_huber"]


@dataclass(frozen=True)
class Loss:
    """The loss of a run.

    `parameter` is delta of huber (torch's `huber_loss`), beta of smooth_l1 (torch's `smooth_l1_loss`) and c of
    pseudo_huber, `sqrt(d^2 + c^2) - c`. `multiscale_weight` w adds w times the MSE of the 2x2 averages, and divides by
    1 + w, for images of at least 0.9 * 1024 pixels a side (geometric mean).
    """

    kind: Kind = "mse"
    parameter: float = 0.0
    multiscale_weight: float | None = None

    def __call__(
        self,
        prediction: Float[Tensor, "B C 1 H W"],
        target: Float[Tensor, "B C 1 H W"],
        mask: Float[Tensor, "B 1 1 H W"] | None = None,
    ) -> Float[Tensor, " B"]:
        """The mean over each sample's elements, the mask (0 to 1) multiplied in before."""
        prediction, target = prediction.float(), target.float()
        loss = masked_mean(self.elements(prediction, target), mask)
        height, width = target.shape[-2:]
        if self.multiscale_weight is None or math.sqrt(height * width) * LATENT_PIXELS < MULTISCALE_SIDE:
            return loss
        coarse_mask = None if mask is None else halve(mask)
        coarse = masked_mean((halve(prediction) - halve(target)).square(), coarse_mask)
        return (loss + self.multiscale_weight * coarse) / (1 + self.multiscale_weight)

    def elements(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss of each element."""
        if self.kind == "huber":
            return F.huber_loss(prediction, target, reduction="none", delta=self.parameter)
        if self.kind == "smooth_l1":
            return F.smooth_l1_loss(prediction, target, reduction="none", beta=self.parameter)
        squared = (prediction - target).square()
        if self.kind == "pseudo_huber":
            return (squared + self.parameter**2).sqrt() - self.parameter
        return squared


def masked_mean(elements: Tensor, mask: Tensor | None) -> Tensor:
    """Multiply by the mask and average over everything but the batch."""
    if mask is not None:
        elements = elements * mask
    return elements.flatten(1).mean(dim=1)


def halve(x: Float[Tensor, "B C 1 H W"]) -> Float[Tensor, "B C 1 H/2 W/2"]:
    """Average 2x2 neighbours."""
    return F.avg_pool2d(x.squeeze(2), 2).unsqueeze(2)
