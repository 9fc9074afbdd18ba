"""A comparison: what a run has saved, at several strengths, beside the base model, on the same prompts and noise."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anima_train.adapters.parts import is_adapter
from anima_train.core.errors import ConfigError
from anima_train.core.format import printable
from anima_train.core.settings import nearest, quoted
from anima_train.model.safetensors_io import open_header
from anima_train.sampling.generate import Request
from anima_train.sampling.grids import Cell, ChosenLora, check_number

BASE = "base"
STEP = re.compile(r"-s(\d{6,})")  # at the end of the name of weights that were saved between steps


@dataclass(frozen=True)
class Checkpoint:
    """Weights that a run has saved: an adapter, or a whole transformer."""

    path: Path
    label: str  # "step 500", "best", "final"; of other files the name
    is_lora: bool


@dataclass(frozen=True)
class Column:
    """The weights that a column of pictures is drawn with: without a checkpoint the base model's."""

    checkpoint: Checkpoint | None = None
    strength: float | None = None  # of an adapter

    @property
    def name(self) -> str:
        """The label of the weights, without their strength."""
        return BASE if self.checkpoint is None else self.checkpoint.label

    @property
    def loras(self) -> tuple[ChosenLora, ...]:
        """The LoRAs on the base model."""
        if self.checkpoint is None or self.strength is None:
            return ()
        return (ChosenLora(self.checkpoint.path, self.strength),)

    @property
    def transformer(self) -> Path | None:
        """The transformer instead of the base model's; None: that one."""
        return None if self.checkpoint is None or self.checkpoint.is_lora else self.checkpoint.path


@dataclass(frozen=True)
class Comparison:
    """Pictures of each request, in a row, one with the weights of each column; the base comes first."""

    columns: Sequence[Column]
    requests: Sequence[Request]

    @property
    def cells(self) -> list[Cell]:
        """The pictures, row by row."""
        return [Cell(request, column.loras) for request in self.requests for column in self.columns]

    def by_transformer(self) -> dict[Path | None, list[int]]:
        """Return the places of the cells that are drawn with the same transformer; None: the base model's."""
        groups: dict[Path | None, list[int]] = {}
        for place in range(len(self.columns) * len(self.requests)):
            groups.setdefault(self.columns[place % len(self.columns)].transformer, []).append(place)
        return groups


def find_checkpoints(folder: Path, run_name: str) -> list[Checkpoint]:
    """Return what a run has saved in its folder of weights: by step, then its best, then its last.

    Raises:
        ConfigError: nothing is there.
        ModelFileError: a file is damaged.
    """
    paths = [path for path in folder.glob("*.safetensors") if not path.name.startswith(".")]
    if not paths:
        raise ConfigError(f"{folder}: there are no weights yet; a run saves them at its end, or by save_every_n_steps")
    ranked = sorted((rank_and_label(path.stem, run_name), path) for path in paths)
    return [Checkpoint(path, label, is_adapter(open_header(path))) for (_, _, label), path in ranked]


def rank_and_label(stem: str, run_name: str) -> tuple[int, int, str]:
    """Return what weights are sorted by, and their label, from the name of their file without its ending."""
    if stem == run_name:
        return 2, 0, "final"
    if (match := re.search(STEP.pattern + "$", stem)) is not None:
        return 0, int(match[1]), f"step {int(match[1])}"
    return (1, 0, "best") if stem == f"{run_name}-best" else (3, 0, stem)


def choose_checkpoints(found: Sequence[Checkpoint], words: Sequence[str]) -> list[Checkpoint]:
    """Return the checkpoints that words name: a step, best, final, or a file's name; without words all of them.

    Raises:
        ConfigError: there is none of that name.
    """
    chosen, problems = [], []
    for word in words:
        labels = {word, f"step {int(word)}"} if word.isdecimal() else {word}
        matches = [each for each in found if {each.label, each.path.stem, each.path.name} & labels]
        chosen += matches
        if not matches:
            names = [each.label.removeprefix("step ") for each in found]
            close = nearest(word, names)
            meant = f"; did you mean {close}?" if close else ""
            problems.append(f"--checkpoints: found {quoted(word)}, expected one of {', '.join(names)}{meant}")
    if problems:
        raise ConfigError([printable(problem) for problem in problems])
    return list(dict.fromkeys(chosen)) if words else list(found)


def parse_strengths(text: str) -> list[float]:
    """Return the strengths of `0.5,1`.

    Raises:
        ConfigError: one is no finite number, or 0.
    """
    found: list[float] = []
    for word in map(str.strip, text.split(",")):
        try:
            number = float(word)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ConfigError(f"--strengths: found {quoted(word)}, expected numbers such as 0.5,1")
        if number == 0:
            raise ConfigError("--strengths: 0 is the base, which the first column shows always; leave it out")
        found.append(number)
    return list(dict.fromkeys(found))


def compare(
    checkpoints: Sequence[Checkpoint], strengths: Sequence[float] | None, requests: Sequence[Request]
) -> Comparison:
    """Return the comparison of these checkpoints, LoRAs at each strength (None: at 1).

    Raises:
        ConfigError: there is nothing to draw, more than 2,000 pictures, or strengths for a whole model.
    """
    if not requests:
        raise ConfigError("there is nothing to draw: the run has no [sampling] prompts; give --prompts FILE")
    whole = next((each for each in checkpoints if not each.is_lora), None)
    if whole is not None and strengths not in (None, [1.0]):
        raise ConfigError(f"--strengths: has no effect on {printable(whole.path.name)}, a whole model; leave it out")
    columns = [Column()]
    for each in checkpoints:
        columns += [Column(each, strength) for strength in (strengths or [1.0])] if each.is_lora else [Column(each)]
    check_number(len(columns) * len(requests), "--checkpoints")
    return Comparison(columns, requests)
