"""The judge that [sampling] names: found before anything is drawn."""

import os
from pathlib import Path

from anima_train.config.paths import find_path
from anima_train.sampling.judges import installed_judges, judge_fault


def find_judge(word: str, base: Path) -> tuple[str, str | None]:
    """Return the judge with its folder found, and why there is none such (None: there is).

    Args:
        word: `NAME` or `NAME:TEXT`.
        base: the folder of the file that names it.
    """
    name, colon, text = word.partition(":")
    if text and os.path.isdir(path := find_path(text, base)):
        text = str(path.absolute())
    return f"{name}{colon}{text}", judge_fault(name, text, installed_judges())
