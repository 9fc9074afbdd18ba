"""`waits`: how often an optimizer step makes the host wait for the device, counted on fake CUDA tensors.

The loop's own functions run: `prefetch_steps` with pinned batches, `train_step` and `LateSteps` with the lag of CUDA.
"""

import argparse
import contextlib
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tomli_w
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anima_train.checkpoint.resume import ResumePoint
from anima_train.config.load import load_config
from anima_train.config.loaded import LoadedConfig
from anima_train.config.model_files import build_model_spec
from anima_train.data.buckets import Size
from anima_train.data.loader import Batch
from anima_train.data.plan import MicroBatch, SampleRef, Step
from anima_train.distributed.signals import SignalHandler
from anima_train.model.block_swap import BlockSwap
from anima_train.model.dit import MiniTrainDIT
from anima_train.model.loading import ModelSpec
from anima_train.model.tiny import write_tiny
from anima_train.optim.ema import WeightAverage
from anima_train.optim.groups import optimizer_groups
from anima_train.run.accelerator import make_accelerator
from anima_train.run.folder import RunFolder
from anima_train.run.log import WarningsHandler
from anima_train.training.anomalies import UpdateGuard
from anima_train.training.build import block_runner, build_optimizer, load_trained
from anima_train.training.context import RunContext
from anima_train.training.late import LateSteps
from anima_train.training.memory import MemoryContext
from anima_train.training.memory_check import random_batch
from anima_train.training.metrics import StepSums
from anima_train.training.prefetch import RankMicroBatch, RankStep, prefetch_steps
from anima_train.training.setup import TrainState
from anima_train.training.train import train_step
from benchmarks.fake_cuda import fake_cuda

aten = torch.ops.aten
CUDA = torch.device("cuda")
SIZE = Size(64, 64)

# Operations that the host cannot go on from without a value of the device.
READS = (aten._local_scalar_dense, aten.is_nonzero, aten.equal)
SHAPED = (  # the shape of the result depends on values
    aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount,
    aten.repeat_interleave,
)  # fmt: skip
COPIES = (aten._to_copy, aten.copy_, aten._foreach_copy_)
PINS = (aten._pin_memory, aten.pin_memory)


class WaitCounter(TorchDispatchMode):
    """Notes each time that the host waits for the device, with the line of the project that makes it wait.

    Values that are read; results whose shape depends on values; copies between host and device, unless they are
    non-blocking from or into pinned memory; operations on the device that read a tensor of the host; waits for an
    event or the device. It sees what torch dispatches, not what a kernel does inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.pinned: dict[int, Any] = {}  # storages, held so that none gets the number of another

    def note(self, what: str) -> None:
        """Note a wait."""
        frames = [frame for frame in traceback.extract_stack() if "anima_train" in frame.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        self.found.append(f"{what} in {place}")

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        packet = function.overloadpacket
        if packet in PINS:
            return self.pin(args[0].clone())
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [tensor for tensor in tensors if tensor.is_cuda]
        if packet in READS + SHAPED and on_device:
            self.note(str(function))
        if packet is aten.index and on_device and any(tensor.dtype == torch.bool for tensor in tensors[1:]):
            self.note(f"{function} by a mask")
        result = function(*args, **kwargs)
        if packet in COPIES:
            self.note_copy(function, tensors, result, bool(kwargs.get("non_blocking", args[-1] is True)))
        elif on_device and any(not tensor.is_cuda and tensor.dim() for tensor in tensors):
            self.note(f"{function} of a tensor of the host")
        if kwargs.get("pin_memory"):
            self.pin(result)
        return result

    def note_copy(self, function: Any, tensors: Sequence[Tensor], result: Any, non_blocking: bool) -> None:
        """Note a copy if it is one between host and device that somebody waits for."""
        both = [*tensors, *(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))]
        on_host = [tensor for tensor in both if not tensor.is_cuda]
        if len(on_host) in (0, len(both)):
            return
        pageable = [tensor for tensor in on_host if id_of(tensor) not in self.pinned]
        if pageable or not non_blocking:
            self.note(f"{function} {'of pageable memory' if pageable else 'that blocks'}")

    def pin(self, tensor: Tensor) -> Tensor:
        """Return a tensor that is in pinned memory from now on."""
        self.pinned[id_of(tensor)] = tensor.untyped_storage()
        return tensor


def id_of(tensor: Tensor) -> int:
    """Return the number of the memory that a tensor lies in."""
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def counted_waits() -> Iterator[WaitCounter]:
    """Yield the count of waits of all that is computed inside, on fake CUDA tensors."""
    counter = WaitCounter()

    class CountedEvent:
        """A stand-in for `torch.Event`, which needs a driver."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            pass

        def record(self, stream: Any = None) -> None:
            """Record nothing."""

        def synchronize(self) -> None:
            """Count a wait."""
            counter.note("Event.synchronize")

    def waiting(name: str) -> Callable[..., None]:
        return lambda *arguments, **options: counter.note(name)

    with contextlib.ExitStack() as stack:
        stack.enter_context(fake_cuda())
        for module in (torch, torch.cuda):
            stack.enter_context(patch.object(module, "Event", CountedEvent))
        for module in (torch.cuda, torch.accelerator):
            name = f"{module.__name__}.synchronize"
            stack.enter_context(patch.object(module, "synchronize", waiting(name)))
        yield stack.enter_context(counter)


@dataclass(frozen=True)
class Case:
    """A run whose steps are counted."""

    num_micro_batches: int = 1
    changes: Mapping[str, Any] | None = None  # tables and keys of the configuration
    num_steps: int = 3


@dataclass(frozen=True)
class RandomData:
    """Batches as the loader makes them, without a cache."""

    spec: ModelSpec

    def training_batch(self, micro_batch: MicroBatch, *arguments: Any) -> Batch:
        """Return the batch of a planned micro-batch."""
        batch = random_batch(micro_batch.size, len(micro_batch.refs), self.spec)
        mask = torch.ones(batch.latents[:, :1].shape)
        return replace(batch, mask=mask, roles=torch.tensor([0, 1]))


def load(folder: Path, changes: Mapping[str, Any]) -> LoadedConfig:
    """Return the configuration of a run of the tiny model, which is written into the folder if it is not there."""
    pictures, tiny = folder / "pictures", folder / "tiny"
    if not pictures.exists():
        pictures.mkdir()
        Image.new("RGB", (SIZE.width, SIZE.height)).save(pictures / "a.png")
        write_tiny(tiny)
    base = {
        "output_dir": str(folder / "runs"),
        "max_steps": 10,
        "dataset": {"resolutions": [64], "directory": [{"path": str(pictures)}]},
        "model": {"type": "anima", "tiny_path": str(tiny), "dtype": "bfloat16", "llm_adapter_lr": 0},
        "adapter": {"type": "lora", "rank": 4},
        "optimizer": {"type": "adamw", "lr": 1e-3},
    }
    path = folder / "config.toml"
    merged = {**base, **changes}
    path.write_text(tomli_w.dumps({key: value for key, value in merged.items() if value is not None}))
    return load_config(path, [])


def accelerator_on(device: torch.device, autocast: bool) -> Accelerator:
    """Return a run's accelerator, on this device even where Accelerate finds no GPU."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()  # Accelerate keeps one configuration per process
    accelerator = make_accelerator(autocast)
    PartialState().device = accelerator.state.device = device
    return accelerator


def context(loaded: LoadedConfig, folder: Path) -> RunContext:
    """Return the context of a run on the device."""
    return RunContext(
        loaded, accelerator_on(CUDA, loaded.config.model.uses_autocast), RunFolder(folder / "runs", "run"),
        ResumePoint("run"), SignalHandler(folder), WarningsHandler(), contextlib.ExitStack(), MemoryContext("counting"),
        divides=False,
    )  # fmt: skip


def state_on_device(run: RunContext, transformer: MiniTrainDIT) -> TrainState:
    """Return a transformer in training on the device, as `build_model` makes it."""
    config = run.config
    transformer.to(CUDA)
    if config.blocks_to_swap:
        swap = transformer.block_swap = BlockSwap(transformer, config.blocks_to_swap, CUDA)
        transformer.run_block = swap.around(transformer.run_block)
    groups = optimizer_groups(
        transformer.named_parameters(), config.learning_rates(), config.optimizer.weight_decay
    )  # fmt: skip
    trained = {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    ema = None if config.ema is None else WeightAverage(trained, config.ema)
    model = run.accelerator.prepare(transformer)
    optimizer, release = build_optimizer(config.optimizer, groups, config.seed)
    return TrainState(transformer, model, optimizer, ema, lambda step: 1.0, release=release)  # type: ignore[arg-type]


def steps_of(num_micro_batches: int) -> Iterator[RankStep]:
    """Yield steps without end."""
    micro_batch = MicroBatch(SIZE, (SampleRef(0, 0), SampleRef(0, 1)))
    mine = [RankMicroBatch(micro_batch, SIZE.width, False, address) for address in range(num_micro_batches)]
    index = 0
    while True:
        yield RankStep(index, 0, Step((micro_batch,) * num_micro_batches), mine)
        index += 1


def waits_of_steps(case: Case, folder: Path) -> list[list[str]]:
    """Return the waits of each optimizer step; the first tells of none before it."""
    loaded = load(folder, case.changes or {})
    config = loaded.config
    spec = build_model_spec(config, torch.device("cpu"))
    transformer, _ = load_trained(
        spec, config.adapter, config.learning_rates(), config.seed, config.optimizer.weight_decay,
        block_runner(config.recompute, config.compile, CUDA, config.checkpointed_blocks),
    )  # fmt: skip
    run = context(loaded, folder)
    found = []
    with counted_waits() as counter:
        state = state_on_device(run, transformer)
        sums, guard = StepSums(CUDA, has_roles=True), UpdateGuard(CUDA, 0)
        late = LateSteps(1, lambda made: made.result(), lambda made: None)
        steps = steps_of(case.num_micro_batches)
        with prefetch_steps(steps, RandomData(spec), lambda *_: 0.5, 0.0, 0, pins=True) as prefetched:  # type: ignore[arg-type]
            for _ in range(case.num_steps):
                counter.found.clear()
                step, batches = next(prefetched)
                late.add(train_step(run, state, step, batches, sums, guard))
                found.append(list(counter.found))
    return found


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the most waits that a step of a LoRA with four micro-batches has, the average and clipping on."""
    case = Case(4, {"ema": {"decay": 0.99}, "gradient_clipping": 1.0})
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = waits_of_steps(case, Path(folder))
    return [{"waits": max(map(len, found))}]
