"""Optimizers, each a settings class with a `build` method; the union at the foot is the registry."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from anima_train.core.settings import Settings

Groups = list[dict[str, Any]]


class OptimizerSettings(Settings):
    """What every optimizer has."""

    lr: float = Field(ge=0)
    """Peak learning rate of every component that has none of its own in [model].
    Style LoRA: 2e-5 to 5e-5; full fine-tune: 1e-6 to 1e-5."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay (times lr, per step). Never on norms, biases and embeddings."""

    def build(self, groups: Groups) -> Optimizer:
        """The torch optimizer over these parameter groups."""
        raise NotImplementedError


class AdamSettings(OptimizerSettings):
    """What the Adam family has."""

    betas: list[float] = Field(default=[0.9, 0.99], min_length=2, max_length=2)
    """Decay of the running means of gradient and squared gradient, each in [0, 1)."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""

    def model_post_init(self, context: Any) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: each must be at least 0 and below 1, found {self.betas}")

    @property
    def beta_pair(self) -> tuple[float, float]:
        """The betas as torch wants them."""
        return self.betas[0], self.betas[1]


class AdamW(AdamSettings):
    """torch's AdamW; the fused kernel where the device has one."""

    type: Literal["adamw"] = "adamw"

    def build(self, groups: Groups) -> Optimizer:
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.beta_pair, eps=self.eps, fused=can_fuse(groups))


class AdamWKahan(AdamSettings):
    """AdamW with Kahan summation: bf16 weights lose no small update. The recipe of the model's author."""

    type: Literal["adamw_optimi"] = "adamw_optimi"

    def build(self, groups: Groups) -> Optimizer:
        return KahanAdamW(groups, lr=self.lr, betas=self.beta_pair, eps=self.eps)


def can_fuse(groups: Groups) -> bool:
    """Whether torch's fused AdamW runs for all these parameters."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    devices = {parameter.device.type for parameter in parameters}
    return devices <= {"cuda", "cpu", "xpu", "mps"} and all(parameter.is_floating_point() for parameter in parameters)


class KahanAdamW(Optimizer):
    """AdamW whose bf16 (and fp16) parameters carry the rounding error of each update to the next.

    The update is computed in float32 from moments kept in the parameter's dtype. Kahan (1965) summation: what an
    addition to a 16-bit weight loses is kept beside it and added to the next update, so that updates smaller than
    half a unit in the last place are not lost. float32 parameters need none and get plain AdamW.
    """

    def __init__(
        self, params: Groups, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad, group)
        return loss

    def update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """One update of one parameter."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            if parameter.dtype in (torch.bfloat16, torch.float16):
                state["kahan"] = torch.zeros_like(parameter)
        state["step"] += 1
        step = int(state["step"])
        beta1, beta2 = group["betas"]
        gradient = gradient.float()
        exp_avg = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
        exp_avg_sq = state["exp_avg_sq"].float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        state["exp_avg"].copy_(exp_avg)
        state["exp_avg_sq"].copy_(exp_avg_sq)
        denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(group["eps"])
        delta = exp_avg.div_(1 - beta1**step).div_(denominator).mul_(-group["lr"])
        delta.add_(parameter.float(), alpha=-group["lr"] * group["weight_decay"])
        if "kahan" not in state:
            parameter.add_(delta)
            return
        delta.add_(state["kahan"].float())
        before = parameter.float()
        parameter.copy_(before + delta)
        state["kahan"].copy_(delta.sub_(parameter.float().sub_(before)))


AnyOptimizer = Annotated[AdamW | AdamWKahan, Field(discriminator="type")]
