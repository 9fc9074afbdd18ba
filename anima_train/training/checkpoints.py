"""What a run leaves: the weights users load elsewhere, and the state to go on from. Safetensors and JSON only."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from anima_train.core.errors import ModelFileError, NumericError, count
from anima_train.core.files import atomic_path, sync, write_text
from anima_train.core.settings import Settings
from anima_train.model.weights import match_keys, open_header, read_tensors, write_tensors

STATE_FOLDER = re.compile(r"step-(\d+)")


def save_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a LoRA or a checkpoint atomically, after reading back every key, shape and value of it.

    Raises:
        NumericError: a weight is not finite; nothing is written.
        SpaceError: the disk is full; earlier files are intact.
        ModelFileError: the disk does not give back what was written; earlier files are intact.
    """
    check_finite(path, tensors)
    with atomic_path(path) as temporary:
        write_tensors(temporary, tensors, {"format": "pt", **metadata})
        found = open_header(temporary)
        match_keys(found.entries, tensors, f"{path}: reads back with other keys than were written; check the disk")
        for name, tensor in read_tensors(found):
            if not torch.equal(tensor, tensors[name].detach().cpu()):
                raise ModelFileError(f"{path}: {name} reads back with other values than were written; check the disk")


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise NumericError if any tensor that is about to be saved holds NaN or infinity."""
    if broken := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise NumericError(
            f"{path.name}: not saved, because {count(len(broken), 'tensor')} of {len(tensors):,} hold NaN or infinity, "
            f"such as {broken[0]}; earlier files are intact"
        )


class StateFacts(Settings):
    """What `state.json` says."""

    version: Literal[1] = 1
    step: int = Field(ge=0)
    optimizer: str


def save_state(folder: Path, step: int, transformer: nn.Module, optimizer: Optimizer, keep_last: int) -> Path:
    """Write the training state after `step` optimizer steps, then remove all but the newest `keep_last`.

    Trained weights and the optimizer's moments as they are in memory, nothing converted. The folder gets its name only
    when everything in it is on disk.

    Raises:
        NumericError: a weight or a moment is not finite; earlier states are intact.
        SpaceError: the disk is full; earlier states are intact.
    """
    final = folder / f"step-{step:06d}"
    temporary = folder / f".{final.name}.tmp"
    for abandoned in folder.glob(".step-*.tmp"):  # of a process that was killed while saving
        shutil.rmtree(abandoned)
    weights = trained_parameters(transformer)
    moments = optimizer_tensors(optimizer, weights)
    for tensors in (weights, moments):
        check_finite(final, tensors)
    try:
        for name, tensors in (("weights", weights), ("optimizer", moments)):
            with atomic_path(temporary / f"{name}.safetensors") as path:
                write_tensors(path, tensors, {})
        facts = StateFacts(step=step, optimizer=type(optimizer).__name__)
        write_text(temporary / "state.json", facts.model_dump_json())
        sync(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(folder)
    for old in saved_states(folder)[:-keep_last]:
        if old != final:
            shutil.rmtree(old)
    return final


def saved_states(folder: Path) -> list[Path]:
    """The training states in a folder, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := STATE_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def load_state(folder: Path, transformer: nn.Module, optimizer: Optimizer) -> int:
    """Put a saved state back; returns the number of steps done. Nothing is changed unless all of it can be read.

    Raises:
        ModelFileError: it is damaged, or was saved by a run with other trained parameters or another optimizer.
    """
    try:
        facts = StateFacts.model_validate_json((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(
            f"{folder}: state.json is missing, damaged or of another version; remove the folder to resume from the one "
            "before"
        ) from error
    kind = type(optimizer).__name__
    if facts.optimizer != kind:
        raise ModelFileError(
            f"{folder}: saved with the optimizer {facts.optimizer}, and the configuration makes {kind}; resume with "
            "the configuration the run was started with"
        )
    trained = trained_parameters(transformer)
    weights = open_header(folder / "weights.safetensors")
    match_keys(weights.entries, trained, f"{folder}: saved by a run that trains other parameters")
    if other := [name for name, entry in weights.entries.items() if entry.dtype != trained[name].dtype]:
        found, expected = weights.entries[other[0]].dtype, trained[other[0]].dtype
        raise ModelFileError(
            f"{folder}: saved by a run that trains in another dtype: {other[0]} is {found}, expected {expected}"
        )
    saved = dict(read_tensors(weights))
    state: dict[int, dict[str, Tensor]] = {}
    indices = {name: index for index, name in enumerate(names_in_order(optimizer, trained))}
    for name, tensor in read_tensors(open_header(folder / "optimizer.safetensors")):
        parameter, _, key = name.rpartition(".")
        if parameter not in indices:
            raise ModelFileError(f"{folder}: the optimizer's state is of other parameters, such as {parameter}")
        state.setdefault(indices[parameter], {})[key] = tensor

    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    with torch.no_grad():
        for name, tensor in saved.items():
            trained[name].copy_(tensor)
    return facts.step


def trained_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that get updates, by name."""
    return {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}


def names_in_order(optimizer: Optimizer, trained: Mapping[str, nn.Parameter]) -> list[str]:
    """The name of each of the optimizer's parameters, in the order in which its state counts them."""
    names = {id(parameter): name for name, parameter in trained.items()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_tensors(optimizer: Optimizer, trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Every state tensor as `PARAMETER.NAME`."""
    names = names_in_order(optimizer, trained)
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {f"{names[index]}.{key}": tensor for index, entry in state.items() for key, tensor in entry.items()}
