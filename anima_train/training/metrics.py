"""The numbers of a step: summed over micro-batches and processes, and told to terminal, trackers and metrics.jsonl."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from anima_train.core.transfers import HostCopy
from anima_train.data.loader import Batch
from anima_train.data.samples import ROLES
from anima_train.objective.timesteps import T_BINS
from anima_train.run.log import is_quiet
from anima_train.run.progress import ProgressBar
from anima_train.run.trackers import Trackers, open_trackers
from anima_train.training.context import RunContext
from anima_train.training.memory import peak_bytes, start_peak
from anima_train.training.prefetch import RankStep
from anima_train.training.setup import TrainState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepLosses:
    """A step's mean losses over all processes; what has no sample is absent."""

    loss: float
    by_role: dict[str, float]
    by_t: list[tuple[int, float, int]]  # (range of t, mean, number of samples)

    @classmethod
    def of(cls, sums: Sequence[float]) -> "StepLosses":
        """Return the means of sums of all processes, as `StepSums.take` makes them."""
        loss, *values = sums
        pairs = list(zip(values[::2], values[1::2], strict=True))
        roles, ranges = pairs[: len(ROLES)], pairs[len(ROLES) :]
        by_role = {str(role): total / number for role, (total, number) in zip(ROLES, roles, strict=True) if number}
        by_t = [(place, total / number, int(number)) for place, (total, number) in enumerate(ranges) if number]
        return cls(loss, by_role, by_t)


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
            batch: the samples, on the same device.
            is_padding: True if they repeat samples of the step, only to keep this process in step.
        """
        self.loss += share.detach()
        if is_padding:
            return
        values = torch.stack([losses.detach(), torch.ones_like(losses)], dim=1)
        learned = values
        if batch.preserved is not None:  # the loss of these is another: the distance from the base
            learned = values.index_fill(0, batch.preserved, 0.0)
        self.ranges.index_add_(0, (batch.t * T_BINS).long().clamp(0, T_BINS - 1), learned)
        if self.has_roles and batch.roles is not None:
            self.roles.index_add_(0, batch.roles, values)

    def take(self, accelerator: Accelerator) -> Float[Tensor, " N"]:
        """Return the step's sums over all processes, which all call this, and begin anew; the loss is the first."""
        sums: Tensor = accelerator.reduce(self.sums, "sum")
        self.sums.zero_()
        return sums


@dataclass(frozen=True)
class StepResult:
    """The numbers that have come out of a step."""

    losses: StepLosses
    grad_norm: float  # before clipping
    share_moved: float  # of the trained weights, in the update
    share_moved_in_run: float  # since before the first step


@dataclass(frozen=True)
class MadeStep:
    """A step that the device has been told to make; only `numbers` are of what has come out."""

    planned: RankStep
    samples_seen: int  # with it
    rates: dict[str, float]  # by the name of their curve
    numbers: HostCopy  # sums of the losses, the gradient norm before clipping, the shares of weights that have moved

    @property
    def number(self) -> int:
        """The number of steps that are done with it."""
        return self.planned.index + 1

    def result(self) -> StepResult:
        """Return its numbers; wait until the device has them."""
        *sums, grad_norm, moved, moved_in_run = self.numbers.wait().tolist()
        return StepResult(StepLosses.of(sums), grad_norm, moved, moved_in_run)


def rates_in_use(optimizer: Optimizer) -> dict[str, float]:
    """Return the learning rate of each component in the step to come, by the name of its curve.

    Where its weights have several, the lowest, and the highest as `lr/mlp_highest`. Prodigy's groups have a factor on
    it that was found, `d`; the product is the rate in effect.
    """
    rates: dict[str, float] = {}
    for component in dict.fromkeys(group["component"] for group in optimizer.param_groups):
        own = [group["lr"] for group in optimizer.param_groups if group["component"] == component]
        rates[f"lr/{component}"] = min(own)
        if max(own) > min(own):
            rates[f"lr/{component}_highest"] = max(own)
    effective = {
        f"effective_lr/{group['component']}": group["lr"] * group["d"]
        for group in optimizer.param_groups
        if "d" in group
    }
    return rates | effective


def highest_rate(rates: Mapping[str, float]) -> float:
    """Return the highest learning rate of any component, from `rates_in_use`."""
    return max(rate for name, rate in rates.items() if name.startswith("lr/"))


class StepLogger:
    """Tells the numbers of every step; the main process does.

    Its trackers and its progress bar are closed with the run, where that fails, too.

    Args:
        run: the run.
        state: that is trained.
        num_steps: of the whole run.
    """

    def __init__(self, run: RunContext, state: TrainState, num_steps: int) -> None:
        self.run = run
        self.state = state
        opens = partial(open_trackers, run.is_main, run.config.monitoring, run.folder.path, run.config.offline)
        self.progress = ProgressBar(run.folder.name, num_steps, state.step, run.is_main and not is_quiet())
        self.trackers = run.stack.enter_context(Trackers(opens))
        run.stack.callback(self.progress.close)
        self.started, self.seen_before = time.monotonic(), state.samples_seen
        self.shown: float | None = None  # the loss in the bar: of what is learned, where other samples are there too

    def start(self) -> None:
        """Begin to measure speed and memory."""
        self.started, self.seen_before = time.monotonic(), self.state.samples_seen
        start_peak(self.run.device)

    @property
    def seconds(self) -> float:
        """The seconds since the first step of this process."""
        return time.monotonic() - self.started

    def x(self, step: int, samples_seen: int) -> int:
        """Return the place on the curves' axis."""
        return samples_seen if self.run.config.x_axis_examples else step

    def step(self, made: MadeStep, result: StepResult, next_event: str) -> None:
        """Log a step."""
        if not self.run.is_main:
            return
        seconds = self.seconds
        speed = (made.samples_seen - self.seen_before) / seconds
        values: dict[str, Any] = {
            "step": made.number,
            "epoch": made.planned.epoch,
            "examples": made.samples_seen,
            "loss": result.losses.loss,
            "lr": highest_rate(made.rates),
            **made.rates,
            **{f"loss/{role}": mean for role, mean in result.losses.by_role.items()},
            "grad_norm": result.grad_norm,
            "share_moved": result.share_moved,
            "share_moved_in_run": result.share_moved_in_run,
            **({} if self.state.base_passes is None else {"preservation_seconds": self.state.base_passes.seconds()}),
            "images_per_second": speed,
            "seconds": seconds,
            "memory_bytes": peak_bytes(self.run.device),
        }
        self.run.folder.log(self.run.folder.metrics_path, values | {"loss_by_t": result.losses.by_t})
        shown = {key: value for key, value in values.items() if key not in ("step", "examples")}
        self.trackers.log(shown, self.x(made.number, made.samples_seen))
        if spike := self.state.spikes.after(made.number, result.grad_norm):
            logger.warning("%s", spike, extra={"step": made.number})
        learned = result.losses.by_role.get("train")
        if learned is not None or not result.losses.by_role or self.shown is None:
            self.shown = result.losses.loss if learned is None else learned
        self.progress.update(made.number, self.shown, speed, values["memory_bytes"], next_event)
