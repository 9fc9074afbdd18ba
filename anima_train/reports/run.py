"""The report of a run from the files in its folder, collected into plain values; `run_page` draws it.

Files may be missing, half written or made by hand: what cannot be used is skipped, and noted.
"""

import json
import math
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from PIL import Image

from anima_train.core.errors import ConfigError
from anima_train.core.format import Listing, count
from anima_train.core.settings import nearest
from anima_train.data.image_headers import BadImage
from anima_train.data.images import decode
from anima_train.objective.timesteps import T_BINS
from anima_train.reports.evaluations import (
    Checkpoint,
    Evaluated,
    Scores,
    UpdateNorm,
    best_steps,
    checkpoints_of,
    evaluations_by_set,
    kept_step,
    scores_of,
    update_norms,
)
from anima_train.reports.html import small_jpeg
from anima_train.reports.key_settings import key_settings, named_text, table_of, value_text
from anima_train.reports.places import shared_config, shared_text
from anima_train.reports.series import Series, evenly_to_last, number

MIN_WINDOW = 10  # steps of the average, at least
WINDOWS = 50  # in a run
MAX_PREVIEWS = 200
PREVIEW_SIDE = 320  # pixels, the longer one
PREVIEW = re.compile(r"s([0-9]{6,18})_(.+)\.png")
LARGEST_STEP = 2**53  # what a float holds exactly

SINGLE_KEYS = ("loss", "lr", "grad_norm", "memory_bytes")
KEY_GROUPS = ("loss/", "lr/")


@dataclass
class Share:
    """The mean loss of some samples."""

    total: float = 0.0
    num_samples: int = 0

    def add(self, mean: float, num_samples: int) -> None:
        """Take more samples into account."""
        self.total += mean * num_samples
        self.num_samples += num_samples

    @property
    def mean(self) -> float:
        """The mean; NaN of no samples."""
        return self.total / self.num_samples if self.num_samples else math.nan


@dataclass(frozen=True)
class Preview:
    """A picture that was generated during the run."""

    step: int
    name: str  # the same at every step for the same prompt and seed
    jpeg: str  # base64
    prompt: str = ""  # "" where the file tells none
    settings: str = ""  # the others it was drawn with
    score: float = math.nan  # by the run's judge


@dataclass
class Metrics:
    """The content of metrics.jsonl, as curves and sums."""

    num_lines: int
    window: float  # steps over which curves are averaged
    curves: dict[str, Series] = field(default_factory=dict)  # by key; "speed" in images per second
    first_by_t: list[Share] = field(default_factory=lambda: [Share() for _ in range(T_BINS)])  # in the first quarter
    last_by_t: list[Share] = field(default_factory=lambda: [Share() for _ in range(T_BINS)])
    num_steps: int = 0
    num_epochs: int = 0
    num_examples: int = 0
    seconds: float = 0.0  # of training, after a resume too

    def add(self, key: str, step: int, value: object) -> None:
        """Append to the curve of a key."""
        if key not in self.curves:
            self.curves[key] = Series(self.num_lines, 1 - 1 / self.window)
        self.curves[key].add(step, number(value))


@dataclass(frozen=True)
class RunReport:
    """The whole report."""

    name: str
    metrics: Metrics
    evaluations: Mapping[str, Sequence[Evaluated]]  # by the set's name
    checkpoints: Sequence[Checkpoint]  # those that were evaluated on sets of several roles
    best: Mapping[str, int]  # steps by what they are the best of them by
    updates: Mapping[str, Sequence[UpdateNorm]]  # by component
    buckets: Sequence[tuple[str, int]]  # (bucket, samples seen)
    seen: Sequence[tuple[str, int]]  # (sample, times seen), the least first
    previews: Sequence[Preview]  # by name, then step
    num_previews: int  # in the folder
    scores: Scores | None  # of the previews
    settings: Sequence[tuple[str, str]]  # those that matter most: (what, value)
    config: str  # the resolved config as TOML, without paths
    manifest: Mapping[str, Any]
    warnings: Sequence[str]
    notes: Sequence[str]  # about the folder


def collect_run(run: Path) -> RunReport:
    """Return the report of a run's folder; the run need not have ended.

    Raises:
        ConfigError: the folder holds no run.
    """
    check_is_run(run)
    notes: list[str] = []
    manifest = read_object(run / "manifest.json", notes)
    metrics = read_metrics(run / "metrics.jsonl", notes)
    planned = manifest.get("num_steps")
    if isinstance(planned, int) and metrics.num_steps < planned and not manifest.get("finished"):
        notes.append(f"{metrics.num_steps:,} of {planned:,} steps are done: the run is not at its end")
    seen = read_object(run / "seen.json", notes)
    previews, num_previews = read_previews(run / "samples", notes)
    written = read_text(run / "config.toml", notes)
    config, paths = shared_config(written)
    warnings = read_warnings(run / "warnings.jsonl", notes)
    evaluated = list(read_lines(run / "evaluations.jsonl", notes))
    scores = scores_of(read_lines(run / "scores.jsonl", notes))
    if scores is not None:
        previews = [replace(each, score=scores.of(each.step, each.name)) for each in previews]
    checkpoints = checkpoints_of(evaluated, scores)
    # The page may be shown to others, so it names no folder of this machine.
    places = [str(Path.home() / "x"), str(run.resolve()), *paths]
    return RunReport(
        run.resolve().name,
        metrics,
        evaluations_by_set(evaluated),
        checkpoints,
        best_steps(checkpoints, scores) | kept_step(evaluated, parsed_toml(written), scores),
        update_norms(evaluated),
        sorted(counts(seen.get("buckets")).items()),
        sorted(counts(seen.get("samples")).items(), key=lambda item: (item[1], item[0])),
        previews,
        num_previews,
        scores,
        settings_of(written, manifest),
        config,
        manifest,
        [shared_text(warning, places) for warning in warnings],
        [shared_text(each, places) for each in notes],
    )


def run_facts(report: RunReport) -> dict[str, Any]:
    """Return the report's numbers and words for programs: of each curve the average at its end; no pictures."""
    metrics = report.metrics
    return {
        "run": report.name,
        "finished": report.manifest.get("finished"),
        "steps": metrics.num_steps,
        "planned_steps": report.manifest.get("num_steps"),
        "epochs": metrics.num_epochs,
        "examples": metrics.num_examples,
        "seconds": metrics.seconds,
        "last": {key: series.points[-1].smooth for key, series in metrics.curves.items() if series.points},
        "evaluations": report.evaluations,
        "checkpoints": report.checkpoints,
        "best": report.best,
        "updates": report.updates,
        "scores": report.scores
        and {"judge": report.scores.judge, "means": report.scores.means, "gains": report.scores.gains},
        "num_previews": report.num_previews,
        "warnings": report.warnings,
        "notes": report.notes,
        "manifest": report.manifest,
    }


def is_run(folder: Path) -> bool:
    """Return True if a run was begun in the folder."""
    return (folder / "metrics.jsonl").is_file() or (folder / "manifest.json").is_file()


def check_is_run(path: Path) -> None:
    """Raise ConfigError, with the nearest run, if the path is not the folder of a run."""
    if is_run(path):
        return
    problem = "holds no run (metrics.jsonl)" if path.is_dir() else "is no folder" if path.exists() else "does not exist"
    around = path if path.is_dir() else path.parent
    runs = sorted(folder for folder in around.iterdir() if is_run(folder)) if around.is_dir() else []
    meant = nearest(path.name, [folder.name for folder in runs])
    if path.is_file() and is_run(around):
        advice = f"did you mean {around}?"
    elif meant is not None and not path.is_dir():
        advice = f"did you mean {around / meant}?"
    elif runs:
        advice = f"expected one of {', '.join(map(str, runs))}"
    else:
        advice = "expected output_dir/run_name of a run that was started"
    raise ConfigError(f"{path} {problem}; {advice}")


# Files


def read_text(path: Path, notes: list[str]) -> str:
    """Return a file's text; "" if there is none, with a note."""
    if not path.is_file():
        notes.append(f"{path.name} is missing")
        return ""
    return path.read_text(encoding="utf-8", errors="backslashreplace")


def read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if there is none, with a note."""
    if not path.is_file():
        notes.append(f"{path.name} is missing" + ("; the end of a run writes it" if path.stem == "seen" else ""))
        return {}
    found = parsed(path.read_bytes())
    if found is None:
        notes.append(f"{path.name} is damaged, and not used")
    return found or {}


def read_lines(path: Path, notes: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (step, values) for each line of a file of JSON objects; what is none is skipped, with a note."""
    if not path.is_file():
        return
    first_bad = num_bad = 0
    with open(path, "rb") as file:
        for line_number, line in enumerate(file, 1):
            values = parsed(line)
            if values is not None and is_count(step := values.get("step")):
                yield step, values
            else:
                first_bad = first_bad or line_number
                num_bad += 1
    if num_bad:
        lines = count(num_bad, "damaged line is", "damaged lines are")
        notes.append(
            f"{path.name}: {lines} skipped, from line {first_bad:,} on; a process that is killed while it writes "
            "leaves half a line"
        )


def parsed(line: bytes) -> dict[str, Any] | None:
    """Return a JSON object; None for anything else."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def is_count(value: object) -> TypeGuard[int]:
    """Return True if a logged value is a count."""
    return isinstance(value, int) and 0 <= value <= LARGEST_STEP


def counts(table: object) -> dict[str, int]:
    """Return those entries of a JSON object that are counts."""
    entries = table.items() if isinstance(table, dict) else ()
    return {str(key): value for key, value in entries if is_count(value)}


def read_metrics(path: Path, notes: list[str]) -> Metrics:
    """Return the curves of metrics.jsonl, read line by line.

    Thinning and averaging need to know how many there are, so the lines are counted first.
    """
    num_lines = 0
    if path.is_file():
        with open(path, "rb") as file:
            num_lines = sum(1 for _ in file)
    metrics = Metrics(num_lines, max(MIN_WINDOW, num_lines / WINDOWS))
    quarter = max(1, num_lines // 4)
    before = (0.0, 0.0)  # images, seconds
    for index, (step, values) in enumerate(read_lines(path, notes)):
        metrics.num_steps = step
        metrics.num_epochs = int_of(values.get("epoch")) + 1
        metrics.num_examples = int_of(values.get("examples"))
        for key, value in values.items():
            if key in SINGLE_KEYS or key.startswith(KEY_GROUPS):
                metrics.add(key, step, value)
        now = number(values.get("examples")), number(values.get("seconds"))
        if now[1] > before[1]:
            metrics.add("speed", step, (now[0] - before[0]) / (now[1] - before[1]))
            metrics.seconds += now[1] - before[1]
        elif math.isfinite(now[1]):  # the clock of a run that was resumed begins again
            metrics.seconds += now[1]
        else:  # written before there was a clock
            metrics.add("speed", step, values.get("images_per_second"))
        before = now
        for place, mean, num_samples in loss_by_t(values.get("loss_by_t")):
            if index < quarter:
                metrics.first_by_t[place].add(mean, num_samples)
            if index >= num_lines - quarter:
                metrics.last_by_t[place].add(mean, num_samples)
    return metrics


def int_of(value: object) -> int:
    """Return a count as it was logged; 0 for anything else."""
    return value if is_count(value) else 0


def loss_by_t(entries: object) -> Iterator[tuple[int, float, int]]:
    """Yield (bin, mean, number of samples) for each such list of a step; means that are not finite are left out."""
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, list) and len(entry) == 3:
            place, mean, num_samples = entry[0], number(entry[1]), int_of(entry[2])
            if isinstance(place, int) and 0 <= place < T_BINS and math.isfinite(mean):
                yield place, mean, num_samples


def read_warnings(path: Path, notes: list[str]) -> list[str]:
    """Return the run's warnings, each once: every start of a run finds those of its data again."""
    found = []
    for step, values in read_lines(path, notes):
        entries = values.get("entries")
        text = Listing(str(values.get("text")), map(str, entries if isinstance(entries, list) else ()), num_shown=0)
        found.append(text.prefixed(f"step {step:,}: ") if step else text)
    return list(dict.fromkeys(found))


def parsed_toml(text: str) -> dict[str, Any]:
    """Return a run's configuration; an empty one of text that is none."""
    try:
        return tomllib.loads(text)
    except ValueError:
        return {}


def settings_of(text: str, manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the settings that matter most, after the model's name and the number of parameters that are trained."""
    try:
        rows = key_settings(tomllib.loads(text))
    except ValueError:
        rows = []
    model_file = table_of(table_of(manifest, "model_files"), "transformer")
    groups = manifest.get("groups")
    found = [table for table in groups if isinstance(table, dict)] if isinstance(groups, list) else []
    parameters = {str(table.get("component")): int_of(table.get("parameters")) for table in found}
    trained = {component: number for component, number in parameters.items() if number}
    model = [("model", str(model_file["name"]))] if "name" in model_file else []
    numbers = [("parameters", f"{sum(trained.values()):,} in {', '.join(trained)}")] if trained else []
    saving = named_text(table_of(manifest, "memory"), without=())
    return [*model, *rows[:1], *numbers, *rows[1:], *([("chosen by memory", saving)] if saving else [])]


def read_previews(folder: Path, notes: list[str]) -> tuple[list[Preview], int]:
    """Return pictures in a folder, of evenly chosen steps, the last included; and the number of all pictures."""
    by_step: dict[int, list[tuple[str, Path]]] = defaultdict(list)
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if (match := PREVIEW.fullmatch(path.name)) and path.is_file():
            by_step[int(match[1])].append((match[2], path))
    most = max(map(len, by_step.values()), default=1)
    chosen = evenly_to_last(sorted(by_step), max(1, MAX_PREVIEWS // most))
    previews = []
    for step in chosen:
        for name, path in by_step[step][:MAX_PREVIEWS]:
            try:
                previews.append(Preview(step, name, small_jpeg(decode(path), PREVIEW_SIDE), *drawn_from(path)))
            except BadImage as error:
                notes.append(f"samples/{path.name} cannot be shown: {error}")
    previews.sort(key=lambda preview: (preview.name, preview.step))
    return previews, sum(map(len, by_step.values()))


def drawn_from(path: Path) -> tuple[str, str]:
    """Return the prompt of a picture and its other settings as its file tells them; "" where it does not."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            found = parsed(str(image.info.get("anima_train")).encode())
    except (OSError, ValueError, SyntaxError):  # Pillow's, of files that are damaged
        found = None
    if found is None:
        return "", ""
    facts = [f"{found.get('width')}x{found.get('height')}"]
    facts += [f"{key} {value_text(found[key])}" for key in ("seed", "steps", "cfg", "shift") if key in found]
    facts += [kind for key in ("sampler", "schedule") if (kind := named_text(table_of(found, key)))]
    negative = found.get("negative_prompt")
    return str(found.get("prompt", "")), ", ".join(facts) + (f"; negative prompt: {negative}" if negative else "")
