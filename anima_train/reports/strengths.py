"""The part of a run's report about its LoRA at several strengths, from strengths.json and the pictures beside it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from anima_train.evaluation.strengths_table import strengths_table
from anima_train.reports.evaluations import score_of
from anima_train.reports.run import Preview, read_previews
from anima_train.run.folder import DAMAGED, RunFolder


@dataclass(frozen=True)
class Strip:
    """The pictures of one prompt, one at each strength."""

    name: str
    prompt: str
    settings: str
    pictures: Sequence[tuple[str, Preview]]  # (strength, picture)


@dataclass(frozen=True)
class StrengthsReport:
    """The LoRA at several strengths."""

    step: int
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    strips: Sequence[Strip] = ()
    notes: Sequence[str] = field(default=())  # about files that cannot be read


def read_strengths(run: Path) -> StrengthsReport | None:
    """Return what a run has found of the strengths of its LoRA; None if it tried none."""
    folder = RunFolder(run.parent, run.name)
    if not folder.strengths_path.is_file():
        return None
    try:
        record = json.loads(folder.strengths_path.read_text(encoding="utf-8"))
        step = int(record["step"])
        headings, rows = strengths_table(record)
    except (OSError, *DAMAGED):
        return StrengthsReport(0, (), (), notes=[f"{folder.strengths_path.name} is damaged"])
    notes: list[str] = []
    found: dict[tuple[str, str, str], list[tuple[str, Preview]]] = {}
    scores = {f"{row['strength']:g}": row.get("scores", ()) for row in record["strengths"]}
    for strength, *_ in rows:
        for preview in read_previews(folder.strengths_folder / strength, notes)[0]:
            if preview.step == step:
                key = (preview.name, preview.prompt, preview.settings)
                shown = replace(preview, score=score_of(scores[strength], preview.name))
                found.setdefault(key, []).append((strength, shown))
    return StrengthsReport(step, headings, rows, [Strip(*key, pictures) for key, pictures in found.items()], notes)
