"""A grid or gallery of pictures as one HTML file; its script adds a field that shows what has these words."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from anima_train.core.files import write_text
from anima_train.core.format import count
from anima_train.reports.dataset import small_jpeg
from anima_train.reports.html import document, note, text
from anima_train.sampling.grids import Sheet

PAGE_PIXELS = 40_000_000  # of all pictures together, about 10 MB
MIN_SIDE, MAX_SIDE = 128, 1024  # of a picture

STYLE = """
body { max-width: none } .scroll { overflow: auto; max-height: 92vh }
.grid th, .grid td { padding: 3px; min-width: 5rem; max-width: 24rem; vertical-align: top; background: var(--paper) }
.grid tr:first-child th { position: sticky; top: 0; z-index: 1 } .grid th:first-child { position: sticky; left: 0 }
.grid img { display: block; max-width: 100%; height: auto } .entries img { display: block; width: 100%; height: auto }
.entries { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: .8rem }
.entries figure { width: auto } .entries figcaption { max-height: none } [hidden] { display: none !important }
input[type=search] { font: inherit; width: min(30rem, 100%); padding: .3rem .5rem }
"""

SCRIPT = """
"use strict";
const pictures = [...document.querySelectorAll("[data-label]")], rows = [...document.querySelectorAll(".grid tr")];
const field = document.createElement("input"), found = document.createElement("p");
Object.assign(field, { type: "search", placeholder: "words of the labels" });
field.setAttribute("aria-label", "show only pictures whose labels have these words");
found.className = "note";
document.querySelector("h1").after(field, found);
field.addEventListener("input", () => {
  const words = field.value.toLowerCase().split(/\\s+/).filter(Boolean);
  const isShown = (picture) => words.every((word) => picture.dataset.label.toLowerCase().includes(word));
  const shown = new Set(pictures.filter(isShown)), columns = new Set();
  for (const picture of pictures) {
    if (picture.matches("td")) picture.style.visibility = shown.has(picture) ? "" : "hidden";
    else picture.hidden = !shown.has(picture);
    if (picture.matches("td") && shown.has(picture)) columns.add(picture.cellIndex);
  }
  for (const row of rows.slice(1)) row.hidden = ![...row.cells].some((cell) => shown.has(cell));
  for (const row of rows) for (const cell of row.cells)
    cell.hidden = cell.cellIndex > 0 && !columns.has(cell.cellIndex);
  found.textContent = words.length ? `${shown.size} of ${pictures.length}` : "";
});
"""


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
    """The whole page.

    Args:
        sheet: what stands where.
        names: of the files, for each cell.
        jpegs: the pictures in base64, for each cell.
    """
    images = [
        f'<img alt="{text(name)}" title="{text(name)}" loading="lazy" src="data:image/jpeg;base64,{jpeg}">'
        for name, jpeg in zip(names, jpegs, strict=True)
    ]
    parts = [note(count(len(images), "picture")), gallery(sheet, images) if sheet.captions else grid(sheet, images)]
    return document("Gallery" if sheet.captions else "Grid", parts, STYLE, SCRIPT)


def gallery(sheet: Sheet, images: Sequence[str]) -> str:
    """Each picture with its caption."""
    figures = [
        f'<figure data-label="{text(caption)}">{image}<figcaption>{text(caption)}</figcaption></figure>'
        for caption, image in zip(sheet.captions, images, strict=True)
    ]
    return '<div class="entries">\n' + "\n".join(figures) + "\n</div>"


def grid(sheet: Sheet, images: Sequence[str]) -> str:
    """A table with the labels of its rows and columns."""
    heads = "".join(f'<th scope="col">{text(label)}</th>' for label in sheet.columns)
    lines = [f"<tr><th></th>{heads}</tr>"]
    for number, row in enumerate(sheet.rows):
        cells = "".join(
            f'<td data-label="{text(f"{row} {column}")}">{images[number * len(sheet.columns) + place]}</td>'
            for place, column in enumerate(sheet.columns)
        )
        lines.append(f'<tr><th scope="row">{text(row)}</th>{cells}</tr>')
    return '<div class="scroll"><table class="grid">\n' + "\n".join(lines) + "\n</table></div>"
