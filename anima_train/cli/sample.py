"""`anima sample`."""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from anima_train.caching.text_encoding import text_device
from anima_train.cli.train import ConfigPath, Overrides
from anima_train.config.load import load_model_part
from anima_train.config.model_files import find_model_files
from anima_train.config.prompt_files import HINTS, make_requests, read_lines, read_requests
from anima_train.core.device import DTYPES, choose_device, describe_device
from anima_train.core.errors import ConfigError
from anima_train.core.settings import quoted
from anima_train.reports.contact_sheet import save_sheet
from anima_train.reports.grid_page import write_page
from anima_train.sampling.generate import SAMPLER_NAMES, SCHEDULE_NAMES, Request
from anima_train.sampling.grids import Cell, Sheet, make_gallery, make_grid, parse_lora
from anima_train.sampling.pipeline import sample as draw

FLAGS = {key: f"--{key}" for key in ("seed", "steps", "cfg", "shift", "sampler", "schedule")} | {
    "negative_prompt": "--negative",
    "width": "--size",
    "height": "--size",
}


def sample(
    config: ConfigPath,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw, as in ComfyUI; may be repeated.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A .txt file, a prompt in each line; or .toml, a table called prompt for each.", show_default=False
        ),
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What not to draw.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="Of the noise, as in ComfyUI.", show_default="0")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="In pixels.", show_default="1024x1024")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps.", show_default="30")] = None,
    cfg: Annotated[float | None, typer.Option(help="Strength of the prompt.", show_default="4")] = None,
    shift: Annotated[float | None, typer.Option(help="Of the noise levels.", show_default="3")] = None,
    sampler: Annotated[str | None, typer.Option(help=", ".join(SAMPLER_NAMES), show_default=False)] = None,
    schedule: Annotated[str | None, typer.Option(help=", ".join(SCHEDULE_NAMES), show_default=False)] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH[:STRENGTH]", help="A LoRA to apply; may be repeated.", show_default=False),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="A transformer instead of the config's.", exists=True, dir_okay=False, show_default=False),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="x=KEY:V1,V2,...",
            help="An axis of a grid, x or y: a setting such as cfg, or prompt, lora (files, folders, none), "
            "lora_strength; may be repeated.",
            show_default=False,
        ),
    ] = None,
    gallery: Annotated[
        Path | None,
        typer.Option(help="A text file; the prompt is drawn with each line in the place of {}.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("samples"),
    overrides: Overrides = None,
) -> None:
    """Draw pictures with the model of a config, with or without LoRAs, as ComfyUI does."""
    width, height = parse_size(size)
    given = {
        "negative_prompt": negative, "seed": seed, "width": width, "height": height, "steps": steps, "cfg": cfg,
        "shift": shift, "sampler": sampler, "schedule": schedule,
    }  # fmt: skip
    settings = {key: value for key, value in given.items() if value is not None}
    loaded = load_model_part(config, overrides or [], checkpoint)
    requests = make_requests(prompt or [], settings, FLAGS)
    if prompts is not None:
        requests += read_requests(prompts, settings)
    if not requests and loaded.config.sampling is not None:
        requests = with_flags(loaded.config.sampling.prompts, settings)
    loras = [parse_lora(text) for text in lora or []]
    sheet = None
    if gallery is not None:
        if grid:
            raise ConfigError("--gallery: cannot be drawn together with --grid; give one of them")
        sheet = make_gallery(read_lines(gallery, "--gallery"), requests, loras)
    elif grid:
        sheet = make_grid(grid, requests, make_requests([""], settings, FLAGS)[0], loras, HINTS)
        for axis in (sheet.x, sheet.y):
            if axis is not None and axis.key in settings and FLAGS[axis.key] != "--size":
                raise ConfigError(f"{FLAGS[axis.key]}: has no effect with {axis.flag}; leave one of them out")
    elif not requests:
        raise ConfigError("there is nothing to draw; give --prompt TEXT or --prompts FILE, or a config with [sampling]")
    cells = sheet.cells if sheet else [Cell(request, tuple(loras)) for request in requests]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be a folder ({error.strerror}); choose another place") from error
    device = choose_device()
    dtype = DTYPES[loaded.config.model.dtype]
    print(describe_device(device, dtype), file=sys.stderr)
    files = find_model_files(loaded)
    files.check_headers()
    pictures = {}
    encoding_device = text_device(loaded.config.model.text_encoder_device, device)
    for place, path in draw(files, cells, out, device, encoding_device, dtype):
        print(path, flush=True)
        pictures[place] = path
    if sheet is not None:
        for path in save_all(sheet, [pictures[place] for place in range(len(cells))], out):
            print(path, flush=True)


def with_flags(requests: Sequence[Request], settings: Mapping[str, Any]) -> list[Request]:
    """The requests with other settings, where flags give them."""
    wanted = make_requests([""], settings, FLAGS)[0]
    return [request.model_copy(update={key: getattr(wanted, key) for key in settings}) for request in requests]


def save_all(sheet: Sheet, pictures: Sequence[Path], out: Path) -> list[Path]:
    """Write the picture of all pictures, and the page."""
    paths = [out / "grid.png", out / "grid.html"]
    save_sheet(paths[0], sheet, pictures)
    write_page(paths[1], sheet, pictures)
    return paths


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """Width and height from `832x1216`."""
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise ConfigError(f"--size: found {quoted(text)}, expected WIDTHxHEIGHT in pixels, such as 832x1216")
    return int(match[1]), int(match[2])
