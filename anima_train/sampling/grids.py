"""Many pictures at once: the axes of settings, and the cells between them."""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from pydantic import ValidationError

from anima_train.core.errors import ConfigError
from anima_train.core.settings import describe_value, nearest, quoted, validation_problems
from anima_train.sampling.generate import Request

MAX_CELLS = 2000
NO_LORA = "none"
KEYS = (*Request.model_fields, "lora", "lora_strength")
PLACE = {"prompt": 0, "lora": 0, "lora_strength": 2}  # the order in which axes change a cell: a LoRA, its strength
STEP = re.compile(r"[-_](?:s|step)?(\d{6,})")  # at the end of a file's name, as trainers write it


@dataclass(frozen=True)
class ChosenLora:
    """A LoRA and its strength: 1 as it was trained, 0 not at all, negative the other way."""

    path: Path
    strength: float = 1.0


@dataclass(frozen=True)
class Cell:
    """A picture, and the LoRAs it is drawn with."""

    request: Request
    loras: tuple[ChosenLora, ...] = ()


def by_loras(cells: Sequence[Cell]) -> dict[tuple[ChosenLora, ...], list[int]]:
    """Return the places of the cells by their LoRAs, in the order in which they are drawn."""
    groups: dict[tuple[ChosenLora, ...], list[int]] = {}
    for place, cell in enumerate(cells):
        groups.setdefault(cell.loras, []).append(place)
    return groups


Value = int | float | str | Request | ChosenLora | None  # None: no LoRA


@dataclass(frozen=True)
class Axis:
    """A setting, and its values from left to right or from top to bottom."""

    name: str  # x or y
    key: str  # one of KEYS
    values: Sequence[Value]
    labels: Sequence[str]

    @property
    def flag(self) -> str:
        """The name of the axis in messages."""
        return f"--grid {self.name}={self.key}"


@dataclass(frozen=True)
class Sheet:
    """The pictures and their order: row by row between two axes, or each with a caption."""

    cells: Sequence[Cell]
    x: Axis | None = None
    y: Axis | None = None
    captions: Sequence[str] = ()  # of a gallery, which has no axes

    @property
    def columns(self) -> Sequence[str]:
        """The label of each column."""
        return self.x.labels if self.x else [""]

    @property
    def rows(self) -> Sequence[str]:
        """The label of each row."""
        return self.y.labels if self.y else [""]


def parse_lora(text: str, flag: str = "--lora") -> ChosenLora:
    """Return the LoRA and the strength that `PATH` or `PATH:STRENGTH` names."""
    path, _, strength = text.rpartition(":")
    if path and not Path(text).exists():
        try:
            number = float(strength)
        except ValueError:
            if Path(path).exists() or path.endswith(".safetensors"):
                found = f"found {quoted(strength)}" if strength else "found nothing"
                raise ConfigError(
                    f"{flag} {quoted(text)}: {found} behind the colon, expected the strength, such as {path}:0.8"
                ) from None
            return ChosenLora(Path(text))  # the colon belongs to the path
        if not math.isfinite(number):
            raise ConfigError(f"{flag} {quoted(text)}: found the strength {strength}, expected a finite number")
        return ChosenLora(Path(path), number)
    return ChosenLora(Path(text))


def parse_axis(text: str, given: Sequence[Request], template: Request, hints: Mapping[str, str]) -> Axis:
    """Return the axis `x=KEY:V1,V2,...`, its values as in a line of CSV; `prompt` alone stands for the given requests.

    Args:
        text: from the command line.
        given: the requests with a prompt.
        template: the settings of prompts that are values of the axis.
        hints: wrong key -> what to write instead.

    Raises:
        ConfigError: the axis or its key is unknown, there are no values, or all those that are wrong.
    """
    name, _, rest = text.partition("=")
    key, _, line = rest.partition(":")
    name, key = name.strip(), key.strip()
    if name not in ("x", "y"):
        raise ConfigError(f"--grid: found {quoted(text)}, expected x=KEY:V1,V2,... or y=KEY:V1,V2,...")
    if key not in KEYS:
        close = nearest(key, KEYS)
        more = f"; {hints[key]}" if key in hints else f"; did you mean {close}?" if close else ""
        raise ConfigError(f"--grid {name}: found {quoted(key)}, expected one of {', '.join(KEYS)}{more}")
    if key == "prompt" and not line.strip():
        if not given:
            raise ConfigError(f"--grid {name}=prompt: there is no prompt; give --prompt or --prompts, or values")
        return Axis(name, key, given, [request.prompt for request in given])
    if not line.strip():
        raise ConfigError(f"--grid {name}={key}: there are no values; write --grid {name}={key}:V1,V2,...")
    try:
        (words,) = csv.reader([line], skipinitialspace=True, strict=True)
    except (csv.Error, ValueError) as error:
        raise ConfigError(f"--grid {name}={key}: {quoted(line)} is not a line of CSV; close every quote") from error
    words = [word.strip() for word in words]
    if key == "lora":
        loras = [lora for word in words for lora in loras_of(word, f"--grid {name}=lora")]
        return Axis(name, key, loras, [lora_label(lora) for lora in loras])
    if key == "prompt":
        if given:
            raise ConfigError(f"--grid {name}=prompt: has prompts of its own; leave --prompt and --prompts out")
        return Axis(name, key, [template.model_copy(update={"prompt": word}) for word in words], words)
    axis = Axis(name, key, [number(word) if is_number(key) else word for word in words], [])
    if problems := [problem for value in axis.values for problem in value_problems(axis, value)]:
        raise ConfigError(problems)
    return replace(axis, labels=[f"{key}: {word}" for word in words])


def is_number(key: str) -> bool:
    """Return True if the values of a key are numbers."""
    return key == "lora_strength" or Request.model_fields[key].annotation in (int, float)


def number(word: str) -> int | float | str:
    """Return the number that a word is, or the word if it is none."""
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            pass
    return word


def value_problems(axis: Axis, value: Value) -> list[str]:
    """Return the faults of a value that no other setting can heal."""
    if axis.key == "lora_strength":
        if isinstance(value, int | float) and math.isfinite(value):
            return []
        return [f"{axis.flag}: found {describe_value(value)}, expected a finite number"]
    data = {"prompt": "", axis.key: value}
    try:
        Request.model_validate(data)
    except ValidationError as error:
        return [f"{axis.flag}: {text}" for text in validation_problems(error, data, Request, {}).values()]
    return []


def loras_of(word: str, flag: str) -> list[ChosenLora | None]:
    """Return the LoRA of a value, those of a folder by their steps, or [None] for no LoRA."""
    if word == NO_LORA:
        return [None]
    folder = Path(word)
    if word and folder.is_dir():
        paths = [path for path in folder.glob("*.safetensors") if not path.name.startswith(".")]
        if not paths:
            raise ConfigError(f"{flag}: {quoted(word)} holds no .safetensors file")
        return [ChosenLora(path) for path in sorted(paths, key=lambda path: (step_of(path), path.name))]
    lora = parse_lora(word, flag)
    if not lora.path.is_file():
        raise ConfigError(
            f"{flag}: {quoted(word)} does not exist; expected a LoRA file, a folder of them, or {NO_LORA}"
        )
    return [lora]


def step_of(path: Path) -> float:
    """Return the step in a file's name; infinity without one, as the last weights have none."""
    match = re.search(STEP.pattern + "$", path.stem)
    return int(match[1]) if match else math.inf


def lora_label(lora: ChosenLora | None) -> str:
    """Return the label of a LoRA: the file's name, and its strength unless that is 1."""
    if lora is None:
        return "no LoRA"
    return lora.path.stem + ("" if lora.strength == 1 else f" at {lora.strength:g}")


def make_grid(
    texts: Sequence[str],
    given: Sequence[Request],
    template: Request,
    loras: Sequence[ChosenLora],
    hints: Mapping[str, str],
) -> Sheet:
    """Return the cells of a grid with one axis or two.

    Args:
        texts: an axis each, such as `x=cfg:2,4`.
        given: the requests with a prompt: one, or the values of the axis `prompt`.
        template: the settings of prompts that are values of an axis.
        loras: of all pictures; those of the axis `lora` are added.
        hints: wrong key -> what to write instead.

    Raises:
        ConfigError: a wrong axis, or more than 2,000 cells.
    """
    if len(texts) > 2:
        raise ConfigError(f"--grid: found {len(texts)} axes, expected one x and one y at most")
    axes = [parse_axis(text, given, template, hints) for text in texts]
    by_name = {axis.name: axis for axis in axes}
    if len(by_name) < len(axes):
        raise ConfigError(f"--grid: both axes are called {axes[0].name}; call one of them x and the other y")
    keys = {axis.key for axis in axes}
    if len(keys) < len(axes):
        raise ConfigError(f"--grid: both axes are {axes[0].key}; choose another setting for one of them")
    if "lora_strength" in keys and not loras and "lora" not in keys:
        raise ConfigError("--grid lora_strength: has no effect without a LoRA; give --lora PATH")
    if "prompt" not in keys and len(given) != 1:
        more = "add --grid y=prompt, or give one prompt" if given else "give --prompt TEXT, or --grid y=prompt:TEXT,..."
        raise ConfigError(f"--grid: found {len(given)} prompts, expected one; {more}")
    check_number(math.prod(len(axis.values) for axis in axes), "--grid")
    rows_first = sorted(axes, key=lambda axis: axis.name, reverse=True)
    start = Cell(given[0] if given else template, tuple(loras))
    cells = []
    for values in product(*(axis.values for axis in rows_first)):
        cell = start
        for axis, value in sorted(zip(rows_first, values, strict=True), key=lambda pair: PLACE.get(pair[0].key, 1)):
            cell = changed(cell, axis, value)
        cells.append(cell)
    return Sheet(cells, by_name.get("x"), by_name.get("y"))


def changed(cell: Cell, axis: Axis, value: Value) -> Cell:
    """Return the cell with this value in place of its own.

    Raises:
        ConfigError: the value does not go with the other settings.
    """
    if isinstance(value, Request):
        return replace(cell, request=value)
    if axis.key == "lora":
        return replace(cell, loras=(*cell.loras, value)) if isinstance(value, ChosenLora) else cell
    if axis.key == "lora_strength" and isinstance(value, int | float):
        return replace(cell, loras=tuple(replace(lora, strength=float(value)) for lora in cell.loras))
    data = {**cell.request.model_dump(), axis.key: value}
    try:
        return replace(cell, request=Request.model_validate(data))
    except ValidationError as error:
        problems = validation_problems(error, data, Request, {})
        raise ConfigError(
            [f"{axis.flag}: with the value {value}, {key} {text}" for key, text in problems.items()]
        ) from error


def make_gallery(lines: Sequence[str], given: Sequence[Request], loras: Sequence[ChosenLora]) -> Sheet:
    """Return the same prompt with each line in the place of `{}`; empty and repeated lines are passed over.

    Raises:
        ConfigError: there is not one prompt with one `{}`, no line, or more than 2,000.
    """
    if len(given) != 1 or given[0].prompt.count("{}") != 1:
        raise ConfigError("--gallery: expected one --prompt with one {} in it, the place of each line")
    words = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not words:
        raise ConfigError("--gallery: the file holds no line; expected an artist or a tag in each")
    check_number(len(words), "--gallery")
    prompts = [given[0].prompt.replace("{}", word) for word in words]
    return Sheet(
        [Cell(given[0].model_copy(update={"prompt": prompt}), tuple(loras)) for prompt in prompts], captions=words
    )


def check_number(cells: int, flag: str) -> None:
    """Raise ConfigError if there are more than 2,000 pictures, which would take days."""
    if cells > MAX_CELLS:
        raise ConfigError(f"{flag}: found {cells:,} pictures, expected at most {MAX_CELLS:,}; take fewer values")
