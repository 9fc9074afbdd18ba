"""The contact sheet: one labelled picture of all pictures of a grid."""

import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from anima_train.core.files import atomic_path
from anima_train.core.format import printable
from anima_train.sampling.grids import Sheet

MAX_SHEET_PIXELS = 128_000_000  # of the PNG of all pictures
MAX_LINES = 6  # of a label over pictures
NUM_MEASURED = 20  # labels that decide how many lines there are: the longest
MIN_LETTER = 9  # pixels
LETTERS_PER_SIDE = 24  # of a picture
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class SheetLayout:
    """The sizes in pixels, and the number of lines of labels over pictures."""

    width: int  # of a picture
    height: int
    letter: int  # height of the letters
    lines: int
    left: int  # width of the rows' labels
    top: int  # height of the columns' labels
    above: int  # height of each caption
    gap: int  # between pictures
    size: tuple[int, int]  # of all


def layout_at(sheet: Sheet, scale: float) -> SheetLayout:
    """Return the layout with pictures at this scale."""
    columns, rows = shape_of(sheet)
    width = max(1, math.floor(max(cell.request.width for cell in sheet.cells) * scale))
    height = max(1, math.floor(max(cell.request.height for cell in sheet.cells) * scale))
    letter = max(MIN_LETTER, min(width, height) // LETTERS_PER_SIDE)
    gap = max(1, letter // 3)

    font = ImageFont.load_default(letter)
    longest = sorted((*sheet.columns, *sheet.captions), key=len)[-NUM_MEASURED:]
    lines = max((len(wrap(label, font, width, MAX_LINES)) for label in longest), default=0)
    label_height = lines * line_height(letter) + gap if lines else 0
    left = max(width // 2, 8 * letter) if any(sheet.rows) else 0
    top, above = (0, label_height) if sheet.captions else (label_height, 0)
    total = (left + columns * (width + gap) + gap, top + rows * (height + above + gap) + gap)
    return SheetLayout(width, height, letter, lines, left, top, above, gap, total)


def shape_of(sheet: Sheet) -> tuple[int, int]:
    """Return the number of columns and rows; a gallery is about a square."""
    if not sheet.captions:
        return len(sheet.columns), len(sheet.rows)
    columns = math.ceil(math.sqrt(len(sheet.cells)))
    return columns, math.ceil(len(sheet.cells) / columns)


def largest_layout(sheet: Sheet, max_pixels: int) -> SheetLayout:
    """Return the layout at the largest scale, at most 1, that gives no more pixels than these."""
    scale = 1.0
    while math.prod((found := layout_at(sheet, scale)).size) > max_pixels and max(found.width, found.height) > 1:
        scale *= min(0.98, math.sqrt(max_pixels / math.prod(found.size)))
    return found


def draw_sheet(sheet: Sheet, pictures: Sequence[Path], max_pixels: int = MAX_SHEET_PIXELS) -> Image.Image:
    """Return all pictures in one, with their labels; smaller ones stand in the middle of their cell.

    Args:
        sheet: the order and the labels.
        pictures: the file of each cell.
        max_pixels: of the result; larger ones are scaled down.
    """
    sizes = largest_layout(sheet, max_pixels)
    font = ImageFont.load_default(sizes.letter)
    scale = sizes.width / max(cell.request.width for cell in sheet.cells)
    page = Image.new("RGB", sizes.size, "white")
    pen = ImageDraw.Draw(page)
    num_columns, _ = shape_of(sheet)
    wide, high = sizes.width + sizes.gap, sizes.height + sizes.above + sizes.gap
    for place, path in enumerate(pictures):
        row, column = divmod(place, num_columns)
        x, y = sizes.left + sizes.gap + column * wide, sizes.top + sizes.gap + row * high
        if sheet.captions:
            write(pen, sheet.captions[place], font, (x, y), sizes.width, sizes.lines, sizes.letter)
        with Image.open(path, formats=["PNG"]) as image:
            size = min(sizes.width, round(image.width * scale)), min(sizes.height, round(image.height * scale))
            picture = image.convert("RGB")
            if size != picture.size:
                picture = picture.resize((max(1, size[0]), max(1, size[1])), Image.Resampling.LANCZOS)
        corner = x + (sizes.width - picture.width) // 2, y + sizes.above + (sizes.height - picture.height) // 2
        page.paste(picture, corner)
    for column, label in enumerate(sheet.columns):
        at = (sizes.left + sizes.gap + column * wide, sizes.gap)
        write(pen, label, font, at, sizes.width, sizes.lines, sizes.letter)
    for row, label in enumerate(sheet.rows):
        lines = max(1, sizes.height // line_height(sizes.letter))
        at = (sizes.gap, sizes.top + sizes.gap + row * high)
        write(pen, label, font, at, sizes.left - sizes.gap, lines, sizes.letter)
    return page


def line_height(letter: int) -> int:
    """Return the height of one line of a label, in pixels."""
    return math.ceil(letter * 1.3)


def write(
    pen: ImageDraw.ImageDraw, label: str, font: Font, at: tuple[int, int], width: int, lines: int, letter: int
) -> None:
    """Write a label into a box of this width."""
    for line, words in enumerate(wrap(label, font, width, lines)):
        pen.text((at[0], at[1] + line * line_height(letter)), words, fill="black", font=font)


def wrap(label: str, font: Font, width: int, max_lines: int) -> list[str]:
    """Return the lines of a label, none wider than `width` pixels but a single letter; `...` ends one that is cut."""
    lines: list[str] = []
    rest = printable(label).strip()
    while rest and max_lines:
        if len(lines) == max_lines:
            last = lines[-1]
            while last and font.getlength(last + "...") > width:
                last = last[:-1]
            return [*lines[:-1], last + "..."]
        length = fitting_length(rest, font, width)
        space = rest.rfind(" ", 0, length + 1)
        cut = space if space > 0 and length < len(rest) else length
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return lines


def fitting_length(text: str, font: Font, width: int) -> int:
    """Return the number of letters that fit, at least one."""
    lengths = range(1, min(len(text), max(1, width)) + 1)  # no letter is narrower than a pixel
    return max(1, bisect_right(lengths, float(width), key=lambda length: font.getlength(text[:length])))


def save_sheet(path: Path, sheet: Sheet, pictures: Sequence[Path]) -> None:
    """Write all pictures, the file of each cell, as one PNG that tells their settings.

    Raises:
        SpaceError: the disk is full or read-only.
    """
    info = PngInfo()
    info.add_text("anima_train", sheet_text(sheet, pictures))
    with atomic_path(path) as temporary:
        draw_sheet(sheet, pictures).save(temporary, format="PNG", pnginfo=info)


def sheet_text(sheet: Sheet, pictures: Sequence[Path]) -> str:
    """Return the axes, and the settings that all pictures have in common, as JSON."""
    facts = []
    for path in pictures:
        with Image.open(path, formats=["PNG"]) as image:
            facts.append(json.loads(image.info["anima_train"]))
    shared = {key: value for key, value in facts[0].items() if all(each[key] == value for each in facts)}
    axes = {axis.name: {"key": axis.key, "values": list(axis.labels)} for axis in (sheet.x, sheet.y) if axis}
    shown = {"gallery": list(sheet.captions)} if sheet.captions else {"grid": axes}
    return json.dumps({**shown, **shared}, ensure_ascii=False)
