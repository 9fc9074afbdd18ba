"""One step's loss: training and evaluation call the same function; a step's sums are those of all its micro-batches."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from anima_train.data.loader import Batch
from anima_train.objective.timesteps import T_BINS

ROLES = ("train", "regularization")


@dataclass(frozen=True)
class StepLosses:
    """A step's mean losses over all processes; what has no sample is absent."""

    loss: float
    by_role: dict[str, float]
    by_t: list[tuple[int, float, int]]  # (range of t, mean, number of samples)


class StepSums:
    """Sums of a step's losses: they stay on the device until those of all processes are added up, all at once."""

    def __init__(self, device: torch.device, has_roles: bool) -> None:
        self.has_roles = has_roles
        self.sums = torch.zeros(1 + 2 * len(ROLES) + 2 * T_BINS, device=device)
        loss, roles, ranges = self.sums.split([1, 2 * len(ROLES), 2 * T_BINS])
        self.loss, self.roles, self.ranges = loss, roles.view(-1, 2), ranges.view(-1, 2)  # the others: (sum, number)

    def add(self, share: Float[Tensor, ""], losses: Float[Tensor, " B"], batch: Batch, is_padding: bool) -> None:
        """Add a micro-batch.

        Args:
            share: its part of the step's loss.
            losses: of its samples.
            batch: the samples.
            is_padding: True if they repeat samples of the step, only to keep this process in step.
        """
        self.loss += share.detach()
        if is_padding:
            return
        device = self.sums.device
        values = torch.stack([losses.detach(), torch.ones_like(losses)], dim=1)
        self.ranges.index_add_(0, (batch.t * T_BINS).long().clamp(0, T_BINS - 1).to(device), values)
        if self.has_roles:
            self.roles.index_add_(0, torch.tensor(batch.is_regularization, device=device).long(), values)

    def take(self, accelerator: Accelerator) -> StepLosses:
        """The step's losses over all processes, which all call this; the sums begin anew."""
        loss, *values = accelerator.reduce(self.sums, "sum").tolist()
        self.sums.zero_()
        pairs = list(zip(values[::2], values[1::2], strict=True))
        roles, ranges = pairs[: len(ROLES)], pairs[len(ROLES) :]
        by_role = {role: total / number for role, (total, number) in zip(ROLES, roles, strict=True) if number}
        by_t = [(place, total / number, int(number)) for place, (total, number) in enumerate(ranges) if number]
        return StepLosses(loss, by_role, by_t)
