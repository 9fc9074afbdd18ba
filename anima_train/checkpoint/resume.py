"""The point at which a run begins: anew, or after the step of a state that was saved."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from anima_train.adapters.choice import AnyAdapter
from anima_train.checkpoint.manifest import STATE_FOLDER, DamagedState, SavedState
from anima_train.checkpoint.samples import Place, begin_with, changed_dataset, merge_command, place_of, weights_by_step
from anima_train.checkpoint.training_state import check_state, earlier_state, newest_state, saved_states, step_of
from anima_train.config.changes import Changes, compare, refusal
from anima_train.config.paths import path_fault
from anima_train.core.errors import ConfigError, ModelFileError
from anima_train.core.settings import nearest, quoted, toml_line
from anima_train.model.loading import ModelFiles
from anima_train.run.folder import DAMAGED, RunFolder

logger = logging.getLogger(__name__)

WANTED = "a run's folder or .../checkpoints/step-...; states are saved with checkpoint_every_n_steps"
TIMED = re.compile(r"(.+)-\d{8}-\d{6}")  # a run's name that was made from the config's and the time


@dataclass(frozen=True)
class ResumePoint:
    """The point at which a run begins."""

    run_name: str
    saved: SavedState | None = None  # the state it goes on from
    source: Path | None = None  # folder of the run whose records it continues; None: there are none
    notes: Sequence[str] = ()
    least_steps: int = 1  # of the run, as fewer would end it at once

    def check_length(self, key: str, num_steps: int) -> None:
        """Refuse a run that has come to its end with the state that it goes on from.

        Args:
            key: that says how long the run is.
            num_steps: of the run.

        Raises:
            ConfigError: there is nothing left to train.
        """
        if self.saved is not None and num_steps < self.least_steps:
            raise ConfigError(
                f"{key}: the run would end at step {num_steps:,}, and {self.saved.folder} is of step "
                f"{self.saved.manifest.step:,}, so nothing would be trained; raise it, or resume an earlier state with "
                "--resume PATH"
            )


def find_resume_point(resolved: Mapping[str, Any], run_name: str, resume: bool, path: Path | None) -> ResumePoint:
    """Decide whether a run goes on from a state, and from which.

    Without `resume` and `path` it goes on where the same command was stopped: an unfinished run, nothing changed.

    Args:
        resolved: the resolved configuration, as `plain` gives it.
        run_name: the configuration's, or one made from the time.
        resume: True to resume this run.
        path: a state, or a run whose newest state is meant.

    Raises:
        ConfigError: there is nothing to resume, or a run that is not this one.
        ModelFileError: every state is damaged.
    """
    if path is not None:
        return resume_from_path(resolved, run_name, path)
    output_dir = Path(resolved["output_dir"])
    wanted = None if resume else resolved
    run = RunFolder(output_dir, run_name) if "run_name" in resolved else newest_run(output_dir, run_name, wanted)
    if run is None or not run.exists:
        if resume:
            folder = output_dir if run is None else run.path
            raise ConfigError(f"{folder}: there is no run to resume; set run_name to that of the run")
        return ResumePoint(run_name)
    changes = compare_with(run, run.config(), resolved)
    if run.is_finished and not saved_states(run.checkpoints):
        raise ConfigError(
            f"{run.path}: already holds a run that is finished and has no training state to train it further from; "
            "set another run_name, or remove it (save states with checkpoint_every_n_steps or its like)"
        )
    if not resume:
        if run.is_finished:
            bound = run.manifest().get("ended_by")
            way = "raise max_steps or epochs" if bound is None else f"change what ended it ({bound})"
            raise ConfigError(
                f"{run.path}: already holds a run that is finished; to train it further {way} and use --resume; "
                "else set another run_name, or remove it"
            )
        if changes.allowed and not changes.refused:
            raise ConfigError(
                [
                    *(f"{run.path}: holds an unfinished run with other settings: {line}" for line in changes.allowed),
                    "resume it with these settings with --resume, or set another run_name",
                ]
            )
    try:
        saved = newest_state(run.checkpoints)
    except DamagedState as error:
        raise all_damaged(error, "remove the run's folder, or ", run, resolved) from error
    return resume_from(run, saved, changes, resolved)


def compare_with(run: RunFolder, before: Mapping[str, Any], resolved: Mapping[str, Any]) -> Changes:
    """Compare a run's configuration with another.

    Raises:
        ConfigError: it is not one that a run has written.
    """
    try:
        return compare(before, resolved)
    except DAMAGED as error:
        raise run.damaged_config() from error


def resume_from_path(resolved: Mapping[str, Any], run_name: str, path: Path) -> ResumePoint:
    """Go on from a state of this run, or begin another run with that of another.

    Raises:
        ConfigError: there is no state, or the other run has a folder already.
        ModelFileError: it is damaged.
    """
    if path.is_file() and STATE_FOLDER.fullmatch(path.parent.name):
        raise ConfigError(f"--resume {path}: a file of a training state; give its folder: --resume {path.parent}")
    if path.is_file() and path.suffix == ".safetensors":
        raise ConfigError(weights_alone(path, place_in(resolved)))
    output_dir = Path(resolved["output_dir"])
    if fault := path_fault(str(path), Path(), "folder"):
        raise ConfigError(to_resume(f"--resume: {fault}", path, output_dir))
    is_state = STATE_FOLDER.fullmatch(path.name)
    inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    folder = path.parent if is_state else inside
    source = RunFolder(folder.parent.parent, folder.parent.name)
    try:
        saved = check_state(path) if is_state else newest_state(folder)
    except DamagedState as error:
        if is_state and (earlier := earlier_state(path)):
            raise ModelFileError(f"{error}; an earlier state is whole: --resume {earlier}") from error
        raise all_damaged(error, "", source, resolved, " earlier" if is_state else "") from error
    if saved is None:
        problem = f"--resume {path}: there is no training state (a folder step-...) in it"
        raise ConfigError(to_resume(problem, path, output_dir))
    is_timed = "run_name" not in resolved and stem(source.name) == stem(run_name)
    name = source.name if is_timed and source.path.resolve().parent == output_dir.resolve() else run_name
    run = RunFolder(output_dir, name)
    if run.path.resolve() != source.path.resolve() and run.exists:
        raise ConfigError(f"{run.path}: already holds a run; set another run_name, or remove it")
    changes = compare(saved.manifest.config, dict(resolved) | ({"run_name": name} if "run_name" in resolved else {}))
    return replace(resume_from(source, saved, changes, resolved), run_name=name)


def to_resume(problem: str, path: Path, output_dir: Path) -> str:
    """Return the message about a path that is not one to resume, with the nearest one and with what to give."""
    before, suggests, _ = problem.rpartition("; did you mean ")
    if not suggests or len(path.parts) == 1:  # the name of a run alone: one that can be resumed comes first
        names = [states.parent.name for states in output_dir.glob("*/checkpoints") if saved_states(states)]
        if close := nearest(path.name, names):
            problem = f"{before or problem}; did you mean {quoted(str(output_dir / close))}?"
    return f"{problem} Give {WANTED}" if problem.endswith("?") else f"{problem}; give {WANTED}"


def all_damaged(
    error: DamagedState, way: str, run: RunFolder, resolved: Mapping[str, Any], those: str = ""
) -> ModelFileError:
    """Return the error for a run of which no state is whole, with the ways on.

    Args:
        error: says of each state what it lacks.
        way: one more of them, with ", or " after it.
        run: that the states are of.
        resolved: the resolved configuration.
        those: " earlier" where later ones were not looked at.
    """
    weights = weights_by_step(run.path)
    found = run.weights_path(None) if run.weights_path(None).exists() else weights[max(weights)] if weights else None
    if found is None:
        begin = ["start another run, of another run_name; this one has no saved weights to begin with"]
    else:
        begin = begin_with(found, place_in(resolved))
    problem = f"{run.path}: cannot resume, as no{those} training state is whole:"
    return ModelFileError("\n  ".join((problem, *error.problems, way + begin[0], *begin[1:])))


def place_in(resolved: Mapping[str, Any]) -> Place:
    """Return where the weights of a resolved configuration's adapter are written to begin with."""
    adapter = resolved["adapter"]
    return place_of(adapter["type"], is_plain=adapter["type"] == "lora" and not adapter.get("use_dora", False))


def weights_alone(path: Path, place: Place) -> str:
    """Return the message about weights that were given in the place of a training state."""
    if place is None:
        way = f'merge them into its base, {merge_command(path)}, and write, in [model], transformer_path = "MODEL"'
    else:
        way = f"write, in [{place[0]}], {toml_line(place[1], path)}"
    return (
        f"--resume {path}: weights are no training state (a folder step-... of a run); to begin another run with them "
        f"{way}"
    )


def resume_from(run: RunFolder, saved: SavedState | None, changes: Changes, resolved: Mapping[str, Any]) -> ResumePoint:
    """Return the resume point in a run.

    Raises:
        ConfigError: something was changed that may not change, or nothing is left to train.
    """
    if changes.refused:
        raise ConfigError(refusal(changes, str(run.path)))
    notes = [f"changed: {line}" for line in changes.allowed]
    if saved is None:
        notes.append(f"{run.path}: starts again, as no training state was saved")
        return ResumePoint(run.name, notes=notes)
    step = saved.manifest.step
    # A run that was stopped after its last step has yet to save its weights.
    is_at_end = not run.is_finished and saved.manifest.run.get("num_steps") == step
    point = ResumePoint(run.name, saved, run.path, notes, least_steps=step if is_at_end else step + 1)
    if "max_steps" in resolved:
        point.check_length("max_steps", resolved["max_steps"])
    notes.append(f"resuming after step {step} ({saved.folder})")
    if not run.manifest():
        fault = "damaged" if run.manifest_path.exists() else "missing"
        logger.warning("%s: %s; it is written anew", run.manifest_path, fault)
    return point


def newest_run(output_dir: Path, name: str, resolved: Mapping[str, Any] | None) -> RunFolder | None:
    """Return the newest run whose name was made from the same config's and the time.

    Args:
        output_dir: where to look.
        name: such a name.
        resolved: only an unfinished run with this configuration, in which no process trains; None: any run.
    """
    for path in sorted(output_dir.glob("*"), reverse=True):
        run = RunFolder(output_dir, path.name)
        if stem(path.name) != stem(name) or not run.exists:
            continue
        if resolved is None:
            return run
        if (
            not run.is_finished
            and not is_locked(run)
            and not any(vars(compare_with(run, run.config(), resolved)).values())
        ):
            return run
    return None


def stem(name: str) -> str | None:
    """Return the part of a run's name that is the config's; None if the name was given."""
    match = TIMED.fullmatch(name)
    return match and match[1]


def is_locked(run: RunFolder) -> bool:
    """Return True if a process trains in a run's folder now."""
    try:
        with FileLock(run.lock.lock_file, timeout=0):
            return False
    except Timeout:
        return True


def check_same_content(saved: SavedState, manifest: Mapping[str, Any], adapter: AnyAdapter, files: ModelFiles) -> None:
    """Refuse to resume from a state of other files, images or components than those of this run.

    Args:
        saved: the state.
        manifest: of this run.
        adapter: what is trained.
        files: of the model.

    Raises:
        DataError: the dataset differs.
        ModelFileError: as `check_same_run`.
    """
    check_same_run(saved, manifest)
    if saved.manifest.run.get("dataset_sha256") != manifest["dataset_sha256"]:  # as `check_same_samples` does not see
        raise changed_dataset(saved, "its hash is another one", adapter, files)


def check_same_run(saved: SavedState, manifest: Mapping[str, Any]) -> None:
    """Refuse to resume from a state of other files or components than those of the run with this manifest.

    Raises:
        ModelFileError: which of them differ, and what they were.
    """
    before = saved.manifest.run
    problems = [
        f"{saved.folder}: cannot resume: {name} was {was}, and is {now}"
        for name, was, now in (
            *hashes(before, manifest),
            *((name, before.get(name), manifest[name]) for name in ("seed", "trained")),
        )
        if was != now
    ]
    was, now = before.get("micro_batches_per_step"), manifest["micro_batches_per_step"]
    if was != now:
        problems.append(
            f"{saved.folder}: cannot resume: a step had {was} micro-batches, and has {now}; set "
            "gradient_accumulation_steps so that it times the number of processes "
            f"({manifest['num_processes']}) is {was}"
        )
    if problems:
        raise ModelFileError(problems)


def damaged_records(saved: SavedState, source: RunFolder) -> list[str]:
    """Return the names of files of a run that do not hold what was logged until a state was saved."""
    written, step, pending = saved.manifest.records, saved.manifest.step, saved.manifest.pending
    found = source.digests(step, pending)
    return [name for name, digest in written.items() if found.get(name) != digest]


def hashes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield (name, hash before, hash now) of the model's files and tokenizers, whatever the files are called."""
    old, new = before.get("model_files", {}), now["model_files"]
    for slot in dict.fromkeys((*new, *old)):
        was, is_now = (str(files.get(slot, {}).get("sha256", "absent")) for files in (old, new))
        yield f"the {slot} file's SHA-256", was, is_now
    for name, value in now["tokenizers"].items():
        yield f"the {name}", before.get("tokenizers", {}).get(name, "absent"), value


def retire_states(folder: Path, step: int) -> list[Path]:
    """Give the states after a step, which the run will make again, names that are not read; return the new ones."""
    renamed = []
    for path in saved_states(folder):
        if step_of(path) > step:
            target = path.with_name(f"unused-{path.name}")
            number = 2
            while target.exists():
                target, number = path.with_name(f"unused-{path.name}-{number}"), number + 1
            renamed.append(path.rename(target))
    return renamed
