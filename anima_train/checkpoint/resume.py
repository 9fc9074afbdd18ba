"""Where a run begins: anew, or after the step of a state that was saved."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from anima_train.checkpoint.training_state import STATE_FOLDER, Saved, check_state, newest_state, saved_states
from anima_train.config.changes import Changes, compare, refusal
from anima_train.config.load import LoadedConfig
from anima_train.core.errors import ConfigError, ModelFileError
from anima_train.run.folder import RunFolder
from anima_train.run.manifest import plain

logger = logging.getLogger(__name__)

TIMED = re.compile(r"(.+)-\d{8}-\d{6}")  # a run's name that was made from the config's and the time


@dataclass(frozen=True)
class Origin:
    """Where a run begins."""

    run_name: str
    saved: Saved | None = None  # the state it goes on from
    source: Path | None = None  # folder of the run whose records it continues; None: there are none
    notes: Sequence[str] = ()


def find_origin(
    loaded: LoadedConfig, resume: bool, path: Path | None, warn: Callable[[str], None] = logger.warning
) -> Origin:
    """Decide whether a run goes on from a state, and from which.

    Without `resume` and `path` it goes on where the same command was stopped: an unfinished run, nothing changed.

    Args:
        loaded: the configuration.
        resume: go on with this run.
        path: a state, or a run whose newest state is meant.
        warn: gets a line for each damaged state that is passed over.

    Raises:
        ConfigError: there is nothing to resume, or a run that is not this one.
        ModelFileError: every state is damaged.
    """
    if path is not None:
        return from_path(loaded, path, warn)
    now = plain(loaded.config)
    output_dir = Path(loaded.config.output_dir)
    if loaded.config.run_name is None:
        run = newest_run(output_dir, loaded.run_name, None if resume else now)
    else:
        run = RunFolder(output_dir, loaded.run_name)
    if run is None or not run.exists:
        if resume:
            folder = output_dir if run is None else run.path
            raise ConfigError(f"{folder}: there is no run to resume; set run_name to that of the run")
        return Origin(loaded.run_name)
    changes = compare(run.config(), now)
    if run.is_finished and not saved_states(run.checkpoints):
        raise ConfigError(
            f"{run.path}: already holds a run that is finished and has no training state to train it further from; "
            "set another run_name, or remove it (save states with checkpoint_every_n_steps or its like)"
        )
    if not resume:
        if run.is_finished:
            raise ConfigError(
                f"{run.path}: already holds a run that is finished; to train it further raise max_steps or epochs and "
                "use --resume; else set another run_name, or remove it"
            )
        if changes.allowed and not changes.refused:
            raise ConfigError(
                [
                    *(f"{run.path}: holds an unfinished run with other settings: {line}" for line in changes.allowed),
                    "go on with it and these settings with --resume, or set another run_name",
                ]
            )
    return go_on(run, newest_state(run.checkpoints, warn), changes)


def from_path(loaded: LoadedConfig, path: Path, warn: Callable[[str], None]) -> Origin:
    """Go on from a state of this run, or begin another run with that of another.

    Raises:
        ConfigError: there is no state, or the other run has a folder already.
        ModelFileError: it is damaged.
    """
    if STATE_FOLDER.fullmatch(path.name):
        folder, saved = path.parent, check_state(path)
    else:
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        found = newest_state(folder, warn)
        if found is None:
            raise ConfigError(f"--resume {path}: there is no training state (a folder step-...) in it")
        saved = found
    source = RunFolder(folder.parent.parent, folder.parent.name)
    config = loaded.config
    name = loaded.run_name
    is_timed = config.run_name is None and stem(source.name) == stem(name)
    if is_timed and source.path.resolve().parent == Path(config.output_dir).resolve():
        name = source.name
    run = RunFolder(Path(config.output_dir), name)
    if run.path.resolve() != source.path.resolve() and run.exists:
        raise ConfigError(f"{run.path}: already holds a run; set another run_name, or remove it")
    changes = compare(saved.facts.config, plain(config) | ({"run_name": name} if config.run_name else {}))
    origin = go_on(source, saved, changes)
    return Origin(name, origin.saved, origin.source, origin.notes)


def go_on(run: RunFolder, saved: Saved | None, changes: Changes) -> Origin:
    """The origin in a run, if what was changed may change."""
    if changes.refused:
        raise ConfigError(refusal(changes, str(run.path)))
    notes = [f"changed: {line}" for line in changes.allowed]
    if saved is None:
        return Origin(run.name, None, None, [*notes, f"{run.path}: starts again, as no training state was saved"])
    return Origin(run.name, saved, run.path, [*notes, f"resuming after step {saved.facts.step} ({saved.folder})"])


def newest_run(output_dir: Path, name: str, config: Mapping[str, Any] | None) -> RunFolder | None:
    """The newest run whose name was made from the same config's and the time.

    Args:
        output_dir: where to look.
        name: such a name.
        config: only an unfinished run with this configuration, in which no process trains; None: any run.
    """
    for path in sorted(output_dir.glob("*"), reverse=True):
        run = RunFolder(output_dir, path.name)
        if stem(path.name) != stem(name) or not run.exists:
            continue
        if config is None:
            return run
        if not run.is_finished and not is_locked(run) and not any(vars(compare(run.config(), config)).values()):
            return run
    return None


def stem(name: str) -> str | None:
    """What of a run's name is the config's; None if the name was given."""
    match = TIMED.fullmatch(name)
    return match and match[1]


def is_locked(run: RunFolder) -> bool:
    """Whether a process trains in a run's folder now."""
    try:
        with FileLock(run.lock.lock_file, timeout=0):
            return False
    except Timeout:
        return True


def check_same_content(saved: Saved, facts: Mapping[str, Any]) -> None:
    """Refuse to go on from a state of other files, images or components than those of this run.

    Raises:
        ModelFileError: which of them differ, and what they were.
    """
    before = saved.facts.run
    problems = [
        f"{saved.folder}: cannot resume: {name} was {was}, and is {now}"
        for name, was, now in (
            *hashes(before, facts),
            *((name, before.get(name), facts[name]) for name in ("dataset_sha256", "seed", "trained")),
        )
        if was != now
    ]
    was, now = before.get("micro_batches_per_step"), facts["micro_batches_per_step"]
    if was != now:
        problems.append(
            f"{saved.folder}: cannot resume: a step had {was} micro-batches, and has {now}; set "
            f"gradient_accumulation_steps so that it times the number of processes ({facts['num_processes']}) is {was}"
        )
    if problems:
        raise ModelFileError(problems)


def hashes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(name, hash before, hash now) of the model's files and tokenizers; what the files are called does not matter."""
    old, new = before.get("model_files", {}), now["model_files"]
    for slot in dict.fromkeys((*new, *old)):
        was, is_now = (str(files.get(slot, {}).get("sha256", "absent")) for files in (old, new))
        yield f"the {slot} file's SHA-256", was, is_now
    for name, value in now["tokenizers"].items():
        yield f"the {name}", before.get("tokenizers", {}).get(name, "absent"), value


def set_aside(folder: Path, step: int) -> list[Path]:
    """Give the states after a step, which the run will make again, names that are not read; returns the new ones."""
    renamed = []
    for path in saved_states(folder):
        if int(path.name.removeprefix("step-")) > step:
            target = path.with_name(f"unused-{path.name}")
            number = 2
            while target.exists():
                target, number = path.with_name(f"unused-{path.name}-{number}"), number + 1
            renamed.append(path.rename(target))
    return renamed
