"""Prodigy, of the optional package prodigy-plus-schedule-free, made to resume bit for bit: imported where used."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from prodigyplus import ProdigyPlusScheduleFree
from torch import Tensor, nn

from anima_train.core.random import derive
from anima_train.optim.split import Groups

logger = logging.getLogger(__name__)

# What a step leaves in a parameter group, in the order of the tensor that keeps it in a state.
NUMBERS = (
    "d", "d_prev", "d_numerator", "d_denom", "prev_d_numerator", "max_d_numerator", "k", "weight_sum",
    "running_weight_sum", "effective_lr",
)  # fmt: skip
GROUP = "group"  # the name of that tensor, in the state of the group's first parameter


class Prodigy(ProdigyPlusScheduleFree):  # type: ignore[misc]
    """The library's optimizer with one rate for all groups, as in the paper.

    Its random rounding of bf16 weights follows from seed and step; its state is tensors alone; nothing is printed.
    """

    def __init__(
        self, params: Groups, lr: float, betas: tuple[float, float], d0: float, d_coef: float, seed: int
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, d0=d0, d_coef=d_coef, split_groups=False)
        self.seed = seed

    def log(self, message: str) -> None:
        """Log what the library would print."""
        logger.debug("%s", message)

    def step(self, closure: Any = None) -> Any:
        """Make the library's step."""
        devices = {parameter.device for parameter in self.parameters() if parameter.device.type == "cuda"}
        with torch.random.fork_rng(devices):
            torch.manual_seed(derive(self.seed, "rounding", self.param_groups[0]["k"]))
            return super().step(closure)

    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters, in order."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def rate(self, group: Mapping[str, Any]) -> float:
        """Return the learning rate that the next step of a group has."""
        return float(group["d"] * group["lr"])

    def averaged(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> Tensor:
        """Return x, the average of schedule-free training, in float32."""
        weight, z = parameter.detach().float(), self.state[parameter].get("z")
        return weight if z is None else weight.lerp(z.float(), 1 - 1 / group["betas"][0])

    def state_dict(self) -> dict[str, Any]:
        """Return the state, where every value is a tensor of a parameter."""
        packed: dict[str, Any] = super().state_dict()
        packed["state"] = {
            index: {name: value for name, value in state.items() if isinstance(value, Tensor)}
            for index, state in packed["state"].items()
        }
        for group, ours in zip(packed["param_groups"], self.param_groups, strict=True):
            numbers = torch.tensor([ours.get(name, 0.0) for name in NUMBERS], dtype=torch.float64)
            packed["state"].setdefault(group["params"][0], {})[GROUP] = numbers
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put a state back as it is, but for options; the library would convert it to the parameters' dtype."""
        self.state.clear()
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, parameter in zip(indices, self.parameters(), strict=True):
            kept = state_dict["state"].get(index, {})
            state = {name: value.to(parameter.device, copy=True) for name, value in kept.items() if name != GROUP}
            if "exp_avg_sq_row" in state:
                columns, rows = self.factored_dims(parameter.shape, True, 32)
                state["exp_avg_sq_metadata"] = (rows, columns)
            if state:
                self.state[parameter] = state
        for group, ours in zip(state_dict["param_groups"], self.param_groups, strict=True):
            numbers = state_dict["state"].get(group["params"][0], {}).get(GROUP)
            if numbers is not None:
                ours.update(zip(NUMBERS, numbers.tolist(), strict=True))
                ours["k"] = int(ours["k"])
