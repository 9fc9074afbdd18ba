"""The samples that a run has seen, kept with its training states, so that a dataset that changed can say where."""

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import Field

from anima_train.adapters.choice import AnyAdapter
from anima_train.adapters.full import Full
from anima_train.adapters.read import STATE_SCALE
from anima_train.checkpoint.manifest import SAMPLES, SavedState
from anima_train.core.errors import DataError
from anima_train.core.format import printable
from anima_train.core.settings import Settings, toml_line
from anima_train.data.samples import Sample
from anima_train.model.loading import ModelFiles
from anima_train.model.safetensors_io import open_header
from anima_train.optim.groups import COMPONENTS

MAX_NAMED = 5  # files of each kind
LENGTH = 16  # characters of a hash: enough to tell two versions of one file apart
PARTS = ("image", "size", "captions", "mask")


class SampleRecords(Settings):
    """The content of `samples.json`: what `describe` says of each sample, by its id."""

    trained: dict[str, str] = Field(default={})
    unusable: dict[str, str] = Field(default={})
    """Those whose images could not be decoded or encoded."""


def describe(sample: Sample) -> str:
    """Return the hashes of a sample's image, captions and mask, and its size, in the order of `PARTS`."""
    captions = hashlib.sha256(json.dumps(sample.captions(0)).encode()).hexdigest()
    mask = (sample.picture.mask_sha256 or "alpha") if sample.has_mask else "none"
    return f"{sample.picture.sha256[:LENGTH]} {sample.size} {captions[:LENGTH]} {mask[:LENGTH]}"


def sample_records(trained: Iterable[Sample], unusable: Iterable[Sample]) -> bytes:
    """Return the content of `samples.json`."""
    records = SampleRecords(
        trained={sample.id: describe(sample) for sample in trained},
        unusable={sample.id: describe(sample) for sample in unusable},
    )
    return json.dumps(records.model_dump(), separators=(",", ":")).encode()


def records_bytes(samples: Sequence[Sample]) -> int:
    """Return the bytes of `samples.json`, at most, without looking at captions or files."""
    return 64 + sum(len(json.dumps(sample.id)) + 4 * LENGTH + 8 for sample in samples)


def check_same_samples(saved: SavedState, samples: Sequence[Sample], adapter: AnyAdapter, files: ModelFiles) -> None:
    """Refuse to resume from a state of another dataset.

    Args:
        saved: the state, whose files were checked. One of an earlier version has no records, and is passed over.
        samples: that the run would train on.
        adapter: what is trained.
        files: of the model.

    Raises:
        DataError: files were added, removed or changed: how many, the first five of each, and both ways on.
    """
    if SAMPLES not in saved.manifest.files:
        return
    before = SampleRecords.model_validate_json((saved.folder / SAMPLES).read_bytes())
    now = {sample.id: describe(sample) for sample in samples}
    if differences := "; ".join(name_differences(before, now)):
        raise changed_dataset(saved, differences, adapter, files)


def name_differences(before: SampleRecords, now: Mapping[str, str]) -> Iterator[str]:
    """Yield the files that were added, removed and changed, each kind in one text."""
    # What could not be used then cannot be used now: it is left out when the cache is filled, if not before.
    usable = {name: text for name, text in now.items() if name in before.trained or before.unusable.get(name) != text}
    old, new = parts_by_file(before.trained), parts_by_file(usable)
    several = len({file.partition("/")[0] for file in (*old, *new)}) > 1
    added = [shown_file(file, several) for file in new if file not in old]
    removed = [shown_file(file, several) for file in old if file not in new]
    changed = [
        f"{shown_file(file, several)} ({', '.join(part for part in PARTS if old[file][part] != parts[part])})"
        for file, parts in new.items()
        if old.get(file, parts) != parts
    ]
    for kind, names in (("added", added), ("removed", removed), ("changed", changed)):
        if names:
            shown = ", ".join(map(printable, names[:MAX_NAMED]))
            yield f"{len(names):,} {kind}: {shown}{', ...' if len(names) > MAX_NAMED else ''}"


def parts_by_file(records: Mapping[str, str]) -> dict[str, dict[str, set[str]]]:
    """Return what the samples of each file have, of all resolutions together, by the directory's number and the path.

    Args:
        records: what `describe` says of each sample, by its id.
    """
    files: dict[str, dict[str, set[str]]] = {}
    for name, text in records.items():
        file, _, resolution = name.rpartition("@")
        parts = files.setdefault(file, {part: set() for part in PARTS})
        for part, found in zip(PARTS, text.split(" "), strict=False):
            parts[part].add(f"{found} at {resolution}" if part == "size" else found)
    return files


def shown_file(file: str, several: bool) -> str:
    """Return the name of a file for a message: with its directory where there are several."""
    number, _, path = file.partition("/")
    return f"directory[{number}]/{path}" if several else path


def changed_dataset(saved: SavedState, differences: str, adapter: AnyAdapter, files: ModelFiles) -> DataError:
    """Return the error for a dataset that is not the state's, with both ways on."""
    first, *pasted = start_again(saved, adapter, files)
    lines = (
        f"{saved.folder}: cannot resume: the dataset has changed since: {differences}",
        f"put it back, and resume; or {first}",
        *pasted,
    )
    return DataError("\n  ".join(lines))


def start_again(saved: SavedState, adapter: AnyAdapter, files: ModelFiles) -> list[str]:
    """Return how to begin another run with a state's weights: the lines to add stand alone, to be pasted.

    Args:
        saved: the state.
        adapter: what is trained.
        files: of the model that it was trained on.
    """
    path, is_part = weights_of(saved, adapter)
    if path is None:
        return ["start another run; this one has no saved weights to begin with (save_every_n_steps saves them)"]
    lines = begin_with(path, place_of(adapter.type, adapter.is_plain))
    if is_part and files.llm_adapter_header.entries:
        lines.append(toml_line("llm_adapter_path", files.llm_adapter or files.transformer))
    return lines


Place = tuple[str, str] | None  # table and key of weights to begin with; None: they have to be merged first


def place_of(kind: str, is_plain: bool) -> Place:
    """Return where the weights of an adapter of this type are written to begin with; `is_plain` as of `Addition`."""
    if kind == "full":
        return "model", "transformer_path"
    return ("adapter", "init_from_existing") if is_plain else None


def begin_with(path: Path, place: Place) -> list[str]:
    """Return how to begin another run with weights; the line to add, or the command to give, stands alone."""
    if place is None:
        text = "merge these weights into the base, and start another run, of another run_name, with transformer_path ="
        return [f'{text} "MODEL", in [model]:', merge_command(path)]
    table, key = place
    return [f"start another run, of another run_name, from these weights; write in [{table}]:", toml_line(key, path)]


def merge_command(path: Path) -> str:
    """Return the command that merges an adapter into its base."""
    return f"anima merge {shlex.quote(str(path))} --into BASE --out MODEL"


def weights_of(saved: SavedState, adapter: AnyAdapter) -> tuple[Path | None, bool]:
    """Return the file with a state's weights from which a run can begin, and True if it lacks the LLM adapter.

    That is the one saved after the same step; else the state's own, if it holds all that is needed; else the one saved
    before it.
    """
    run, step = saved.folder.parent.parent, saved.manifest.step
    by_step = weights_by_step(run)
    if step in by_step:
        return by_step[step], False
    trained = set(saved.manifest.run.get("trained", ()))
    own = saved.folder / "weights.safetensors"
    if adapter.is_plain and STATE_SCALE in open_header(own).metadata:
        return own, False
    if isinstance(adapter, Full) and trained >= set(COMPONENTS) - {"llm_adapter"}:
        return own, "llm_adapter" not in trained
    earlier = [saved_step for saved_step in by_step if saved_step < step]
    return (by_step[max(earlier)] if earlier else None), False


def weights_by_step(run: Path) -> dict[int, Path]:
    """Return the files of weights that a run saved on its way, by the step."""
    return {
        int(match[1]): path
        for path in (run / "weights").glob("*.safetensors")
        if (match := re.fullmatch(rf"{re.escape(run.name)}-s(\d+)", path.stem))
    }
