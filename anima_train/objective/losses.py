"""The losses between predicted and true velocity, in float32, one number per sample."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from anima_train.core.shapes import LATENT_PIXELS

MULTISCALE_SIDE = 0.9 * 1024  # image pixels; smaller images have no coarse term

Kind = Literal["mse", "huber", "smooth_l1", "pseudo_huber"]


@dataclass(frozen=True)
class Loss:
    """The loss of a run.

    `parameter` is delta of huber (torch's `huber_loss`), beta of smooth_l1 (torch's `smooth_l1_loss`) and c of
    pseudo_huber, `sqrt(d^2 + c^2) - c`. `multiscale_weight` w adds w times the MSE (whatever the kind) of the 2x2
    averages, and divides by 1 + w, for images of at least 0.9 * 1024 pixels a side (geometric mean). `by_mask_area`
    divides a sample's loss by the mean of its mask.
    """

    kind: Kind = "mse"
    parameter: float = 0.0
    multiscale_weight: float | None = None
    by_mask_area: bool = False

    def __call__(
        self,
        prediction: Float[Tensor, "B C 1 H W"],
        target: Float[Tensor, "B C 1 H W"],
        mask: Float[Tensor, "B 1 1 H W"] | None = None,
    ) -> Float[Tensor, " B"]:
        """Return the mean over each sample's elements, the mask (0 to 1) multiplied in before.

        Args:
            prediction: the model's velocity, in any floating-point dtype; H and W even.
            target: the true velocity.
            mask: 1 where the image counts, 0 where it does not; None: it counts everywhere.
        """
        prediction, target = prediction.float(), target.float()
        loss = masked_mean(self.elements(prediction, target), mask)
        height, width = target.shape[-2:]
        if self.multiscale_weight is not None and math.sqrt(height * width) * LATENT_PIXELS >= MULTISCALE_SIDE:
            coarse = masked_mean(coarse_errors(prediction - target, mask), None)
            loss = (loss + self.multiscale_weight * coarse) / (1 + self.multiscale_weight)
        if self.by_mask_area and mask is not None:
            loss = loss / mask.flatten(1).mean(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        return loss

    def elements(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each element."""
        if self.kind == "huber":
            return F.huber_loss(prediction, target, reduction="none", delta=self.parameter)
        if self.kind == "smooth_l1":
            return F.smooth_l1_loss(prediction, target, reduction="none", beta=self.parameter)
        squared = (prediction - target).square()
        if self.kind == "pseudo_huber":
            # sqrt(d^2 + c^2) - c, written so that small errors do not cancel to nothing.
            return squared / ((squared + self.parameter**2).sqrt() + self.parameter)
        return squared


def masked_mean(elements: Tensor, mask: Tensor | None) -> Tensor:
    """Multiply by the mask, and average over everything but the batch."""
    if mask is not None:
        elements = elements * mask
    return elements.flatten(1).mean(dim=1)


def coarse_errors(difference: Tensor, mask: Tensor | None) -> Tensor:
    """Return the squared 2x2 averages of the difference; under a mask, averages weighted by it, times its own average.

    So the excluded parts have no share in the coarse term either, not even beside included ones.
    """
    if mask is None:
        return downsample_2x(difference).square()
    return downsample_2x(difference * mask).square() / downsample_2x(mask).clamp_min(torch.finfo(torch.float32).tiny)


def downsample_2x(x: Float[Tensor, "B C 1 H W"]) -> Float[Tensor, "B C 1 H/2 W/2"]:
    """Return the averages of 2x2 neighbours."""
    return F.avg_pool2d(x.squeeze(2), 2).unsqueeze(2)
