"""The room that a run's files take on a disk: an upper bound before the run, and a check before each training state."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anima_train.core.files import BLOCK, DiskRequirement, free_bytes, on_disk
from anima_train.core.format import format_bytes
from anima_train.model.safetensors_io import file_bytes
from anima_train.optim.moved import MAX_SAMPLE
from anima_train.optim.optimizers import AnyOptimizer
from anima_train.optim.state_shapes import optimizer_state
from anima_train.sampling.generate import Request

METADATA = 2048  # bytes of what saved weights say about themselves, at most
MANIFEST = 6 * BLOCK  # bytes of a state's folder and `state.json`, which holds the configuration
PICTURE_FACTS = 4096  # bytes of a picture's file beside its pixels
MIN_KEEP_LAST = 2  # as the configuration allows


@dataclass(frozen=True)
class FileSizes:
    """Bytes on disk of what a run writes again and again, at most."""

    weights: int
    state: int
    pictures: int  # all previews of a step, in their folder and in the trackers


def weights_bytes(weights: Mapping[str, Tensor]) -> int:
    """Return what saved weights take of the disk, at most; tensors on the meta device will do."""
    return on_disk(file_bytes(weights, {}) + METADATA)


def state_bytes(*files: Mapping[str, Tensor]) -> int:
    """Return what a training state with these tensors in its files takes of the disk, at most."""
    return sum(on_disk(file_bytes(tensors, {})) for tensors in files) + MANIFEST


def first_state_bytes(
    trained: Mapping[str, Tensor], optimizer: AnyOptimizer, has_average: bool, has_start: bool = False
) -> int:
    """Return `state_bytes` of a run that has not begun.

    Args:
        trained: the trained parameters by name, on any device.
        optimizer: its settings.
        has_average: True if the run has an average of the weights, which is in float32.
        has_start: True if the run keeps a sample of the weights before the first step.
    """
    states = zip(trained, optimizer_state(optimizer, trained.values()), strict=True)
    moments = {f"{name}.{key}": tensor for name, state in states for key, tensor in state.items()}
    average = {name: torch.empty(tensor.shape, device="meta") for name, tensor in trained.items()}
    start = {"sample": torch.empty(MAX_SAMPLE, device="meta")}
    return state_bytes(trained, moments, *([average] if has_average else []), *([start] if has_start else []))


def picture_bytes(request: Request) -> int:
    """Return what a picture's file takes of the disk, at most: pixels that cannot be compressed."""
    return on_disk(request.height * (3 * request.width + 1) * 1001 // 1000 + PICTURE_FACTS)


def first_requirements(folder: Path, sizes: FileSizes, saves_states: bool) -> list[DiskRequirement]:
    """Return the room without which there is no use in beginning a run in this folder."""
    weights = DiskRequirement(folder, sizes.weights, "the first saved weights")
    return [weights, DiskRequirement(folder, sizes.state, "one training state")] if saves_states else [weights]


@dataclass(frozen=True)
class DiskPlan:
    """An upper bound of what a run will write and keep.

    Left out are reports and numbers, and what is saved as minutes pass or somebody asks.
    """

    folder: Path  # of the run
    sizes: FileSizes
    num_weights: int
    num_states: int
    num_previews: int  # steps after which there are some
    base_velocities: int = 0  # bytes of what a full fine-tune keeps of its base

    @property
    def kinds(self) -> tuple[tuple[str, int, int], ...]:
        """The name, the number and the bytes of one file of each kind."""
        return (
            ("weights", self.num_weights, self.sizes.weights),
            ("training state", self.num_states, self.sizes.state),
            ("previews", self.num_previews, self.sizes.pictures),
            ("velocities of the base", int(self.base_velocities > 0), self.base_velocities),
        )

    @property
    def num_bytes(self) -> int:
        """The bytes on disk of all files."""
        return sum(number * size for _, number, size in self.kinds)

    def described(self) -> str:
        """Return the number and the bytes of each kind of file."""
        return ", ".join(
            f"{number:,} x {kind} ({format_bytes(number * size)})" for kind, number, size in self.kinds if number
        )

    def warning(self, keep_last: int) -> str | None:
        """Return what to change where the disk may not hold it all; None where it will."""
        free = free_bytes(self.folder)
        if self.num_bytes <= free:
            return None
        changes = ["free some space"]
        if self.num_weights > 1:
            changes.append("save weights less often (save_every_n_...)")
        if self.num_states and keep_last > MIN_KEEP_LAST:
            changes.append(f"keep_last below {keep_last}")
        if self.num_previews > 1:
            changes.append("draw previews less often")
        if self.base_velocities:
            changes.append("drift = false, or fewer images, levels or repeats in eval_datasets")
        return (
            f"{self.folder}: the disk may become full: {self.described()} need up to {format_bytes(self.num_bytes)}, "
            f"{format_bytes(free)} free, {format_bytes(self.num_bytes - free)} missing; "
            f"{', '.join([*changes, 'or set another output_dir'])}"
        )
