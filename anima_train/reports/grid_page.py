"""A grid or gallery of pictures as one HTML file, made from `grid.html`."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from anima_train.core.files import write_text
from anima_train.reports.html import TEMPLATES, small_jpeg
from anima_train.sampling.grids import Sheet

PAGE_PIXELS = 40_000_000  # of all pictures together, about 10 MB
MIN_SIDE, MAX_SIDE = 128, 1024  # of a picture


def write_page(path: Path, sheet: Sheet, pictures: Sequence[Path]) -> None:
    """Write the page of these pictures, the file of each cell.

    Raises:
        SpaceError: the disk is full; an earlier page is intact.
    """
    side = min(MAX_SIDE, max(MIN_SIDE, math.isqrt(PAGE_PIXELS // len(pictures))))
    jpegs = []
    for picture in pictures:
        with Image.open(picture, formats=["PNG"]) as image:
            jpegs.append(small_jpeg(image.convert("RGB"), side))
    write_text(path, render_page(sheet, [picture.name for picture in pictures], jpegs))


def render_page(sheet: Sheet, names: Sequence[str], jpegs: Sequence[str]) -> str:
    """Return the whole page.

    Args:
        sheet: labels, and the place of each cell.
        names: of the files, for each cell.
        jpegs: the pictures in base64, for each cell.
    """
    title = "Gallery" if sheet.captions else "Grid"
    return TEMPLATES.get_template("grid.html").render(title=title, sheet=sheet, names=names, jpegs=jpegs)
