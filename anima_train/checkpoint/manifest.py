"""The record of a training state, `state.json`: what the state is of, and the hashes by which all of it is checked."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from anima_train.core.errors import ModelFileError
from anima_train.core.files import sha256_file
from anima_train.core.settings import Settings
from anima_train.run.folder import DAMAGED

STATE_FOLDER = re.compile(r"step-(\d+)")
MANIFEST, CHECKSUM = "state.json", "checksum"
SAMPLES = "samples.json"
VERSION = 3  # of the layout
READABLE = (2, 3)  # 2 has no checksum


class FileEntry(Settings):
    """One file of a state."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class StateManifest(Settings):
    """The content of `state.json`."""

    version: Literal[2, 3] = 3
    step: int = Field(ge=0)
    """Optimizer steps that were done."""
    optimizer: str
    """Class of the optimizer."""
    pending: list[str] = Field(default=[])
    """Tasks that were due after the step but left for the process that resumes."""
    score: float | None = None
    """Mean loss of the validation sets, or of all sets where none is of validation, after the step, if measured."""
    run: dict[str, Any] = Field(default={})
    """The facts that the run was made from, as in its manifest."""
    config: dict[str, Any] = Field(default={})
    """The resolved configuration."""
    records: dict[str, str] = Field(default={})
    """The SHA-256 of what the run had logged until then, by the name of the file in its folder."""
    files: dict[str, FileEntry] = Field(default={})
    """Those beside this one."""

    def text(self) -> str:
        """Return the content of the file, with its checksum."""
        values = self.model_dump(mode="json")
        return json.dumps(values | {CHECKSUM: checksum(values)}, indent=1)


def checksum(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON object, however it is spaced."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class SavedState:
    """A state on disk."""

    folder: Path
    manifest: StateManifest


class DamagedState(ModelFileError):
    """A state that is not what was written; the one before may be."""


def entry_of(path: Path) -> FileEntry:
    """Return the size and the hash of a file that was written."""
    return FileEntry(bytes=path.stat().st_size, sha256=sha256_file(path))


def contradictions(folder: Path, manifest: StateManifest) -> Iterator[str]:
    """Yield in which way a manifest does not belong to its folder, or cannot be right."""
    step, num_steps = manifest.step, manifest.run.get("num_steps", manifest.step)
    if (match := STATE_FOLDER.fullmatch(folder.name)) is not None and int(match[1]) != step:
        yield f"{MANIFEST} is of step {step}"
    if not isinstance(num_steps, int) or step > num_steps:
        yield f"{MANIFEST} is of step {step} in a run of {num_steps}"
    if not {"weights.safetensors", "optimizer.safetensors"} <= manifest.files.keys():
        yield "files are missing"


def read_manifest(folder: Path) -> StateManifest:
    """Read a state's manifest.

    Raises:
        DamagedState: it is missing or cannot be read.
        ModelFileError: it is of another version.
    """
    try:
        values = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
        version, stored = int(values["version"]), values.pop(CHECKSUM, None)
    except (OSError, *DAMAGED) as error:
        raise DamagedState(f"{folder}: damaged: {MANIFEST} is missing or cannot be read") from error
    if stored != checksum(values) and (stored is not None or version == VERSION):
        raise DamagedState(f"{folder}: damaged: {MANIFEST} has other content than was written")
    if version not in READABLE:
        raise ModelFileError(
            f"{folder}: a training state of version {version}, and this anima-train reads version "
            f"{' and '.join(map(str, READABLE))}; resume with the anima-train that wrote it"
        )
    try:
        return StateManifest.model_validate(values)
    except ValueError as error:
        raise DamagedState(f"{folder}: damaged: {MANIFEST} is damaged") from error
