"""`anima sample`."""

from pathlib import Path
from typing import Annotated

import typer

from anima_train.cli.options import ConfigPath, Option, Overrides, Quiet
from anima_train.cli.output import quiet
from anima_train.sampling.names import SAMPLER_NAMES, SCHEDULE_NAMES

GRID = (
    "An axis of a grid, x or y: a setting such as cfg, or prompt, lora (files, folders, none), lora_strength; "
    "may be repeated."
)


def sample(
    config: ConfigPath,
    prompt: Annotated[list[str] | None, Option(help="What to draw, as in ComfyUI; may be repeated.")] = None,
    prompts: Annotated[
        Path | None, Option(help="A .txt file, a prompt in each line; or .toml, a table called prompt for each.")
    ] = None,
    negative: Annotated[str | None, Option(help="What not to draw.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the noise, as in ComfyUI.", show_default="the config's, else 0")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="In pixels.", show_default="the config's, else 1024x1024")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps.", show_default="the config's, else 30, of Turbo 10")] = None,
    cfg: Annotated[
        float | None, typer.Option(help="Strength of the prompt.", show_default="the config's, else 4, of Turbo 1")
    ] = None,
    shift: Annotated[
        float | None, typer.Option(help="Of the noise levels.", show_default="the config's, else 3")
    ] = None,
    sampler: Annotated[str | None, Option(help=", ".join(SAMPLER_NAMES))] = None,
    schedule: Annotated[str | None, Option(help=", ".join(SCHEDULE_NAMES))] = None,
    lora: Annotated[
        list[str] | None, Option(metavar="PATH[:STRENGTH]", help="A LoRA to apply; may be repeated.")
    ] = None,
    checkpoint: Annotated[
        Path | None, Option(help="A transformer instead of the config's.", exists=True, dir_okay=False)
    ] = None,
    grid: Annotated[list[str] | None, Option(metavar="x=KEY:V1,V2,...", help=GRID)] = None,
    gallery: Annotated[
        Path | None, Option(help="A text file; the prompt is drawn with each line in the place of {}.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("samples"),
    overrides: Overrides = None,
    quietly: Quiet = False,
) -> None:
    """Draw pictures with the model of a config, with or without LoRAs, as ComfyUI does; print their paths, always."""
    from anima_train.config.model_part import load_model_part

    model = load_model_part(config, overrides or [], checkpoint)

    from anima_train.cli.draw import choose_requests, choose_sheet, draw, given_settings, save_all
    from anima_train.sampling.grids import Cell, parse_lora

    settings = given_settings(
        size, negative_prompt=negative, seed=seed, steps=steps, cfg=cfg, shift=shift, sampler=sampler, schedule=schedule
    )
    requests = choose_requests(prompt or [], prompts, settings, model, grid or [])
    loras = [parse_lora(text) for text in lora or []]
    with quiet(quietly):
        sheet = choose_sheet(grid or [], gallery, requests, settings, loras, model.pictures)
        pictures = draw(model, sheet.cells if sheet else [Cell(request, tuple(loras)) for request in requests], out)
    if sheet:
        save_all(sheet, pictures, out)
