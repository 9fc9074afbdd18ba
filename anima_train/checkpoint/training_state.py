"""Training states: all that a run needs to be resumed, in folders that are either whole or not there.

A folder `step-000123` holds `weights`, `optimizer`, with [ema] `average`, and in a run that began with a LoRA `start`
as safetensors; `samples.json`, the images and captions that were trained; and `state.json`, which is written last: what
the state is of, the size and SHA-256 of each file, and a checksum of itself. Nothing in it is ever unpickled.
"""

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anima_train.adapters.lora import Lora
from anima_train.adapters.read import STATE_OF, STATE_SCALE
from anima_train.checkpoint.async_writer import Groups
from anima_train.checkpoint.disk_space import state_bytes
from anima_train.checkpoint.manifest import (
    MANIFEST,
    SAMPLES,
    STATE_FOLDER,
    DamagedState,
    SavedState,
    StateManifest,
    contradictions,
    entry_of,
    read_manifest,
)  # fmt: skip
from anima_train.checkpoint.weights import check_finite
from anima_train.core.divided import is_divided
from anima_train.core.errors import ModelFileError
from anima_train.core.files import (
    DiskRequirement,
    disk_errors,
    on_disk,
    require_space,
    sha256_file,
    sync,
    write_text,
)  # fmt: skip
from anima_train.model.dit import MiniTrainDIT
from anima_train.model.safetensors_io import TensorFile, match_keys, open_header, read_tensors, take_part, write_tensors
from anima_train.optim.ema import WeightAverage

if TYPE_CHECKING:
    from anima_train.model.sharding import Shards  # takes long to import

logger = logging.getLogger(__name__)

PEFT_NAME = re.compile(r"(\.lora_[AB])\.default\.weight")
START = "start"  # group of a sample of the weights before the first step, see `start_name`
NO_ROOM = "free some space, then resume with the same command or --resume; earlier files are intact"


def state_tensors(
    transformer: nn.Module, optimizer: Optimizer, average: WeightAverage | None = None, shards: "Shards | None" = None
) -> Groups:
    """Return the tensors of a state as they are in memory, nothing converted or copied.

    Args:
        transformer: that trains.
        optimizer: that trains it.
        average: of its weights.
        shards: what this process holds of a divided transformer; all tensors are divided then, like its weights.
    """
    weights = trained_parameters(transformer)
    if shards is None:
        groups: Groups = {"weights": trained_weights(transformer), "optimizer": optimizer_tensors(optimizer, weights)}
        return groups if average is None else {**groups, "average": average.tensors}
    moments = optimizer_tensors(optimizer, shards.parameters)
    groups = {
        "weights": weights,
        "optimizer": {name: shards.divided(name.rpartition(".")[0], rows) for name, rows in moments.items()},
    }
    if average is None:
        return groups
    return {**groups, "average": {name: shards.divided(name, rows) for name, rows in average.tensors.items()}}


def save_state(
    folder: Path, manifest: StateManifest, groups: Groups, keep_last: int, samples: bytes | None = None
) -> Path:
    """Write a state, then remove all but the newest `keep_last` and the best.

    The folder gets its name only when everything in it is on disk. A whole state of this step that is there stays.

    Args:
        folder: the run's `checkpoints`.
        manifest: all but the files.
        groups: the tensors of each file.
        keep_last: number of states.
        samples: content of `samples.json`.

    Raises:
        NumericError: a weight or a moment is not finite; earlier states are intact.
        SpaceError: the disk is full; earlier states are intact.
    """
    final = folder / f"step-{manifest.step:06d}"
    temporary = folder / f".{final.name}.tmp"
    remove_unfinished(folder)
    for tensors in groups.values():
        check_finite(final, {name: tensor for name, tensor in tensors.items() if not is_divided(tensor)})
    with contextlib.suppress(DamagedState):
        if final.exists():
            found = check_state(final).folder
            take_part_in(groups)  # other processes do, too
            return found
    num_bytes = state_bytes(*groups.values()) + on_disk(len(samples or b""))
    require_space([DiskRequirement(folder, num_bytes, f"the training state {final.name}")], NO_ROOM)
    with disk_errors(final, num_bytes):
        try:
            temporary.mkdir(parents=True)
            files = {}
            for name, tensors in groups.items():
                path = temporary / f"{name}.safetensors"
                facts = lora_facts(manifest.config, tensors) if name == "weights" else {}
                write_tensors(path, tensors, facts, partial(look, final, tensors))
                sync(path)
                files[path.name] = entry_of(path)
            if samples is not None:
                (temporary / SAMPLES).write_bytes(samples)
                sync(temporary / SAMPLES)
                files[SAMPLES] = entry_of(temporary / SAMPLES)
            write_text(temporary / MANIFEST, manifest.model_copy(update={"files": files}).text())
            sync(temporary)
            remove(final)
            temporary.rename(final)
            sync(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        prune_states(folder, final, keep_last)
    return final


def lora_facts(resolved: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Return the metadata that tell a state's weights from a file: alpha is not folded into them, and here for a LoRA.

    Args:
        resolved: the configuration.
        names: of the weights.
    """
    adapter = resolved.get("adapter", {})
    mark = {} if adapter.get("type", "full") == "full" else {STATE_OF: adapter["type"]}
    if adapter.get("type") != "lora":
        return mark
    settings = Lora.model_validate(adapter)
    if not settings.is_plain:
        return mark
    scales = {module: settings.scale_of(module) for module in (name.rpartition(".")[0] for name in names)}
    values = set(scales.values())
    return mark | {STATE_SCALE: str(values.pop()) if len(values) == 1 else json.dumps(scales)}


def remove_unfinished(folder: Path) -> None:
    """Remove what a process that was killed has left of states that it wrote or removed."""
    for abandoned in folder.glob(".step-*.tmp"):
        shutil.rmtree(abandoned, ignore_errors=True)


def look(folder: Path, tensors: Mapping[str, Tensor], name: str, tensor: Tensor) -> None:
    """Raise NumericError if a tensor that was gathered to be saved holds NaN or infinity; the others are checked."""
    if is_divided(tensors[name]):
        check_finite(folder, {name: tensor})


def take_part_in(groups: Groups) -> None:
    """Give the parts that this process holds of a state's tensors, which process 0 writes."""
    for tensors in groups.values():
        take_part(tensors)


def prune_states(folder: Path, newest: Path, keep_last: int) -> None:
    """Remove all states but the newest `keep_last`, the one just saved, and that of the lowest score."""
    states = saved_states(folder)
    scores = {path: score for path in states if (score := score_of(path)) is not None}
    best = min(scores, key=lambda path: scores[path], default=None)
    for old in states[:-keep_last]:
        if old not in (newest, best):
            remove(old)


def score_of(folder: Path) -> float | None:
    """Return a state's mean loss of the validation sets, see its manifest; None if it has none or cannot be read."""
    try:
        return read_manifest(folder).score
    except ModelFileError:
        return None


def remove(folder: Path) -> None:
    """Remove a state in such an order that no part of it is ever taken for a state."""
    if folder.exists():
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.old.tmp")))


def saved_states(folder: Path) -> list[Path]:
    """Return the training states in a folder, oldest first."""
    found = [path for path in folder.glob("step-*") if STATE_FOLDER.fullmatch(path.name)]
    return sorted(found, key=lambda path: (step_of(path), path))


def step_of(folder: Path) -> int:
    """Return the step in the name of a state's folder."""
    return int(folder.name.removeprefix("step-"))


def newest_state(folder: Path) -> SavedState | None:
    """Return the newest state in a folder that is as it was written, with a warning for each damaged one after it.

    Args:
        folder: the run's `checkpoints`.

    Returns:
        None if there is no state at all.

    Raises:
        DamagedState: all are, with a problem for each.
        ModelFileError: one is of another version.
    """
    problems: list[str] = []
    for path in reversed(saved_states(folder)):
        try:
            found = check_state(path)
        except DamagedState as error:
            problems.extend(error.problems)
            continue
        for problem in problems:
            logger.warning("%s; going back to step %d", problem, found.manifest.step)
        return found
    if problems:
        raise DamagedState(problems)
    return None


def earlier_state(folder: Path) -> Path | None:
    """Return the newest state before one that is as it was written; None if there is none."""
    for path in reversed([path for path in saved_states(folder.parent) if step_of(path) < step_of(folder)]):
        with contextlib.suppress(ModelFileError):
            return check_state(path).folder
    return None


def check_state(folder: Path) -> SavedState:
    """Read a state's manifest, and compare size and hash of every file with it.

    Raises:
        DamagedState: something is missing or differs.
        ModelFileError: it is of another version.
    """
    manifest = read_manifest(folder)
    problems = list(contradictions(folder, manifest))
    for name, expected in manifest.files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            problems.append(f"{name} is missing")
        elif (size := path.stat().st_size) != expected.bytes:
            problems.append(f"{name} has {size:,} bytes, {expected.bytes:,} were written")
        elif sha256_file(path) != expected.sha256:
            problems.append(f"{name} has other content than was written")
    if problems:
        raise DamagedState(f"{folder}: damaged: {'; '.join(problems)}")
    return SavedState(folder, manifest)


def load_state(
    saved: SavedState,
    transformer: nn.Module,
    optimizer: Optimizer,
    average: WeightAverage | None = None,
    shards: "Shards | None" = None,
) -> None:
    """Put a checked state back. Nothing is changed unless all of it can be read.

    Args:
        saved: the state; any number of processes may have written it.
        transformer: that trains.
        optimizer: that trains it.
        average: of its weights.
        shards: what this process holds of a divided transformer; it keeps its rows of each tensor.

    Raises:
        ModelFileError: it was saved by a run with other trained parameters or another optimizer.
    """
    folder = saved.folder
    kind = type(optimizer).__name__
    if saved.manifest.optimizer != kind:
        raise ModelFileError(
            f"{folder}: saved with the optimizer {saved.manifest.optimizer}, and the configuration makes {kind}; "
            "resume with the configuration the run was started with"
        )
    trained = trained_parameters(transformer)
    header = open_tensors(folder / "weights.safetensors")
    match_keys(header.entries, trained, f"{folder}: saved by a run that trains other parameters")
    if other := [name for name, entry in header.entries.items() if entry.dtype != trained[name].dtype]:
        found, expected = header.entries[other[0]].dtype, trained[other[0]].dtype
        raise ModelFileError(
            f"{folder}: saved by a run that trains in another dtype: {other[0]} is {found}, expected {expected}"
        )
    rows: Callable[[Tensor], Tensor] = shards.rows if shards is not None else lambda tensor: tensor
    weights = {name: rows(tensor) for name, tensor in read_tensors(header)}
    averages = None
    if average is not None:
        if "average.safetensors" not in saved.manifest.files:
            raise ModelFileError(f"{folder}: saved by a run without [ema]; remove it, or start another run")
        read = read_tensors(open_tensors(folder / "average.safetensors"))
        averages = {name: rows(tensor) for name, tensor in read}
    state = read_optimizer(folder, names_in_order(optimizer, trained if shards is None else shards.parameters), rows)
    if average is not None and averages is not None:
        average.load(averages, f"{folder}: saved by a run that trains other parameters")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    with torch.no_grad():
        places: Mapping[str, Tensor] = trained_weights(transformer) if shards is None else shards.parameters
        for name, tensor in weights.items():
            places[name].copy_(tensor)


def read_optimizer(
    folder: Path, names: Sequence[str], rows: Callable[[Tensor], Tensor]
) -> dict[int, dict[str, Tensor]]:
    """Return a state's moments by the place of their parameter, as `Optimizer.load_state_dict` takes them.

    Args:
        folder: of the state.
        names: of the parameters, in the optimizer's order.
        rows: gives the rows of a tensor that this process holds.

    Raises:
        ModelFileError: they are of other parameters.
    """
    state: dict[int, dict[str, Tensor]] = {}
    indices = {name: index for index, name in enumerate(names)}
    for name, tensor in read_tensors(open_tensors(folder / "optimizer.safetensors")):
        parameter, _, key = name.rpartition(".")
        if parameter not in indices:
            raise ModelFileError(f"{folder}: the optimizer's state is of other parameters, such as {parameter}")
        state.setdefault(indices[parameter], {})[key] = rows(tensor)
    return state


def start_name(shards: "Shards | None") -> str:
    """Return the name of the main process's sample of the weights before the first step.

    Of a model that is divided otherwise, it is a sample of other weights.
    """
    return f"sample_of_{1 if shards is None else shards.mesh.size()}"


def read_start(saved: SavedState, name: str) -> Tensor | None:
    """Return a sample of the weights before the first step; None if the state holds none of this name."""
    if f"{START}.safetensors" not in saved.manifest.files:
        return None
    return dict(read_tensors(open_header(saved.folder / f"{START}.safetensors"))).get(name)


def open_tensors(path: Path) -> TensorFile:
    """Read the header of a state's file, LoRA weights under the names they have now; they once had PEFT's."""
    header = open_header(path)
    entries = {PEFT_NAME.sub(r"\1", name): entry for name, entry in header.entries.items()}
    return TensorFile(path, entries, header.metadata)


def trained_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that get updates, by name."""
    return {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}


def trained_weights(transformer: nn.Module) -> dict[str, Tensor]:
    """Return the values of the parameters that get updates, by name; those of swapped blocks are on the host."""
    trained = trained_parameters(transformer)
    if not isinstance(transformer, MiniTrainDIT):
        return {name: parameter.detach() for name, parameter in trained.items()}
    return {name: weight for name, weight in transformer.weights().items() if name in trained}


def names_in_order(optimizer: Optimizer, trained: Mapping[str, nn.Parameter]) -> list[str]:
    """Return the name of each of the optimizer's parameters, in the order in which its state counts them."""
    names = {id(parameter): name for name, parameter in trained.items()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_tensors(optimizer: Optimizer, trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return every state tensor of the optimizer as `PARAMETER.NAME`."""
    names = names_in_order(optimizer, trained)
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {f"{names[index]}.{key}": tensor for index, entry in state.items() for key, tensor in entry.items()}
