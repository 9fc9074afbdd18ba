"""The optimizers, each a settings class with a `build` method; the union at the foot is the registry."""

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field
from torch.optim import Optimizer

from anima_train.core.settings import Settings
from anima_train.optim.moments import MomentsDtype
from anima_train.optim.rules import KahanAdamW, ScheduleFreeAdamW, SplitAdafactor, SplitLion, SplitMuon
from anima_train.optim.split import Groups, Rounding, Storage

Beta = Annotated[float, Field(ge=0, lt=1)]
SCHEDULE_FREE = ("schedule_free", "prodigy")  # their types: what is saved is an average that they keep


class OptimizerSettings(Settings):
    """The settings of all optimizers."""

    library: ClassVar[tuple[str, str] | None] = None  # that has to be installed: module, package

    lr: float = Field(ge=0)
    """Peak learning rate of every component that has none of its own in [model].
    Style LoRA: 2e-5 to 5e-5; full fine-tune: 1e-6 to 1e-5."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay (times lr, per step). Never on norms, biases and embeddings."""

    def build(self, groups: Groups, seed: int = 0) -> Optimizer:
        """Return the torch optimizer over these parameter groups.

        Args:
            groups: as `optimizer_groups` makes them.
            seed: of stochastic rounding.
        """
        raise NotImplementedError

    @property
    def needs_library(self) -> tuple[str, str] | None:
        """The module that has to be installed, and the package that has it; None if all is there."""
        return self.library

    @property
    def state_on_host(self) -> bool:
        """True if the running means wait in the host's memory."""
        return False

    @property
    def releases_gradients(self) -> bool:
        """True if the update is part of the backward pass."""
        return False


class AdamSettings(OptimizerSettings):
    """The settings of the Adam family."""

    betas: list[Beta] = Field(default=[0.9, 0.99], min_length=2, max_length=2)
    """Decay of the running means of gradient and squared gradient, each in [0, 1)."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""

    @property
    def beta_pair(self) -> tuple[float, float]:
        """The betas in the form that torch wants."""
        return self.betas[0], self.betas[1]

    def torch_adamw(self, groups: Groups) -> Optimizer:
        """Return torch's AdamW with these settings."""
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.beta_pair, eps=self.eps, fused=can_fuse(groups))


class SplitSettings(OptimizerSettings):
    """The settings of our own optimizers, which compute in float32 whatever the weights are."""

    rounding: Rounding = "kahan"
    """The rounding of bfloat16 weights. "kahan" keeps what is cut off, in 2 more bytes per weight, and equals float32
    training; "stochastic" keeps nothing, and rounds up or down at random so that the mean is right: noisier."""
    gradient_release: bool = False
    """Update each weight in the backward pass as soon as its gradient is there, and free that: no more than one block's
    gradients are in memory. Excludes gradient_clipping, gradient_accumulation_steps and several processes. A step whose
    gradient is not finite is skipped from there on, not as a whole."""

    @property
    def releases_gradients(self) -> bool:
        return self.gradient_release

    def storage(self, seed: int) -> Storage:
        """Return the form in which weights and moments are kept."""
        return Storage(self.rounding, seed=seed)


class HostSettings(SplitSettings):
    """The settings of those whose running means may wait in the host's memory."""

    moments_device: Literal["training", "cpu"] = "training"
    """The place of the running means between updates. "cpu": the host's memory, pinned; each update copies them there
    and back (for the whole model 31 GB a step in float32, 8 in 8 bits)."""

    @property
    def state_on_host(self) -> bool:
        return self.moments_device == "cpu"


class AdamW(AdamSettings):
    """torch's AdamW; the fused kernel where the device has one. For float32 weights: it rounds bfloat16 ones after each
    update, and small updates are lost."""

    type: Literal["adamw"] = "adamw"

    def build(self, groups: Groups, seed: int = 0) -> Optimizer:
        return self.torch_adamw(groups)


class AdamWKahan(AdamSettings, HostSettings):
    """AdamW whose bf16 weights lose no small update, which is what Kahan summation is for. The recipe of the model's
    author."""

    type: Literal["adamw_optimi"] = "adamw_optimi"
    moments_dtype: MomentsDtype = "float32"
    """Of the running means. "bfloat16" saves 4 bytes per trained parameter (8 GB for the whole model), but where
    gradients are steady updates get 10 % too large, 45 % with a second beta of 0.999. "8bit" saves 6, in blocks of 256
    with a scale each, and needs bitsandbytes."""

    def build(self, groups: Groups, seed: int = 0) -> Optimizer:
        dtypes = {parameter.dtype for group in groups for parameter in group["params"]}
        own = self.gradient_release or self.state_on_host or self.moments_dtype != "float32"
        if dtypes == {torch.float32} and not own:
            return self.torch_adamw(groups)
        return KahanAdamW(groups, self.lr, self.beta_pair, self.eps, storage=self.storage(seed))

    def storage(self, seed: int) -> Storage:
        return Storage(self.rounding, self.moments_dtype, self.state_on_host, seed)

    @property
    def needs_library(self) -> tuple[str, str] | None:
        return AdamW8bit.library if self.moments_dtype == "8bit" else None


class AdamW8bit(AdamSettings, HostSettings):
    """AdamW with running means in 8 bits, by bitsandbytes: adamw_optimi with moments_dtype = "8bit". For a full
    fine-tune; an adapter gains little, and its many small tensors take long."""

    library = ("bitsandbytes", "bitsandbytes")

    type: Literal["adamw8bit"] = "adamw8bit"

    def build(self, groups: Groups, seed: int = 0) -> Optimizer:
        return KahanAdamW(groups, self.lr, self.beta_pair, self.eps, storage=self.storage(seed))

    def storage(self, seed: int) -> Storage:
        return Storage(self.rounding, "8bit", self.state_on_host, seed)


class Lion(SplitSettings):
    """Lion: the sign of a running mean, which takes half of AdamW's memory. Its lr is 3 to 10 times smaller than
    AdamW's, its weight_decay as many times larger."""

    type: Literal["lion"] = "lion"
    betas: list[Beta] = Field(default=[0.9, 0.99], min_length=2, max_length=2)
    """Weight of the running mean in the update, and its decay, each in [0, 1)."""

    def build(self, groups: Groups, seed: int = 0) -> Optimizer:
        return SplitLion(groups, self.lr, (self.betas[0], self.betas[1]), self.storage(seed))


class Adafactor(SplitSettings):
    """Adafactor with the lr that is given: the squared gradient of a matrix is kept as a number a row and column, so
    that there is next to no state."""

    type: Literal["adafactor"] = "adafactor"
    eps: list[Annotated[float, Field(gt=0)]] = Field(default=[1e-30, 1e-3], min_length=2, max_length=2)
    """Added to the squared gradient; smallest size of a weight for scale_parameter."""
    clip_threshold: float = Field(default=1.0, gt=0)
    """Largest root mean square of a parameter's update, before lr."""
    decay_rate: float = Field(default=-0.8, lt=0)
    """Power of the step, which is the share that a step has in the running means."""
    scale_parameter: bool = False
    """Multiply lr by the root mean square of the weight, as in the paper. Not for adapters, which begin with zeros."""

    def build(self, groups: Groups, seed: int = 0) -> Optimizer:
        eps = (self.eps[0], self.eps[1])
        return SplitAdafactor(
            groups, self.lr, eps, self.clip_threshold, self.decay_rate, self.scale_parameter, self.storage(seed)
        )


class Muon(AdamSettings, SplitSettings):
    """Muon for the matrices of the blocks and of a LoRA, AdamW for the rest. Updates are scaled to the size of AdamW's,
    so that its lr and weight_decay fit."""

    type: Literal["muon"] = "muon"
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the running mean of a matrix's gradient; betas and eps are of AdamW, for the rest."""

    def build(self, groups: Groups, seed: int = 0) -> Optimizer:
        return SplitMuon(groups, self.lr, self.momentum, self.beta_pair, self.eps, self.storage(seed))


class ScheduleFree(AdamSettings):
    """Schedule-free AdamW: an average of the weights takes the place of a schedule. What is saved, evaluated and drawn
    is the average. Keep lr_scheduler constant, with warmup_steps; lr may be larger than AdamW's (2 to 10 times)."""

    type: Literal["schedule_free"] = "schedule_free"
    betas: list[Annotated[float, Field(gt=0, lt=1)]] = Field(default=[0.9, 0.99], min_length=2, max_length=2)
    """Weight of the average in the weights that train (0.9 to 0.98), and decay of the squared gradient; each in
    (0, 1)."""

    def build(self, groups: Groups, seed: int = 0) -> Optimizer:
        return ScheduleFreeAdamW(groups, self.lr, self.beta_pair, self.eps, Storage())


class Prodigy(OptimizerSettings):
    """Prodigy with schedule-free averaging, by prodigy-plus-schedule-free: it finds the learning rate by itself. What
    is saved, evaluated and drawn is the average. Keep lr_scheduler constant, and gradient_clipping 0. bfloat16 weights
    are rounded at random. The rate in effect is `effective_lr` in the metrics. Each step waits for the device three
    times more than with the others."""

    library = ("prodigyplus", "prodigy-plus-schedule-free")

    type: Literal["prodigy"] = "prodigy"
    lr: float = Field(gt=0)
    """Factor on the rate that is found, of every component that has none of its own in [model]: 1."""
    betas: list[Annotated[float, Field(gt=0, lt=1)]] = Field(default=[0.9, 0.99], min_length=2, max_length=2)
    """Weight of the average in the weights that train, and decay of the squared gradient; each in (0, 1)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay (times the rate, per step). Never on norms, biases and embeddings."""
    d0: float = Field(default=1e-6, gt=0)
    """First guess of the rate; it only rises from there."""
    d_coef: float = Field(default=1.0, gt=0)
    """Factor on the guess: 0.5 for a smaller rate, 2 for a larger one."""

    def build(self, groups: Groups, seed: int = 0) -> Optimizer:
        from anima_train.optim.prodigy import Prodigy as Built  # its library is optional

        return Built(groups, self.lr, (self.betas[0], self.betas[1]), self.d0, self.d_coef, seed)


def can_fuse(groups: Groups) -> bool:
    """Return True if torch's fused AdamW runs for all these parameters."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    devices = {parameter.device.type for parameter in parameters}
    return devices <= {"cuda", "cpu", "xpu", "mps"} and all(parameter.is_floating_point() for parameter in parameters)


def normalize_type(value: Any) -> Any:
    """Return an optimizer's table with its type as we write it: other trainers write `AdamW8bit`, `schedule-free`."""
    if isinstance(value, dict) and isinstance(value.get("type"), str):
        return value | {"type": value["type"].lower().replace("-", "_")}
    return value


AnyOptimizer = Annotated[
    Annotated[
        AdamW | AdamWKahan | AdamW8bit | ScheduleFree | Prodigy | Lion | Adafactor | Muon, Field(discriminator="type")
    ],
    BeforeValidator(normalize_type),
]
