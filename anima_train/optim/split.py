"""The base of our optimizers: it computes in float32, whatever the weights are kept in, and loses no small update."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anima_train.core.random import derive
from anima_train.optim.moments import SCALE, Moment, MomentsDtype, flat, host_room, local, new_moment, store

Groups = list[dict[str, Any]]
Rounding = Literal["kahan", "stochastic"]
CHUNK = 2**24  # elements updated at once; half a GB of temporary float32 tensors
SPREAD = 0x9E3779B9 - 2**32  # the golden ratio of 2**32: neighbours get distant numbers


@dataclass(frozen=True)
class Storage:
    """The form in which an optimizer keeps weights and moments."""

    rounding: Rounding = "kahan"  # of bfloat16 weights
    moments: MomentsDtype = "float32"
    on_host: bool = False  # the moments, between updates
    seed: int = 0  # of stochastic rounding


class SplitOptimizer(Optimizer):
    """An optimizer whose bfloat16 weights follow updates that are far smaller than their last bit.

    With `kahan` the part of a weight that rounding to bf16 cuts off is kept and added to the next update (Kahan 1965).
    This compensation is held exactly, as the 16 bits by which float32 is longer than bf16, so that the result is that
    of float32 training. Kept in bf16, for the same memory, it would lose most of updates of 2e-6 to a weight of 1.

    With `stochastic` nothing is kept: a weight is rounded up or down at random, in such shares that the mean is exact.
    The random bits are a function of seed, step and place. Float32 weights need neither.

    All numbers of the state are tensors on the device. So an update that the device skips, by `found_inf`, changes no
    bit of what follows, and the host need not know.
    """

    numbers: ClassVar[tuple[str, ...]] = ("step",)  # of one element; alike in parameters of one age
    is_elementwise: ClassVar[bool] = True  # a rule may get parameters of all shapes as one flat tensor

    def __init__(self, params: Groups, defaults: dict[str, Any], storage: Storage | None = None) -> None:
        super().__init__(params, defaults)
        self.storage = storage or Storage()
        self.ages: dict[nn.Parameter, int] = {}  # equal numbers: equal steps, without a look at the device
        self.num_calls = 0
        self.places = {each: index for index, each in enumerate(p for group in params for p in group["params"])}
        self._step_supports_amp_scaling = True  # torch's name: `found_inf` is heeded, see `optim.skipping`

    def moment_names(self, parameter: Tensor, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the running means of a parameter that have its shape and are kept as `Storage` says."""
        raise NotImplementedError

    def rule(
        self, weight: Tensor, gradient: Tensor, moments: dict[str, Tensor], numbers: dict[str, Tensor],
        group: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """Update weight and moments in place, or put other moments into the mapping.

        Args:
            weight: in float32; flat where the optimizer is elementwise, else several of one shape.
            gradient: in float32, of the same shape; may be overwritten.
            moments: in float32, by name.
            numbers: of one element, those of this step.
            group: the options.
        """
        raise NotImplementedError

    def advance(self, numbers: dict[str, Tensor], group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the numbers of this step, made from those of the one before."""
        return {"step": numbers["step"] + 1}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; the device does nothing if its attribute `found_inf` is 1."""
        loss = None if closure is None else closure()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        skips = None if found_inf is None else found_inf == 1
        self.num_calls += 1
        for group in self.param_groups:
            for parameters in self.chunks(group["params"], group):
                self.update(parameters, group, skips)
        return loss

    @torch.no_grad()
    def step_one(self, parameter: nn.Parameter, group: dict[str, Any], skips: Tensor | None) -> None:
        """Update one parameter, which has a gradient, now."""
        self.grow_older(parameter, group)
        self.update([parameter], group, skips)

    def chunks(self, parameters: Iterable[nn.Parameter], group: Mapping[str, Any]) -> Iterator[list[nn.Parameter]]:
        """Yield parameters of one kind and age, about `CHUNK` elements together: a LoRA has a thousand small ones."""
        gathered: dict[tuple[Any, ...], list[nn.Parameter]] = {}
        sizes: Counter[tuple[Any, ...]] = Counter()
        for parameter in parameters:
            if parameter.grad is None:
                continue
            kind = self.grow_older(parameter, group)
            if sizes[kind] and sizes[kind] + parameter.numel() > CHUNK:
                yield gathered.pop(kind)
                sizes[kind] = 0
            gathered.setdefault(kind, []).append(parameter)
            sizes[kind] += parameter.numel()
        yield from gathered.values()

    def grow_older(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> tuple[Any, ...]:
        """Note that a parameter takes part in this step; return what it has to share with others of a chunk."""
        if not self.state[parameter]:
            self.start(parameter, group)
        # Of those that began with one step, only those that took part in the same calls have one step still.
        self.ages[parameter] = hash((self.ages.get(parameter, 0), self.num_calls))
        kept = tuple((name, value.dtype) for name, value in self.state[parameter].items())
        shape = None if self.is_elementwise else parameter.shape
        return (parameter.dtype, parameter.device, self.ages[parameter], kept, shape)

    def start(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        """Make the state of a parameter that was never updated."""
        state = self.state[parameter]
        for name in self.numbers:
            state[name] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for name in self.moment_names(parameter, group):
            state.update(new_moment(parameter, name, self.storage.moments, self.storage.on_host))
        if parameter.dtype == torch.bfloat16 and self.storage.rounding == "kahan":
            state["compensation"] = torch.zeros_like(parameter, dtype=torch.int16)

    def is_on_host(self, name: str) -> bool:
        """Return True if a state of this name waits in the host's memory."""
        return self.storage.on_host and name not in (*self.numbers, "compensation")

    def update(self, parameters: Sequence[nn.Parameter], group: dict[str, Any], skips: Tensor | None) -> None:
        """Update parameters of one kind, in float32, as one tensor: few kernels for many parameters."""
        states = [self.state[parameter] for parameter in parameters]
        before = {name: states[0][name].clone() for name in self.numbers}
        numbers = self.advance(before, group)
        for name, value in numbers.items():
            kept = value if skips is None else torch.where(skips, before[name], value)
            torch._foreach_copy_([state[name] for state in states], [kept] * len(states))

        shape = (-1,) if self.is_elementwise else (len(parameters), *parameters[0].shape)
        weights = [local(parameter.detach()) for parameter in parameters]
        gradient = flat([local(parameter.grad) for parameter in parameters if parameter.grad is not None]).float()
        names = [name for name in states[0] if name not in (*self.numbers, "compensation") and not name.endswith(SCALE)]
        moments = {name: Moment(states, name, weights[0].device) for name in names}
        values = {name: moment.values.view(self.moment_shape(states, name)) for name, moment in moments.items()}
        compensations = [local(state["compensation"]) for state in states if "compensation" in state]

        weight = flat(weights)
        if compensations:
            weight = join_halves(weight, flat(compensations))
        weight = weight.float().view(shape)
        self.rule(weight, gradient.view(shape), values, numbers, group)
        for name, moment in moments.items():
            moment.put_back(values[name], skips)
        weight = weight.view(-1)
        if weights[0].dtype == torch.bfloat16 and not compensations:
            weight = round_at_random(weight, torch.cat([self.random_bits(each, group) for each in parameters]))
        store(weight, weights, skips)
        if compensations:
            store(lower_half(weight), compensations, skips)

    def moment_shape(self, states: Sequence[Mapping[str, Tensor]], name: str) -> Sequence[int]:
        """Return the shape in which the rule gets a moment."""
        return (-1,) if self.is_elementwise else (len(states), *states[0][name].shape)

    def random_bits(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> Tensor:
        """Return 16 random bits, as int32, for each element of a parameter in this step."""
        step = group.get("step_index", self.num_calls)  # the training loop's; it is not that of the state after a skip
        address = derive(self.storage.seed, "rounding", step, self.places[parameter])
        return random_bits(local(parameter).numel(), address, parameter.device)

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """Return a weight in float32, with what rounding has cut off where that is kept."""
        weight, state = parameter.detach(), self.state[parameter]
        return join_halves(weight, state["compensation"]) if "compensation" in state else weight.float()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put a state back as it is, but for options; torch would convert it to the parameters' dtype."""
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.state.clear()
        for index, parameter in zip(indices, parameters, strict=True):
            state = state_dict["state"].get(index, {})
            for name, value in state.items():
                device = parameter.device
                if self.is_on_host(name):
                    self.state[parameter][name] = host_room(value.shape, value.dtype, device).copy_(value)
                else:
                    self.state[parameter][name] = value.to(device, copy=True)
            self.ages[parameter] = hash((int(state.get("step", 0)), -1))

    def state_dict(self) -> dict[str, Any]:
        """Return the state, not copied; what is on its way to the host has arrived."""
        if self.storage.on_host and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return super().state_dict()


def lower_half(weight: Tensor) -> Tensor:
    """Return the part that rounding a float32 tensor to bfloat16 cuts off, as int16 in units of its last bit."""
    upper = weight.bfloat16().view(torch.int16).int() << 16
    # A tie rounded down leaves 2**15, one more than fits; the last bit of a float32 is given up there.
    return (weight.view(torch.int32) - upper).clamp_(max=2**15 - 1).to(torch.int16)


def join_halves(upper: Tensor, lower: Tensor) -> Tensor:
    """Return the float32 tensor whose bfloat16 rounding is `upper`, and whose `lower_half` is `lower`."""
    return ((upper.view(torch.int16).int() << 16) + lower).view(torch.float32)


def round_at_random(weight: Tensor, bits: Tensor) -> Tensor:
    """Return a flat float32 tensor rounded to bfloat16: up where what is cut off and 16 random bits carry over."""
    return (weight.view(torch.int32) + bits).bitwise_and_(-(2**16)).view(torch.float32).bfloat16()


def random_bits(number: int, address: int, device: torch.device) -> Tensor:
    """Return 16 random bits for each of so many elements, as int32: a function of the address and the element alone.

    Two rounds of multiplying and folding (Wellons' `lowbias32`) of a counter, each for two elements: the same numbers
    on every device, and no generator.
    """
    start = address % 2**32 - 2**31
    bits = torch.arange(-(-number // 2), dtype=torch.int32, device=device).mul_(SPREAD).add_(start)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        bits.bitwise_xor_((bits >> shift).bitwise_and_(2 ** (32 - shift) - 1)).mul_(factor)
    bits.bitwise_xor_((bits >> 16).bitwise_and_(2**16 - 1))
    return torch.stack((bits & 0xFFFF, (bits >> 16) & 0xFFFF), dim=1).view(-1)[:number]
