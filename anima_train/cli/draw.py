"""The work of `anima sample`: what the flags ask for, and the pictures, with the sheet and the page of a grid."""

import contextlib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anima_train.config.model_part import ModelPart
from anima_train.config.paths import suggest
from anima_train.config.prompt_files import HINTS, make_requests, read_lines, read_requests
from anima_train.core.device import choose_device, describe_device
from anima_train.core.errors import ConfigError, ModelFileError
from anima_train.core.format import printable
from anima_train.core.settings import quoted
from anima_train.reports.contact_sheet import save_sheet
from anima_train.reports.grid_page import write_page
from anima_train.run.log import is_quiet
from anima_train.run.progress import DrawingBar
from anima_train.sampling.generate import PictureSettings, Request, with_shared
from anima_train.sampling.grids import Cell, ChosenLora, Sheet, by_loras, make_gallery, make_grid

Values = Mapping[str, Any]  # of keys of `Request`

PROMPT_VALUES = re.compile(r"\s*[xy]\s*=\s*prompt\s*:\s*\S")  # an axis with prompts of its own
FLAGS = {key: f"--{key}" for key in ("seed", "steps", "cfg", "shift", "sampler", "schedule")} | {
    "negative_prompt": "--negative",
    "width": "--size",
    "height": "--size",
}


def given_settings(size: str | None, **others: object) -> dict[str, Any]:
    """Return the settings of pictures that were given, from the values of all flags."""
    width, height = parse_size(size)
    values = {"width": width, "height": height, **others}
    return {key: value for key, value in values.items() if value is not None}


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """Return width and height from `832x1216`."""
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise ConfigError(f"--size: found {quoted(text)}, expected WIDTHxHEIGHT in pixels, such as 832x1216")
    return int(match[1]), int(match[2])


def choose_requests(
    texts: list[str], file: Path | None, settings: Values, model: ModelPart, grid: Sequence[str] = ()
) -> list[Request]:
    """Return the requests of the flags; where they give no prompt, those of the configuration.

    Args:
        texts: the prompts of --prompt.
        file: of --prompts.
        settings: that flags give; they win over those of the configuration, not over those of the file.
        model: of the configuration; the keys of its [sampling] hold for the prompts of flags and file, too.
        grid: the axes of --grid, which may have prompts.

    Raises:
        ConfigError: a setting or the file is wrong.
    """
    make_requests([], settings, FLAGS)  # of flags that do not go together, before others are mixed in
    sampling, shared = model.sampling, model.pictures
    requests = make_requests(texts, with_shared(shared, settings), FLAGS)
    if file is not None:
        requests += read_requests(file, settings, shared)
    if not requests and sampling is not None and not any(map(PROMPT_VALUES.match, grid)):
        for own in sampling.prompts:
            keys = {key: getattr(own, key) for key in PictureSettings.model_fields}
            requests += make_requests([own.prompt], with_shared(keys, settings), FLAGS)
    return requests


def choose_sheet(
    grid: list[str], gallery: Path | None, requests: Sequence[Request], settings: Values, loras: Sequence[ChosenLora],
    shared: Values,
) -> Sheet | None:  # fmt: skip
    """Return the grid or the gallery that flags ask for, or None where each request is one picture.

    Args:
        grid: the axes of --grid.
        gallery: the file of --gallery.
        requests: with a prompt.
        settings: that flags give.
        loras: of all pictures.
        shared: that hold for prompts that are values of an axis, where flags give nothing else.

    Raises:
        ConfigError: what is asked for does not go together, or there is nothing to draw.
    """
    if gallery is not None:
        if grid:
            raise ConfigError("--gallery: cannot be drawn together with --grid; give one of them")
        return make_gallery(read_lines(gallery, "--gallery"), requests, loras)
    if not grid:
        if not requests:
            raise ConfigError(
                "there is nothing to draw; give --prompt TEXT or --prompts FILE, or a config with [sampling]"
            )
        return None
    sheet = make_grid(grid, requests, make_requests([""], with_shared(shared, settings), FLAGS)[0], loras, HINTS)
    replaced = [axis for axis in (sheet.x, sheet.y) if axis is not None and axis.key in settings]
    for axis in replaced:
        if FLAGS[axis.key] != "--size":
            raise ConfigError(f"{FLAGS[axis.key]}: has no effect with {axis.flag}; leave one of them out")
    if len(replaced) == 2:
        flags = " and ".join(axis.flag for axis in replaced)
        raise ConfigError(f"--size: has no effect with {flags}; leave it out")
    for axis in [] if is_quiet() else replaced:
        print(f"note: --size: its {axis.key} has no effect, as {axis.flag} sets it", file=sys.stderr)
    return sheet


def draw(model: ModelPart, cells: Sequence[Cell], out: Path) -> list[Path]:
    """Draw each cell into the folder, print each path when it is written, and return them in the order of the cells.

    Raises:
        ConfigError: the folder cannot be made.
        ModelFileError: LoRAs that are not there, all of them.
        UserError: as `anima_train.sampling.pipeline.sample`.
    """
    paths = dict.fromkeys(lora.path for cell in cells for lora in cell.loras)
    if absent := [path for path in paths if not path.exists()]:
        raise ModelFileError(f"{path}: there is no such file{suggest(str(path), Path())}" for path in absent)
    # Not above: they import transformers and diffusers, and a wrong flag is told sooner without them.
    from anima_train.config.model_files import build_model_spec
    from anima_train.data.buckets import Size
    from anima_train.model.attention_choice import AttentionShape, choose_attention
    from anima_train.model.safetensors_io import open_header
    from anima_train.model.variants import drawn_with, family_warning
    from anima_train.sampling.pipeline import sample

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be a folder ({error.strerror}); choose another place") from error
    device = choose_device()
    spec = build_model_spec(model, device)
    for path in paths:
        if text := family_warning(path.name, open_header(path).metadata, spec.files.FAMILY):
            print(printable(f"warning: {text}"), file=sys.stderr)
    if not is_quiet():
        print(describe_device(device, spec.dtype), file=sys.stderr)
    num_tokens = max(Size(cell.request.width, cell.request.height).num_tokens for cell in cells)
    choice = choose_attention(model.attention, device, spec.dtype, AttentionShape.of(spec.files, 1, num_tokens))
    if not is_quiet():
        print(choice, file=sys.stderr)
        if text := drawn_with(spec.files.transformer):
            print(f"{spec.files.transformer.name} looks like Turbo: {text}, where nothing else is set", file=sys.stderr)
    pictures = {}
    drawn = [cells[place] for places in by_loras(cells).values() for place in places]
    bar = DrawingBar([cell.request.steps for cell in drawn], is_shown=not is_quiet())
    with choice.in_use(device), contextlib.closing(bar):
        for place, path in sample(spec, cells, out, bar.tell):
            bar.finished(printable(str(path)))
            pictures[place] = path
    return [pictures[place] for place in range(len(cells))]


def save_all(sheet: Sheet, pictures: Sequence[Path], out: Path) -> None:
    """Write one picture of all pictures, and the page, and print their paths."""
    save_sheet(out / "grid.png", sheet, pictures)
    write_page(out / "grid.html", sheet, pictures)
    print(out / "grid.png", out / "grid.html", sep="\n", flush=True)
