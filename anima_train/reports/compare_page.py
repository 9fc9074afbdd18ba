"""A comparison of what a run has saved as one HTML file, made from `compare.html`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from anima_train.core.files import write_text
from anima_train.reports.grid_page import MAX_SIDE, MIN_SIDE, PAGE_PIXELS
from anima_train.reports.html import TEMPLATES, small_jpeg
from anima_train.sampling.comparison import Comparison
from anima_train.sampling.judges import Judged


@dataclass(frozen=True)
class ShownCell:
    """A picture of the page."""

    file: str
    jpeg: str  # in base64
    scores: Sequence[float]  # by each judge


def write_compare_page(
    path: Path, title: str, comparison: Comparison, pictures: Sequence[Path], judgements: Sequence[Judged]
) -> None:
    """Write the page of a comparison.

    Args:
        path: the page.
        title: of the page.
        comparison: that was drawn.
        pictures: the file of each cell.
        judgements: the scores of all cells.

    Raises:
        SpaceError: the disk is full; an earlier page is intact.
    """
    side = min(MAX_SIDE, max(MIN_SIDE, math.isqrt(PAGE_PIXELS // len(pictures))))
    cells = []
    for place, picture in enumerate(pictures):
        with Image.open(picture, formats=["PNG"]) as image:
            jpeg = small_jpeg(image.convert("RGB"), side)
        cells.append(ShownCell(picture.name, jpeg, [each.scores[place] for each in judgements]))
    write_text(path, render_compare(title, comparison, cells, judgements))


def render_compare(title: str, comparison: Comparison, cells: Sequence[ShownCell], judgements: Sequence[Judged]) -> str:
    """Return the whole page."""
    width = len(comparison.columns)
    rows = [(request, cells[number * width :][:width]) for number, request in enumerate(comparison.requests)]
    return TEMPLATES.get_template("compare.html").render(
        title=title,
        columns=comparison.columns,
        rows=rows,
        judgements=judgements,
        means=[(each.judge, column_means(each, width)) for each in judgements],
    )


def column_means(judgement: Judged, num_columns: int) -> list[float]:
    """Return the mean score of each column's pictures."""
    columns = [judgement.scores[start::num_columns] for start in range(num_columns)]
    return [sum(column) / len(column) for column in columns]
