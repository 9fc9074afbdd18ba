"""The running means of an optimizer: their dtype, 8 bits included, their place, and reading and writing them."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from anima_train.core.transfers import is_asynchronous

MomentsDtype = Literal["float32", "bfloat16", "8bit"]
SCALE = "_scale"  # ends the name of the scales of a moment in 8 bits
BLOCK = 256  # elements with one scale, as in bitsandbytes' optimizers
MIN_8BIT = 4096  # elements: smaller parameters keep float32, as there
SIGNED = {"exp_avg": True, "exp_avg_sq": False}


def new_moment(parameter: Tensor, name: str, dtype: MomentsDtype, on_host: bool) -> dict[str, Tensor]:
    """Return the state of a moment that is zero, by name.

    Args:
        parameter: that it is of.
        name: of the moment.
        dtype: that it is kept in.
        on_host: True if it waits in the host's memory, pinned where copies are asynchronous.
    """
    if dtype == "8bit" and parameter.numel() >= MIN_8BIT:
        kept = {name: torch.uint8, name + SCALE: torch.float32}
    else:
        kept = {name: torch.bfloat16 if dtype == "bfloat16" else torch.float32}
    if not on_host or parameter.device.type == "meta":
        shapes = {name: torch.zeros_like(parameter, dtype=kept[name], requires_grad=False)}
        return shapes | {
            key: torch.zeros(num_blocks(parameter), device=parameter.device) for key in kept if key != name
        }
    shape = {name: parameter.shape, name + SCALE: (num_blocks(parameter),)}
    return {key: host_room(shape[key], kept[key], parameter.device).zero_() for key in kept}


def num_blocks(parameter: Tensor) -> int:
    """Return the number of scales that a parameter's moment in 8 bits has."""
    return -(-parameter.numel() // BLOCK)


def host_room(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of any values in the host's memory, pinned where copies to the device are asynchronous."""
    return torch.empty(shape, dtype=dtype, pin_memory=is_asynchronous(device))


class Moment:
    """A running mean of parameters that are updated together, in float32 while it is worked on.

    Args:
        states: of the parameters.
        name: of the moment in them.
        device: that computes; what is in the host's memory is copied there, and back by `put_back`.
    """

    def __init__(self, states: Sequence[Mapping[str, Tensor]], name: str, device: torch.device) -> None:
        self.is_8bit = name + SCALE in states[0]
        self.signed = SIGNED.get(name, True)
        self.kept = [local(state[key]) for key in self.keys(name) for state in states]
        self.held = [tensor.to(device, non_blocking=True) for tensor in self.kept]  # those on the device themselves
        if self.is_8bit:
            codes, scales = self.held[: len(states)], self.held[len(states) :]
            self.values = flat([from_8bit(*pair, self.signed) for pair in zip(codes, scales, strict=True)])
        else:
            self.values = flat(self.held).float()

    def keys(self, name: str) -> tuple[str, ...]:
        """Return the keys in a parameter's state."""
        return (name, name + SCALE) if self.is_8bit else (name,)

    def put_back(self, values: Tensor, skips: Tensor | None) -> None:
        """Keep these values; where `skips` is True, what was there."""
        if self.is_8bit:
            number = len(self.held) // 2
            parts = values.reshape(-1).split([codes.numel() for codes in self.held[:number]])
            pairs = [to_8bit(part, self.signed) for part in parts]
            store(flat([codes for codes, _ in pairs]), self.held[:number], skips)
            store(flat([scales for _, scales in pairs]), self.held[number:], skips)
        else:
            store(values.reshape(-1), self.held, skips)
        for kept, held in zip(self.kept, self.held, strict=True):
            if kept is not held:
                kept.copy_(held, non_blocking=True)


@functools.cache
def code_map(signed: bool, device: torch.device) -> Tensor:
    """Return the 256 values that 8 bits stand for, in [-1, 1] or [0, 1]: Dettmers et al. 2022, arXiv:2110.02861."""
    functional: Any = library()
    return functional.create_dynamic_map(signed=signed).to(device)


def library() -> Any:
    """Return bitsandbytes' functions, which quantize in blocks."""
    import bitsandbytes.functional  # takes long to import

    return bitsandbytes.functional


def to_8bit(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return codes and the scales of blocks for a flat float32 tensor."""
    codes, state = library().quantize_blockwise(values, code=code_map(signed, values.device), blocksize=BLOCK)
    return codes, state.absmax


def from_8bit(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """Return the flat float32 tensor that these stand for."""
    code = code_map(signed, codes.device)
    return library().dequantize_blockwise(codes.reshape(-1), absmax=scales, code=code, blocksize=BLOCK)


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor; another one as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


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
