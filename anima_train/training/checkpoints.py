"""What a run leaves: the weights users load elsewhere, and the state to go on from. Safetensors and JSON only."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from anima_train.core.errors import ModelFileError, NumericError
from anima_train.core.files import atomic_path, sync, write_text
from anima_train.model.weights import open_header, read_tensors

STATE_FOLDER = re.compile(r"step-(\d+)")


def save_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a LoRA or a checkpoint atomically, open it again and check every key, shape and value.

    Raises:
        NumericError: a weight is not finite; nothing is written.
        SpaceError: the disk is full; earlier files are intact.
    """
    held = {name: tensor.detach().to("cpu").contiguous() for name, tensor in sorted(tensors.items())}
    if broken := [name for name, tensor in held.items() if not bool(torch.isfinite(tensor).all())]:
        raise NumericError(f"{path.name}: not saved, {len(broken)} tensors are not finite, such as {broken[0]}")
    with atomic_path(path) as temporary:
        save_file(held, temporary, metadata={"format": "pt", **metadata})
    header = open_header(path)
    if set(header.entries) != set(held):
        raise ModelFileError(f"{path}: holds other keys than were written; check the disk")
    for name, tensor in read_tensors(header):
        if not torch.equal(tensor, held[name]):
            raise ModelFileError(f"{path}: {name} reads back with other values than were written; check the disk")


def save_state(folder: Path, step: int, transformer: nn.Module, optimizer: Optimizer, keep_last: int) -> Path:
    """Write the training state after `step` optimizer steps, then remove all but the newest `keep_last`.

    Trained weights and the optimizer's moments as they are in memory, nothing converted. The folder gets its name only
    when everything in it is on disk.
    """
    final = folder / f"step-{step:06d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    weights = {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    write_tensors(temporary / "weights.safetensors", weights)
    write_tensors(temporary / "optimizer.safetensors", optimizer_tensors(optimizer))
    write_text(temporary / "state.json", json.dumps({"step": step, "optimizer": type(optimizer).__name__}))
    sync(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    sync(folder)
    for old in saved_states(folder)[:-keep_last]:
        shutil.rmtree(old)
    return final


def saved_states(folder: Path) -> list[Path]:
    """The training states in a folder, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := STATE_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def load_state(folder: Path, transformer: nn.Module, optimizer: Optimizer) -> int:
    """Put a saved state back; returns the number of steps done.

    Raises:
        ModelFileError: it was saved by a run with other trained parameters or another optimizer.
    """
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state["optimizer"] != type(optimizer).__name__:
        raise ModelFileError(f"{folder}: saved with optimizer {state['optimizer']}, not {type(optimizer).__name__}")
    trained = {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    saved = dict(read_tensors(open_header(folder / "weights.safetensors")))
    if set(saved) != set(trained):
        difference = sorted(set(saved) ^ set(trained))
        raise ModelFileError(
            f"{folder}: saved with other trained parameters ({len(difference)} differ, such as {difference[0]})"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])
    entries: dict[int, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(open_header(folder / "optimizer.safetensors")):
        index, _, key = name.partition(".")
        entries.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    step: int = state["step"]
    return step


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Every state tensor as `INDEX.NAME`, the index being the parameter's place in the groups."""
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {f"{index}.{name}": tensor for index, entry in state.items() for name, tensor in entry.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Tensors to a safetensors file, atomically."""
    with atomic_path(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
