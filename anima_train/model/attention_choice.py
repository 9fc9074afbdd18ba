"""The kernel of `F.scaled_dot_product_attention`: the one asked for, or the fastest by a short measurement."""

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from anima_train.core.device import release_memory
from anima_train.core.errors import ConfigError
from anima_train.core.settings import quoted
from anima_train.model.dit import TransformerShape
from anima_train.model.loading import ModelFiles

logger = logging.getLogger(__name__)

KernelName = Literal["cudnn", "flash", "efficient", "math"]
AttentionSetting = KernelName | Literal["auto"]

BACKENDS: dict[KernelName, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    # Behind the two above for calls that the chosen kernel cannot do, such as flash with a mask: it makes a plan for
    # every new shape, and what has a mask has many.
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,  # can do every call
}
FUSED: tuple[KernelName, ...] = ("flash", "efficient", "cudnn")
TIMED_CALLS = 5
MARGIN = 1.05  # by which a kernel has to be faster than flash: of two that are level, every start takes the same
CPU_TOKENS = 64  # of the trial there: no time is taken


@dataclass(frozen=True)
class AttentionShape:
    """The self-attention that a kernel is chosen for."""

    batch_size: int
    num_heads: int
    num_tokens: int
    head_dim: int

    @classmethod
    def of(cls, files: ModelFiles, batch_size: int, num_tokens: int) -> "AttentionShape":
        """Read heads and their size off the transformer's file."""
        transformer = TransformerShape.of(files.transformer_header.entries)
        num_heads = transformer.width // transformer.head_dim
        return cls(batch_size, num_heads, num_tokens, transformer.head_dim)


@dataclass(frozen=True)
class AttentionChoice:
    """The kernel that is tried first; those that follow it do the calls that it cannot do."""

    kernel: KernelName | Literal["default"]  # "default": as torch decides, on devices that know no such choice
    reason: str
    milliseconds: Mapping[KernelName, float] = field(default_factory=dict)  # of forward and backward, where measured

    def __str__(self) -> str:
        times = ", ".join(f"{name} {taken:.2f} ms" for name, taken in self.milliseconds.items())
        return f"attention: {self.kernel}, {self.reason}{f' ({times})' if times else ''}"

    @property
    def backends(self) -> list[SDPBackend]:
        """The kernels in the order in which they are tried; none behind math, as the CPU takes flash before it."""
        if self.kernel == "default":
            return []
        if self.kernel == "math":
            return [SDPBackend.MATH]
        return [BACKENDS[self.kernel], *(backend for name, backend in BACKENDS.items() if name != self.kernel)]

    @contextlib.contextmanager
    def in_use(self, device: torch.device) -> Iterator[None]:
        """Have all attention of the process, in every thread, try the kernels in this order."""
        if not self.backends:
            yield
            return
        # At its first call torch puts an order of its own in place, on Hopper cuDNN first, whatever was set before.
        query = torch.zeros(1, 1, 1, 8, device=device)
        F.scaled_dot_product_attention(query, query, query)
        with sdpa_kernel(self.backends, set_priority=True):
            yield


def choose_attention(
    wanted: AttentionSetting, device: torch.device, dtype: torch.dtype, shape: AttentionShape
) -> AttentionChoice:
    """Return the kernel to use; a measurement is made where several could be, and moves no random state.

    With torch's deterministic algorithms nothing is measured, as two starts could choose differently: the first that
    works is taken. cuDNN is none of them, torch refuses it then.

    Args:
        wanted: "auto", or the kernel to use.
        device: that computes.
        dtype: that it computes in.
        shape: of the largest micro-batch.

    Raises:
        ConfigError: the kernel that is wanted does not work here.
    """
    if device.type not in ("cuda", "cpu"):
        if wanted == "auto":
            return AttentionChoice("default", f"as torch decides on {device.type}")
        raise ConfigError(f'attention: found {quoted(wanted)}, but {device.type} has no such choice; use "auto"')
    if wanted == "math":
        return AttentionChoice("math", "as the configuration says")
    if wanted != "auto":
        found = try_kernels((wanted,), device, dtype, shape, measures=False)
        if found.problems:
            raise ConfigError(refusal(wanted, found.problems[wanted], device, dtype, shape))
        return AttentionChoice(wanted, "as the configuration says")
    measures = device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()
    found = try_kernels(FUSED, device, dtype, shape, measures)
    for name, problem in found.problems.items():
        logger.debug("attention: %s is left out: %s", name, problem)
    if not found.milliseconds:
        return AttentionChoice("math", "as no fused kernel works here")
    if not measures:
        return AttentionChoice(next(iter(found.milliseconds)), "the first that works here")
    measured = f"of {shape.batch_size} x {shape.num_tokens:,} tokens, forward and backward"
    return AttentionChoice(fastest(found.milliseconds), f"the fastest {measured}", found.milliseconds)


def fastest(milliseconds: Mapping[KernelName, float]) -> KernelName:
    """Return the kernel of least time; flash where no other is faster by more than `MARGIN`."""
    best = min(milliseconds, key=lambda name: milliseconds[name])
    if "flash" in milliseconds and milliseconds["flash"] <= MARGIN * milliseconds[best]:
        return "flash"
    return best


def refusal(wanted: KernelName, problem: str, device: torch.device, dtype: torch.dtype, shape: AttentionShape) -> str:
    """Return why a kernel cannot be used, and those that can."""
    others = try_kernels(tuple(name for name in FUSED if name != wanted), device, dtype, shape, measures=False)
    working = ", ".join(quoted(name) for name in (*others.milliseconds, "math"))
    name = "the CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    where = f"{name} in {str(dtype).removeprefix('torch.')} with heads of {shape.head_dim}"
    return f'attention: found {quoted(wanted)}, which does not work on {where} ({problem}); use {working}, or "auto"'


@dataclass
class Tried:
    """The outcome of trying kernels: those that work, with their time (0 if not measured), and why others do not."""

    milliseconds: dict[KernelName, float] = field(default_factory=dict)
    problems: dict[KernelName, str] = field(default_factory=dict)


def try_kernels(
    names: tuple[KernelName, ...], device: torch.device, dtype: torch.dtype, shape: AttentionShape, measures: bool
) -> Tried:
    """Run attention forward and backward with each kernel by itself."""
    on_cuda = device.type == "cuda"
    devices = [torch.cuda.current_device() if device.index is None else device.index] if on_cuda else []
    tried = Tried()
    # What torch warns of is why a kernel does not work, which is told here.
    with torch.random.fork_rng(devices), warnings.catch_warnings(record=True) as caught, torch.enable_grad():
        warnings.simplefilter("always")
        for name in names:
            caught.clear()
            try:
                inputs = random_inputs(shape, device, dtype)
                with sdpa_kernel(BACKENDS[name]):
                    run_once(inputs)  # makes plans, and takes memory from the device
                    tried.milliseconds[name] = cuda_milliseconds(inputs) if measures else 0.0
            except RuntimeError as error:  # no such kernel, or not for these tensors; or it ran out of memory
                tried.problems[name] = reason(caught, error)
    release_memory(device)
    return tried


def reason(caught: Iterable[warnings.WarningMessage], error: RuntimeError) -> str:
    """Return what torch says against a kernel, which is in its warnings; they tell of those switched off, too."""
    said = [str(warning.message).partition("(Triggered")[0].strip() for warning in caught]
    told = [text for text in dict.fromkeys(said) if not text.endswith(("because:", "runtime disabled."))]
    return " ".join(told) or str(error).partition("\n")[0].rstrip(".")


def random_inputs(shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value (B, heads, N, d), laid out as the transformer's: heads are views of the width."""
    generator = torch.Generator(device).manual_seed(0)
    num_tokens = shape.num_tokens if device.type == "cuda" else CPU_TOKENS
    size = (shape.batch_size, num_tokens, shape.num_heads, shape.head_dim)

    def one() -> Tensor:
        drawn = torch.randn(size, generator=generator, device=device, dtype=dtype)
        return drawn.transpose(1, 2).requires_grad_()

    return one(), one(), one()


def run_once(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Run attention forward and backward."""
    out = F.scaled_dot_product_attention(*inputs)
    torch.autograd.grad(out, inputs, out.detach())


def cuda_milliseconds(inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """Return the time of one call forward and backward, by the device's clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(TIMED_CALLS):
        run_once(inputs)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / TIMED_CALLS
