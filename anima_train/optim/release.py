"""The update as a part of the backward pass: a gradient is freed as soon as it has had its effect."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from anima_train.optim.split import SplitOptimizer


class GradientRelease:
    """Updates each parameter of an optimizer as soon as a backward pass has made its gradient, and frees that.

    Between `begin` and `end` there is one backward pass. In others the gradients are freed without an update.

    Args:
        optimizer: whose parameters are trained.
    """

    def __init__(self, optimizer: SplitOptimizer) -> None:
        self.optimizer = optimizer
        self.skips: Tensor | None = None
        self.square_norm = torch.zeros(())
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(partial(self.update, group))

    def begin(self, skips: Bool[Tensor, ""]) -> None:
        """Have the next backward pass update; where `skips` is True, it changes no bit."""
        self.skips = skips
        self.square_norm = torch.zeros((), device=skips.device)
        self.optimizer.num_calls += 1

    @torch.no_grad()
    def update(self, group: dict[str, Any], parameter: nn.Parameter) -> None:
        """Update a parameter, unless its gradient or one before it in this pass is not finite."""
        gradient = parameter.grad
        if self.skips is not None and gradient is not None:
            square = torch.linalg.vector_norm(gradient, dtype=torch.float32).square()
            self.square_norm += square
            self.skips = self.skips | ~square.isfinite()
            self.optimizer.step_one(parameter, group, self.skips)
        parameter.grad = None

    def end(self) -> Float[Tensor, ""]:
        """Return the norm of all gradients of the backward pass."""
        self.skips = None
        return self.square_norm.sqrt()
