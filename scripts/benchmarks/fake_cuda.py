"""CUDA tensors without values and without a GPU: what the project does on a GPU, seen on any machine.

Tensors are torch's fake ones (`FakeTensorMode`) on the device "cuda": torch dispatches as on a GPU, so that autocast,
the fused norms, device errors and decompositions are those of CUDA. Some things need a driver or values, and have a
stand-in:

- `F.scaled_dot_product_attention` chooses a kernel by the GPU at hand, and without one the slow formula. Here it is
  FlashAttention for half precision and the memory-efficient kernel for float32; with a mask the formula stays.
- `torch.autocast("cuda")` turns itself off without a GPU; here it does not.
- the autograd engine asks for the GPU's streams, and fails without one; here `run_backward` walks the same graph, calls
  the same functions and sums the same gradients, in the engine's order. `tests/training/test_fake_cuda.py` compares it
  with the engine.
- `torch.Generator("cuda")` is one on the CPU here; events do nothing, there are no streams, and no current device.
- `Module.to` exchanges the contents of parameters, which fake ones refuse; here they are replaced where the conversion
  changes them.
- reading a value (`.item()`, `bool()`, `.tolist()`, a blocking copy to the host) gives ones, and is counted in `Waits`,
  as is waiting for an event or the device; whatever has a shape that depends on values (`nonzero`, masks as indices)
  raises, as fake tensors do.
"""

import contextlib
import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # now: its import wants the real classes
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import GraphExecGroup

aten = torch.ops.aten
SDPA = F.scaled_dot_product_attention  # torch's, which chooses
GENERATOR = torch.Generator
HALF = (torch.bfloat16, torch.float16)
Gradients = list[Tensor | None]


@contextlib.contextmanager
def fake_cuda() -> Iterator["Waits"]:
    """Make every tensor fake while it is entered; yield the count of waits for the device."""
    waits = Waits()
    stand_ins = (
        (torch.autograd, "_engine_run_backward", run_backward),
        (FunctionCtx, "set_materialize_grads", set_materialize_grads),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.cuda, "is_bf16_supported", lambda: True),
        (F, "scaled_dot_product_attention", attention),
        (torch, "Generator", HostGenerator),
        *((module, "Event", waits.event) for module in (torch, torch.cuda)),
        (torch.cuda, "current_stream", lambda device=None: None),
        (torch.cuda, "device", contextlib.nullcontext),
        *((module, "synchronize", waits.for_device) for module in (torch.cuda, torch.accelerator)),
        (nn.Module, "_apply", convert),
        (FakeTensor, "tolist", read_list),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in stand_ins:  # with a GPU, too: the same numbers everywhere
            stack.enter_context(patch.object(owner, name, stand_in))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(waits)


def convert(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Replace a module's parameters and buffers by what a function makes of them."""
    for child in module.children() if recurse else ():
        convert(child, function)
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            with torch.no_grad():
                converted = function(tensor)
            if (converted.device, converted.dtype) != (tensor.device, tensor.dtype):
                is_parameter = isinstance(tensor, nn.Parameter)
                tensors[name] = nn.Parameter(converted, tensor.requires_grad) if is_parameter else converted
    return module


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Return the attention of the kernel that torch takes for these tensors on a GPU."""
    if not query.is_cuda or attn_mask is not None or enable_gqa:
        return SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled("cuda"):  # attention is in autocast's list of half precision
        query, key, value = (each.to(torch.get_autocast_dtype("cuda")) for each in (query, key, value))
    if query.dtype in HALF:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    keeps = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, None, keeps, dropout_p, is_causal, scale=scale
    )[0]


class HostGenerator:
    """A generator on the CPU, whatever device is asked for."""

    def __new__(cls, device: object = "cpu") -> Any:
        return GENERATOR()


class Event:
    """An event of a device that does nothing.

    Args:
        wait: called by who waits for it.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self.synchronize = wait

    def record(self, stream: object = None) -> None:
        """Record nothing."""


class Waits(TorchDispatchMode):
    """The count of the times that the host waits for the device to read a value, by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """The number of waits."""
        return self.numbers.total()

    def event(self, *_: object, **__: object) -> Event:
        """Return an event; waiting for it is counted."""
        return Event(partial(self.numbers.update, ["event"]))

    def for_device(self, *_: object) -> None:
        """Wait for all that the device was told."""
        self.numbers["device"] += 1

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function in (aten._local_scalar_dense.default, aten.is_nonzero.default):
            if args[0].device.type == "cuda":
                self.numbers["item"] += 1
            return scalar_one(args[0].dtype)
        if function in (aten._pin_memory.default, aten.pin_memory.default):  # fake tensors have no place
            return args[0]
        found = function(*args, **kwargs)
        non_blocking = kwargs.get("non_blocking", any(each is True for each in args[2:]))
        if is_copy_to_host(function, args, found) and not non_blocking:
            self.numbers["copy to the host"] += 1
        return found


def is_copy_to_host(function: Any, args: Sequence, found: Tensor) -> bool:
    """Return True if this operation copies from the device to the host."""
    if function is aten._to_copy.default:
        source, target = args[0], found
    elif function is aten.copy_.default:
        target, source = args[:2]
    else:
        return False
    return source.device.type == "cuda" and target.device.type == "cpu"


def read_list(tensor: Tensor) -> Any:
    """Return a tensor as nested lists, as `Tensor.tolist` does: in one copy to the host."""
    on_host = tensor.cpu()
    value = scalar_one(tensor.dtype)

    def nested(shape: Sequence[int]) -> Any:
        return [nested(shape[1:]) for _ in range(shape[0])] if shape else value

    return nested(tuple(on_host.shape))


def scalar_one(dtype: torch.dtype) -> bool | int | float:
    """Return the number 1 as a scalar of this dtype."""
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def run_backward(
    roots: Sequence[Tensor], gradients: Sequence[Tensor | None], keep_graph: bool, create_graph: bool,
    inputs: Sequence = (), **_: bool,
) -> None:  # fmt: skip
    """Compute gradients as torch's engine does, and add them to the leaves' `grad`.

    Args:
        roots: tensors to start from.
        gradients: of the roots.
        keep_graph: not used; nothing is freed.
        create_graph: must be False.
        inputs: must be empty; every leaf gets its gradient.
        _: the engine's other switches.
    """
    assert not create_graph
    assert not inputs
    starts = [(node_of(root), root.output_nr) for root in roots]
    waiting = dependencies([node for node, _ in starts])
    buffers: dict[Any, Gradients] = {}
    ready: list[tuple[int, int, Any]] = []
    numbers = itertools.count()  # no two entries compare equal

    def push(node: Any) -> None:
        heapq.heappush(ready, (-node._sequence_nr(), next(numbers), node))

    with torch.no_grad(), GraphExecGroup():  # the latter: a checkpoint is recomputed once
        for (node, index), gradient in zip(starts, gradients, strict=True):
            assert gradient is not None
            add_gradient(buffers.setdefault(node, empty_buffer(node)), node, index, gradient)
        for node in dict.fromkeys(node for node, _ in starts):
            if waiting[node] == 0:
                push(node)
        while ready:
            node = heapq.heappop(ready)[2]
            for (following, index), gradient in edges(node, buffers.pop(node, empty_buffer(node))):
                if gradient is not None:
                    add_gradient(buffers.setdefault(following, empty_buffer(following)), following, index, gradient)
                waiting[following] -= 1
                if waiting[following] == 0:
                    push(following)


def set_materialize_grads(context: Any, value: bool) -> None:
    """Do what `FunctionCtx.set_materialize_grads` does, and note it: torch cannot be asked for it."""
    context.materialize_grads = context.wants_zeros = value


def node_of(root: Tensor) -> Any:
    """Return the node of the graph that a tensor came from."""
    assert root.grad_fn is not None
    return root.grad_fn


def dependencies(roots: Sequence[Any]) -> Counter[Any]:
    """Return how many edges lead to each node of the graph."""
    waiting: Counter[Any] = Counter(dict.fromkeys(roots, 0))
    queue = list(waiting)
    while queue:
        for following, _ in queue.pop().next_functions:
            if following is not None:
                if following not in waiting:
                    queue.append(following)
                waiting[following] += 1
    return waiting


def empty_buffer(node: Any) -> Gradients:
    """Return room for the gradients of a node's outputs."""
    return [None] * len(node._input_metadata)


def add_gradient(buffer: Gradients, node: Any, index: int, gradient: Tensor) -> None:
    """Add a gradient to those of a node, in the shape and dtype of its output."""
    wanted = node._input_metadata[index]
    if gradient.shape != torch.Size(wanted.shape):
        gradient = gradient.sum_to_size(wanted.shape)
    if gradient.dtype != wanted.dtype:
        gradient = gradient.to(wanted.dtype)
    before = buffer[index]
    buffer[index] = gradient if before is None else before + gradient


def edges(node: Any, gradients: Gradients) -> Iterator[tuple[tuple[Any, int], Tensor | None]]:
    """Run a node; yield its edges to following nodes, each with its gradient."""
    if node.name() == "torch::autograd::AccumulateGrad":
        leaf, (gradient,) = node.variable, gradients
        if gradient is not None:
            leaf.grad = gradient.detach() if leaf.grad is None else leaf.grad.add_(gradient)
            for hook in (leaf._post_accumulate_grad_hooks or {}).values():
                hook(leaf)
        return
    is_python = isinstance(node, BackwardCFunction)
    if is_python and getattr(node, "wants_zeros", True):
        gradients = [
            torch.zeros(wanted.shape, dtype=wanted.dtype, device=wanted.device) if gradient is None else gradient
            for gradient, wanted in zip(gradients, node._input_metadata, strict=True)
        ]
    found = node.apply(*gradients) if is_python else node(*gradients)
    found = found if isinstance(found, tuple) else (found,)
    following = node.next_functions
    if is_python:  # one gradient for each argument, an edge for each tensor
        found = tuple(gradient for gradient, needed in zip(found, node.needs_input_grad, strict=False) if needed)
        following = tuple(edge for edge in following if edge[0] is not None)
    yield from ((edge, gradient) for edge, gradient in zip(following, found, strict=True) if edge[0] is not None)
