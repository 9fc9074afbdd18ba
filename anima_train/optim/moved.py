"""The share of the trained weights that updates have changed: bfloat16 weights may be rounded back each time."""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from anima_train.model.block_swap import BlockSwap
from anima_train.optim.moments import local

NUM_TENSORS = 16  # that the sample is from
NUM_EACH = 4096  # weights of each, less than twice that
MAX_SAMPLE = 2 * NUM_EACH * NUM_TENSORS


class MovedShare:
    """Counts which weights of a sample have other bits than before. Nothing waits for the device.

    A weight has moved in an update also where only the part has that Kahan summation keeps beside it; since the start
    of the run it has moved where the weight itself is another one. The sample is taken when this is made, from weights
    as they were before the first step, so that a resumed run counts as one that was not stopped.

    Args:
        optimizer: of the weights.
        swap: blocks whose weights are not all on the device; they are left out. The shares are NaN where nothing else
            trains.
    """

    def __init__(self, optimizer: Optimizer, swap: BlockSwap | None = None) -> None:
        self.optimizer = optimizer
        swapped = set() if swap is None else {each for parameters in swap.trained for each in parameters}
        everything = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        parameters = [parameter for parameter in everything if parameter not in swapped]
        self.sample = parameters[:: max(1, -(-len(parameters) // NUM_TENSORS))]
        self.nothing = everything[0].new_empty(0)
        self.first: Tensor | None = self.weights()
        self.last: tuple[Tensor, Tensor] | None = None

    def slices(self, compensations: bool) -> Iterator[Tensor]:
        """Yield evenly spaced elements of each tensor of the sample, or of what is kept beside it."""
        for parameter in self.sample:
            weights = local(parameter.detach()).reshape(-1)
            step = max(1, weights.numel() // NUM_EACH)
            if not compensations:
                yield weights[::step].float()
            elif parameter in self.optimizer.state and "compensation" in self.optimizer.state[parameter]:
                yield local(self.optimizer.state[parameter]["compensation"]).reshape(-1)[::step]
            else:
                yield torch.zeros_like(weights[::step], dtype=torch.int16)

    def weights(self) -> Tensor:
        """Return the weights of the sample, in float32."""
        return torch.cat([self.nothing.float(), *self.slices(compensations=False)])

    def now(self) -> tuple[Tensor, Tensor]:
        """Return the weights of the sample, and what is kept beside them."""
        return self.weights(), torch.cat([self.nothing.to(torch.int16), *self.slices(compensations=True)])

    def begin_at(self, first: Tensor | None) -> None:
        """Count from these weights, of the same sample, instead; None: they are not known, and that share is NaN."""
        self.first = None if first is None else first.to(self.nothing.device)

    def before_update(self) -> None:
        """Note the weights, where they may be others than after the last update."""
        if self.last is None:
            self.last = self.now()

    def after_update(self) -> Float[Tensor, "2"]:
        """Return the shares that have moved: in this update, and since the start of the run."""
        last, now = self.last or self.now(), self.now()
        self.last = now
        in_update = ((now[0] != last[0]) | (now[1] != last[1])).float()
        in_run = torch.full_like(in_update, math.nan) if self.first is None else (now[0] != self.first).float()
        return torch.stack((in_update, in_run)).mean(dim=1)
