"""Counts without noise: kernels, bytes of elementwise passes, and bytes kept for the backward pass."""

import gc
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from anima_train.model import quantized

# What launches nothing and is no view by its schema.
NO_KERNEL = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh", "detach",
    "_local_scalar_dense", "is_same_size", "is_pinned", "_pin_memory", "device",
}  # fmt: skip
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution", "convolution_backward", "_int_mm"}
ONLY_WRITTEN = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_"}  # their first argument is not read


class KernelCounter(TorchDispatchMode):
    """The kernels on one kind of device, each operation that torch dispatches being one; a GPU launches at least these.

    Args:
        device_type: "cuda" or "cpu".
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.kernels = 0
        self.elementwise_bytes = 0
        self.by_name: Counter[str] = Counter()
        self.bytes_by_name: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function.namespace == "anima_train":  # an operation of our own: what is in it is counted
            with self:
                return getattr(quantized, function.overloadpacket.__name__)._init_fn(*args, **kwargs)
        found = function(*args, **kwargs)
        name = function._schema.name.split("::")[-1]
        results = {argument.name for argument in function._schema.arguments if argument.is_out}
        given = {key: value for key, value in kwargs.items() if key not in results}
        read, written = list(tensors_in((args, given))), list(tensors_in(found))
        if name in NO_KERNEL or function.is_view or not self.runs_here((*read, *written)):
            return found
        self.kernels += 1
        self.by_name[name] += 1
        if not is_product(name):
            read = read[1:] if name in ONLY_WRITTEN else read
            num_bytes = touched_bytes(read) + touched_bytes(written)
            self.elementwise_bytes += num_bytes
            self.bytes_by_name[name] += num_bytes
        return found

    def runs_here(self, tensors: Iterable[Tensor]) -> bool:
        """Return True if an operation with these tensors has something to do on the device."""
        return any(tensor.device.type == self.device_type and tensor.numel() for tensor in tensors)


def tensors_in(values: Any) -> Iterable[Tensor]:
    """Yield the tensors in nested tuples, lists and dictionaries."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from tensors_in(tuple(values.values()))
    elif isinstance(values, tuple | list):
        for value in values:
            yield from tensors_in(value)


def is_product(name: str) -> bool:
    """Return True for matrix products, convolutions and attention."""
    return name.rstrip("_") in PRODUCTS or "attention" in name


def touched_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes that these tensors occupy: an expanded one those of its source, one given twice once."""
    sizes = {}
    for tensor in tensors:
        dense = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
        key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
        sizes[key] = math.prod(dense) * tensor.element_size()
    return sum(sizes.values())


class KeptBytes:
    """The bytes that a forward pass keeps for the backward pass on the model's device, in storages that count once.

    They are what the pass has made and is alive when it is over: what autograd saves, and what selective checkpointing
    keeps by itself. Parameters and inputs are not counted; the pass's output is.

    Args:
        model: whose parameters and buffers do not count.
        inputs: of the pass.
        sees_operations: False for a compiled model, of which only what autograd saves is seen, by its hooks.
    """

    def __init__(self, model: nn.Module, inputs: Iterable[Tensor], sees_operations: bool = True) -> None:
        known = (*model.parameters(), *model.buffers(), *inputs)
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.saved: dict[int, torch.UntypedStorage] = {}
        self.made = MadeStorages(known[0].device.type)
        hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.watch = self.made if sees_operations else hooks
        self.total = 0

    def __enter__(self) -> "KeptBytes":
        self.watch.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Stop watching, and count."""
        self.watch.__exit__(*exception)
        gc.collect()
        sizes = {key: storage.nbytes() for key, storage in self.saved.items()} | self.made.alive()
        self.total = sum(size for key, size in sizes.items() if key not in self.known)

    def pack(self, tensor: Tensor) -> Tensor:
        """Note a tensor that autograd saves."""
        storage = tensor.untyped_storage()
        self.saved[storage._cdata] = storage
        return tensor


class MadeStorages(TorchDispatchMode):
    """The storages that operations have made on one kind of device, and whether they are alive."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def alive(self) -> dict[int, int]:
        """Return the bytes of each storage that is alive."""
        return {key: size for key, (reference, size) in self.storages.items() if not reference.expired()}

    def note(self, tensor: Tensor) -> None:
        """Note a tensor's storage."""
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in tensors_in(found):
            if tensor.device.type == self.device_type:
                self.note(tensor)
        return found


class PeakBytes(MadeStorages):
    """The most bytes that were alive at once on one kind of device; what an operation uses inside is not seen.

    Args:
        device_type: "cuda" or "cpu".
        known: tensors that are there at the start.
    """

    def __init__(self, device_type: str, known: Iterable[Tensor]) -> None:
        super().__init__(device_type)
        self.peak = self.at_most = 0  # `at_most`: those that were alive when it was last counted, and all made since
        for tensor in known:
            self.note(tensor)

    def note(self, tensor: Tensor) -> None:
        known = self.storages.get(tensor.untyped_storage()._cdata)
        if known is not None and not known[0].expired():
            return
        super().note(tensor)
        self.at_most += tensor.untyped_storage().nbytes()
        if self.at_most > self.peak:
            alive = self.alive()
            self.storages = {key: self.storages[key] for key in alive}
            self.at_most = sum(alive.values())
            self.peak = max(self.peak, self.at_most)
