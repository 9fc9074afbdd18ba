"""The optimizers, each a settings class with a `build` method; the union at the foot is the registry."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from anima_train.core.device import DTYPES
from anima_train.core.settings import Settings

Groups = list[dict[str, Any]]
CHUNK = 2**24  # elements updated at once; half a GB of temporary float32 tensors
Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamSettings(Settings):
    """The settings of the Adam family."""

    lr: float = Field(ge=0)
    """Peak learning rate of every component that has none of its own in [model].
    Style LoRA: 2e-5 to 5e-5; full fine-tune: 1e-6 to 1e-5."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay (times lr, per step). Never on norms, biases and embeddings."""
    betas: list[Beta] = Field(default=[0.9, 0.99], min_length=2, max_length=2)
    """Decay of the running means of gradient and squared gradient, each in [0, 1)."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""

    @property
    def beta_pair(self) -> tuple[float, float]:
        """The betas in the form that torch wants."""
        return self.betas[0], self.betas[1]

    def build(self, groups: Groups) -> Optimizer:
        """Return the torch optimizer over these parameter groups."""
        raise NotImplementedError

    def torch_adamw(self, groups: Groups) -> Optimizer:
        """Return torch's AdamW with these settings."""
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.beta_pair, eps=self.eps, fused=can_fuse(groups))


class AdamW(AdamSettings):
    """torch's AdamW; the fused kernel where the device has one."""

    type: Literal["adamw"] = "adamw"

    def build(self, groups: Groups) -> Optimizer:
        return self.torch_adamw(groups)


class AdamWKahan(AdamSettings):
    """AdamW whose bf16 weights lose no small update, which is what Kahan summation is for. The recipe of the model's
    author."""

    type: Literal["adamw_optimi"] = "adamw_optimi"
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the running means. "bfloat16" saves 4 bytes per trained parameter (8 GB for the whole model), but where
    gradients are steady updates get 10 % too large, 45 % with a second beta of 0.999."""

    def build(self, groups: Groups) -> Optimizer:
        dtypes = {parameter.dtype for group in groups for parameter in group["params"]}
        if dtypes == {torch.float32} and self.moments_dtype == "float32":
            return self.torch_adamw(groups)
        return KahanAdamW(groups, self.lr, self.beta_pair, self.eps, moments_dtype=DTYPES[self.moments_dtype])


def can_fuse(groups: Groups) -> bool:
    """Return True if torch's fused AdamW runs for all these parameters."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    devices = {parameter.device.type for parameter in parameters}
    return devices <= {"cuda", "cpu", "xpu", "mps"} and all(parameter.is_floating_point() for parameter in parameters)


class KahanAdamW(Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) with Kahan summation: bf16 parameters lose no small update.

    The part of a weight that rounding to bf16 cuts off is kept and added to the next update (Kahan 1965). This
    compensation is held exactly, as the 16 bits by which float32 is longer than bf16, so that the result is that of
    float32 training. Kept in bf16, for the same memory, it would lose most of updates of 2e-6 to a weight of 1.

    Bytes per bf16 parameter: 2 for the compensation, and 8 for the moments in float32 or 4 in bfloat16.
    """

    def __init__(
        self,
        params: Groups,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        moments_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.moments_dtype = moments_dtype
        self.ages: dict[nn.Parameter, int] = {}  # equal numbers: equal steps, without a look at the device
        self.num_calls = 0
        self._step_supports_amp_scaling = True  # torch's name: `found_inf` is heeded, see `optim.skipping`

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; the device does nothing if its attribute `found_inf` is 1."""
        loss = None if closure is None else closure()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        skips = None if found_inf is None else found_inf == 1
        self.num_calls += 1
        for group in self.param_groups:
            for parameters in self.chunks(group["params"]):
                self.update(parameters, group, skips)
        return loss

    def chunks(self, parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """Yield parameters of one kind and age, about `CHUNK` elements together: a LoRA has a thousand small ones."""
        chunk: list[nn.Parameter] = []
        kind: tuple[Any, ...] = ()
        size = 0
        for parameter in parameters:
            if parameter.grad is None:
                continue
            if not self.state[parameter]:
                self.start(parameter)
            # Of those that began with one step, only those that took part in the same calls have one step still.
            self.ages[parameter] = hash((self.ages.get(parameter, 0), self.num_calls))
            this_kind = (parameter.dtype, parameter.device, self.ages[parameter])
            if chunk and (this_kind != kind or size + parameter.numel() > CHUNK):
                yield chunk
                chunk, size = [], 0
            kind = this_kind
            chunk.append(parameter)
            size += parameter.numel()
        if chunk:
            yield chunk

    def start(self, parameter: nn.Parameter) -> None:
        """Make the state of a parameter that was never updated."""
        state = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter, dtype=self.moments_dtype)
        state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self.moments_dtype)
        if parameter.dtype == torch.bfloat16:
            state["compensation"] = torch.zeros_like(parameter, dtype=torch.int16)

    def update(self, parameters: Sequence[nn.Parameter], group: dict[str, Any], skips: Tensor | None) -> None:
        """Update parameters of one kind, in float32, as one flat tensor: few kernels for many parameters."""
        states = [self.state[parameter] for parameter in parameters]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        if skips is not None:
            torch._foreach_sub_(steps, [skips.float()] * len(steps))  # a list: one tensor would be read as a number
        step, (beta1, beta2) = steps[0], group["betas"]
        gradient = flat([parameter.grad for parameter in parameters if parameter.grad is not None]).float()
        mean = flat([state["exp_avg"] for state in states]).float().lerp_(gradient, 1 - beta1)
        square = flat([state["exp_avg_sq"] for state in states]).float().mul_(beta2)
        square.addcmul_(gradient, gradient, value=1 - beta2)
        store(mean, [state["exp_avg"] for state in states], skips)
        store(square, [state["exp_avg_sq"] for state in states], skips)

        weight = flat(parameters)
        compensated = weight.dtype == torch.bfloat16
        if compensated:
            weight = join_halves(weight, flat([state["compensation"] for state in states]))
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        denominator = square.div_(bias_correction(beta2, step)).sqrt_().add_(group["eps"])
        weight.addcdiv_(mean.mul_(-group["lr"] / bias_correction(beta1, step)), denominator)
        store(weight, parameters, skips)
        if compensated:
            store(lower_half(weight), [state["compensation"] for state in states], skips)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put a state back as it is; torch would convert all of it to the parameters' dtype."""
        super().load_state_dict(state_dict)
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            state = state_dict["state"].get(index, {})
            for name, value in state.items():
                self.state[parameter][name] = value.to(device=parameter.device, copy=True)
            self.ages[parameter] = hash((int(state.get("step", 0)), -1))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors' elements in one flat tensor, a copy."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def store(values: Tensor, targets: Sequence[Tensor], skips: Tensor | None) -> None:
    """Put the elements of a flat tensor back into the tensors they belong to, converted to their dtype.

    Args:
        values: all elements.
        targets: of one dtype.
        skips: if it is True, every target stays as it is.
    """
    if skips is not None and len(targets) == 1:  # large: in one pass over the memory
        torch.where(skips, targets[0], values.view_as(targets[0]).to(targets[0].dtype), out=targets[0])
        return
    if skips is not None:  # small: in few kernels
        values = torch.where(skips, flat(targets), values.to(targets[0].dtype))
    parts = values.split([target.numel() for target in targets])
    torch._foreach_copy_(list(targets), [part.view_as(target) for part, target in zip(parts, targets, strict=True)])


def bias_correction(beta: float, step: Tensor) -> Tensor:
    """Return `1 - beta^step`, in float64 where the device has it."""
    return 1 - beta ** step.to(torch.float32 if step.device.type == "mps" else torch.float64)


def lower_half(weight: Tensor) -> Tensor:
    """Return the part that rounding a float32 tensor to bfloat16 cuts off, as int16 in units of its last bit."""
    upper = weight.bfloat16().view(torch.int16).int() << 16
    # A tie rounded down leaves 2**15, one more than fits; the last bit of a float32 is given up there.
    return (weight.view(torch.int32) - upper).clamp_(max=2**15 - 1).to(torch.int16)


def join_halves(upper: Tensor, lower: Tensor) -> Tensor:
    """Return the float32 tensor whose bfloat16 rounding is `upper`, and whose `lower_half` is `lower`."""
    return ((upper.view(torch.int16).int() << 16) + lower).view(torch.float32)


AnyOptimizer = Annotated[AdamW | AdamWKahan, Field(discriminator="type")]
