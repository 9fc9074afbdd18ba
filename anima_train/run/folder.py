"""The run's folder: its lock, the resolved config, the manifest, the metrics."""

import contextlib
import hashlib
import json
import os
import shutil
import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from anima_train.core.errors import ConfigError, Interrupted, SpaceError
from anima_train.core.files import UNWRITABLE, disk_errors, sha256_file, sync, write_text
from anima_train.core.format import Listing, printable

EVALUATIONS, WARNINGS, STRENGTHS = "evaluations.jsonl", "warnings.jsonl", "strengths.json"
SCORES = "scores.jsonl"
# What reading a damaged record raises: text that is none, another nesting, other types, numbers beyond all bounds.
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError)


class RunFolder:
    """OUTPUT_DIR/RUN_NAME, held by this process while it trains."""

    def __init__(self, output_dir: Path, name: str) -> None:
        self.name = name
        self.path = output_dir / name
        self.checkpoints = self.path / "checkpoints"  # the training states
        self.manifest_path = self.path / "manifest.json"
        self.base_path = self.path / "base_evaluations.json"  # of the base model, which later ones are compared with
        self.base_velocities = self.path / "base_velocities"  # of a full fine-tune, in which the base itself changes
        self.metrics_path = self.path / "metrics.jsonl"
        self.evaluations_path = self.path / EVALUATIONS
        self.warnings_path = self.path / WARNINGS
        self.config_path = self.path / "config.toml"
        self.lists_path = self.path / "lists.txt"  # of this start: what messages name the first entries of
        self.seen_path = self.path / "seen.json"
        self.strengths_path = self.path / STRENGTHS  # the adapter at several strengths, after the last step
        self.strengths_folder = self.path / "strengths"  # previews of these
        self.scores_path = self.path / SCORES  # of previews, by a judge
        self.hashed = (self.metrics_path, self.evaluations_path, self.scores_path)  # in training states
        self.records = (*self.hashed, self.warnings_path)
        self.written = (
            *self.records,
            self.config_path,
            self.manifest_path,
            self.base_path,
            self.seen_path,
            self.strengths_path,
        )
        self.lock_path = self.path / ".lock"
        self.lock = FileLock(self.lock_path)
        self.identity: tuple[int, int] | None = None  # of the folder that was opened
        self.hashes: dict[Path, Any] = {}  # SHA-256 of what this process has logged, and kept of earlier ones

    @property
    def where_lists_are(self) -> str:
        """The place where lists are whole, as `Listing.lines` says it."""
        return f"in {self.lists_path}"

    def weights_path(self, step: int | None) -> Path:
        """Return the file of the weights after a step, or (None) at the end of the run."""
        suffix = "" if step is None else f"-s{step:06d}"
        return self.path / "weights" / f"{self.name}{suffix}.safetensors"

    @property
    def best_path(self) -> Path:
        """The file of the weights of the best evaluation or previews."""
        return self.path / "weights" / f"{self.name}-best.safetensors"

    def lines(self, path: Path) -> Iterator[dict[str, Any]]:
        """Yield what was logged in one of the records; a line that is damaged counts as none."""
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(*DAMAGED):
                    values = dict(json.loads(line))
                    if isinstance(values.get("step"), int):
                        yield values

    @property
    def exists(self) -> bool:
        """True if a run made a step here, whatever is left of its records."""
        return self.metrics_path.exists() or next(self.checkpoints.glob("step-*"), None) is not None

    @property
    def is_finished(self) -> bool:
        """True if the run came to its end; where its manifest is of an earlier version, if it has its weights."""
        return bool(self.manifest().get("finished", self.weights_path(None).exists()))

    def manifest(self) -> dict[str, Any]:
        """Read the manifest; empty if it cannot be read."""
        try:
            return dict(json.loads(self.manifest_path.read_text(encoding="utf-8")))
        except (OSError, *DAMAGED):
            return {}

    def config(self) -> dict[str, Any]:
        """Read the resolved configuration that the run was last started with.

        Raises:
            ConfigError: it is missing or cannot be read.
        """
        try:
            return tomllib.loads(self.config_path.read_text(encoding="utf-8"))
        except (OSError, *DAMAGED) as error:
            raise self.damaged_config() from error

    def damaged_config(self) -> ConfigError:
        """Return the error for a resolved configuration that cannot be compared."""
        return ConfigError(
            f"{self.config_path}: missing or damaged, so that it cannot be compared; resume with --resume "
            f"{self.checkpoints}, or set another run_name"
        )

    def open(self) -> None:
        """Make the folder and take its lock.

        Raises:
            ConfigError: another process trains in it, or it cannot be written.
            SpaceError: the disk is full or read-only.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=0)
            self.lists_path.unlink(missing_ok=True)
            self.identity = identity(self.path)
        except Timeout:
            raise ConfigError(f"{self.path}: another process is training in this folder") from None
        except OSError as error:
            kind = SpaceError if error.errno in UNWRITABLE else ConfigError
            raise kind(
                f"output_dir: {self.path} cannot be written ({error.strerror}); free some space, or set another folder"
            ) from error

    def close(self) -> None:
        """Give the folder back."""
        self.lock.release()

    def check(self) -> None:
        """Check that the folder is the one that was opened: what is written into another one would be of half a run.

        Raises:
            SpaceError: it is gone.
        """
        try:
            is_gone = identity(self.path) != self.identity
        except OSError:
            is_gone = True
        if is_gone and self.identity is not None:
            raise SpaceError(
                f"{self.path}: the folder of the run is gone: removed, renamed, or its disk is away; nothing more can "
                "be saved. Put it back, and the same command resumes from its newest state"
            )

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Report whatever fails inside because the folder is gone, or a file in it cannot be written, as what it is.

        Raises:
            SpaceError: instead of an error without a message for people.
        """
        try:
            yield
        except Interrupted:
            raise
        except Exception as error:
            self.check()
            if isinstance(error, OSError) and error.filename is not None:
                path = Path(os.fsdecode(error.filename))
                if self.path.absolute() in path.absolute().parents:
                    problem = f"{path}: cannot be written ({error.strerror}); earlier files are intact"
                    raise SpaceError(problem) from error
            raise

    def start_records(
        self, source: Path | None, num_steps: int, pending: Collection[str], keeps_base: bool = True
    ) -> None:
        """Keep of what a run has logged what is not made again.

        Args:
            source: folder of the run that is continued; None: nothing is kept.
            num_steps: steps that are not made again.
            pending: what was not made after the last of them.
            keeps_base: False if the base model's evaluations are damaged.

        Raises:
            SpaceError: the folder is gone, or the disk is full.
        """
        self.check()
        self.hashes = {}
        self.strengths_path.unlink(missing_ok=True)  # of an earlier end
        for path in self.records:
            old = None if source is None else source / path.name
            if old is not None and old.exists():
                text = kept_text(old, num_steps, pending)
                write_text(path, text)
                self.hashes[path] = hashlib.sha256(text.encode())
            else:
                path.unlink(missing_ok=True)
        if source is None or not keeps_base:
            self.base_path.unlink(missing_ok=True)
        elif source != self.path and (base := source / self.base_path.name).exists():
            write_text(self.base_path, base.read_text(encoding="utf-8", errors="replace"))
            if (kept := source / self.base_velocities.name).is_dir():
                with disk_errors(self.base_velocities):
                    shutil.copytree(kept, self.base_velocities, dirs_exist_ok=True)

    def digests(self, num_steps: int, pending: Collection[str]) -> dict[str, str]:
        """Return the SHA-256 of what was logged of the first steps, by the files' names; arguments as above."""
        return self.base_digest() | {
            path.name: hashlib.sha256(kept_text(path, num_steps, pending).encode()).hexdigest()
            for path in self.hashed
            if path.exists()
        }

    def digests_now(self) -> dict[str, str]:
        """Return the same of all that was logged until now, without reading it: the files grow with the run."""
        return self.base_digest() | {
            path.name: self.hashes[path].copy().hexdigest() for path in self.hashed if path in self.hashes
        }

    def base_digest(self) -> dict[str, str]:
        """Return the SHA-256 of the base model's evaluations, by the file's name; empty if there are none."""
        return {self.base_path.name: sha256_file(self.base_path)} if self.base_path.exists() else {}

    def sync(self) -> None:
        """Flush to disk what was logged."""
        for path in filter(Path.exists, self.records):
            sync(path)

    def finish(self, ended_by: str | None) -> None:
        """Note that the run came to its end; `ended_by` is the reason where that is not its last step."""
        write_text(self.manifest_path, json.dumps(self.manifest() | {"finished": True, "ended_by": ended_by}, indent=1))

    def warn(self, step: int, warning: str) -> None:
        """Keep a warning that was printed, and all entries of a `Listing`; step 0 is before the first."""
        entries = {"entries": warning.entries} if isinstance(warning, Listing) else {}
        with contextlib.suppress(SpaceError):  # it was printed; where there is room for nothing, the metrics tell
            self.log(self.warnings_path, {"step": step, "text": warning, **entries})

    def add_list(self, message: Listing) -> None:
        """Append a message with all of its entries to lists.txt."""
        lines = [str(message), *(f"  {entry}" for entry in message.entries)]
        text = "".join(f"{printable(line)}\n" for line in lines)
        with contextlib.suppress(SpaceError):  # the first ones were printed
            self.append(self.lists_path, f"{text}\n")

    def log(self, path: Path, values: Mapping[str, Any]) -> None:
        """Append one JSON object as a line.

        Raises:
            SpaceError: the folder is gone, or the disk is full; a line that is cut off is forgotten when the run is
                resumed.
        """
        line = json.dumps(values) + "\n"
        self.append(path, line)
        self.hashes.setdefault(path, hashlib.sha256()).update(line.encode())

    def append(self, path: Path, text: str) -> None:
        """Append to a file; raises as `log` does."""
        self.check()
        with disk_errors(path, len(text)), open(path, "a", encoding="utf-8") as file:
            file.write(text)


def identity(path: Path) -> tuple[int, int]:
    """Return what tells a file or a folder from another one of the same name: its disk and its number there."""
    facts = path.stat()
    return facts.st_dev, facts.st_ino


def kept_text(path: Path, num_steps: int, pending: Collection[str]) -> str:
    """Return what `kept_lines` returns as the content of a file."""
    return "".join(f"{line}\n" for line in kept_lines(path, num_steps, pending))


def kept_lines(path: Path, num_steps: int, pending: Collection[str]) -> list[str]:
    """Return the lines of a record that are of the first steps, without what was not made after the last of them."""
    first = 1 if path.name == WARNINGS else 0  # those before the first step are logged at each start
    is_pending = {EVALUATIONS: "evaluation", SCORES: "preview"}.get(path.name) in pending
    last = num_steps - 1 if is_pending else num_steps
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [line for line in lines if first <= step_of(line) <= last]


def step_of(line: str) -> int:
    """Return the step that a logged line is of; -1 for one that a kill has cut off, or that is damaged."""
    try:
        return int(json.loads(line)["step"])
    except DAMAGED:
        return -1
