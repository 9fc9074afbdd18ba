"""The base model's velocity where drift is measured: from the same weights, or kept from before the first step."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anima_train.core.errors import ModelFileError
from anima_train.core.files import atomic_path
from anima_train.data.loader import Batch
from anima_train.model.safetensors_io import TensorFile, file_bytes, open_header, read_tensors, write_tensors
from anima_train.objective.step import predict

IDENTITY = "evaluation"  # the key of the metadata that tell what the velocities are of


class BaseVelocity(Protocol):
    """A function that knows the base model's velocity."""

    num_passes: ClassVar[int]  # of the model that it takes

    def __call__(
        self, batch: Batch, places: Sequence[str], velocity: Float[Tensor, "B C 1 H W"]
    ) -> Float[Tensor, "B C 1 H W"]:
        """Return the base's velocity.

        Args:
            batch: on the device.
            places: the name of each sample at its point, see `place_name`.
            velocity: of the model as it is.
        """


def place_name(sample: int, point: int) -> str:
    """Return the name of a sample at a point of its set."""
    return f"{sample}.{point}"


@dataclass(frozen=True)
class FromWeights:
    """The base is the same weights without what is trained beside them."""

    transformer: nn.Module
    as_base: Callable[[], AbstractContextManager[None]]  # makes it the base while its context is open
    num_passes: ClassVar[int] = 1

    def __call__(self, batch: Batch, places: Sequence[str], velocity: Tensor) -> Tensor:
        """Return the base's velocity, from a second pass."""
        with self.as_base():
            return predict(self.transformer, batch)


class Recording:
    """The model as it is is the base: its velocities are kept for later evaluations."""

    num_passes: ClassVar[int] = 0

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def __call__(self, batch: Batch, places: Sequence[str], velocity: Tensor) -> Tensor:
        """Return the velocity, after keeping it."""
        self.tensors.update(zip(places, velocity.float().cpu(), strict=True))
        return velocity

    def save(self, folder: Path, name: str, identity: Mapping[str, object], rank: int) -> None:
        """Write what this process has evaluated of a set; `identity` tells its pictures and noise.

        Raises:
            SpaceError: the disk is full or read-only.
        """
        metadata = {IDENTITY: json.dumps(identity)}
        path = folder_of(folder, name) / f"{rank}.safetensors"
        with atomic_path(path, file_bytes(self.tensors, metadata)) as temporary:
            write_tensors(temporary, self.tensors, metadata)


@dataclass(frozen=True)
class Recorded:
    """The velocities were kept before the first step."""

    files: Mapping[str, TensorFile]  # by the name of the place
    num_passes: ClassVar[int] = 0

    def __call__(self, batch: Batch, places: Sequence[str], velocity: Tensor) -> Tensor:
        """Return the kept velocities.

        Raises:
            ModelFileError: a file is damaged.
        """
        kept = [tensor for place in places for _, tensor in read_tensors(self.files[place], [place])]
        return torch.stack(kept).to(velocity.device)


def folder_of(folder: Path, name: str) -> Path:
    """Return the folder of the velocities of one set, whatever is in its name."""
    return folder / hashlib.sha256(name.encode()).hexdigest()[:16]


def recorded(folder: Path, name: str, identity: Mapping[str, object], places: Sequence[str]) -> Recorded | None:
    """Return the velocities that the processes have kept of a set; None where they are not all there, or of another.

    Args:
        folder: of the run's velocities.
        name: of the set.
        identity: its pictures and noise.
        places: the names of all that is evaluated.
    """
    files: dict[str, TensorFile] = {}
    for path in sorted(folder_of(folder, name).glob("*.safetensors")):
        with contextlib.suppress(ModelFileError, OSError):
            file = open_header(path)
            if file.metadata.get(IDENTITY) == json.dumps(identity):
                files |= dict.fromkeys(file.entries, file)
    return Recorded(files) if files.keys() >= set(places) else None
