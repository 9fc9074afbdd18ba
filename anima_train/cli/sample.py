"""`anima sample`."""

import math
import re
from pathlib import Path
from typing import Annotated

import torch
import typer

from anima_train.cli.train import ConfigPath, Overrides
from anima_train.config.load import load_model_part
from anima_train.config.prompt_files import make_requests, read_requests
from anima_train.core.errors import ConfigError
from anima_train.core.settings import quoted
from anima_train.sampling.generate import SAMPLER_NAMES, SCHEDULE_NAMES
from anima_train.training.sample import ChosenLora
from anima_train.training.sample import sample as draw

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
    requests = make_requests(prompt or [], settings, FLAGS)
    if prompts is not None:
        requests += read_requests(prompts, settings)
    if not requests:
        raise ConfigError("there is nothing to draw; give --prompt TEXT or --prompts FILE")
    loras = [parse_lora(text) for text in lora or []]
    loaded = load_model_part(config, overrides or [], checkpoint)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be a folder ({error.strerror}); choose another place") from error
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    for path in draw(loaded, loras, requests, out, device):
        print(path, flush=True)


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """Width and height from `832x1216`."""
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise ConfigError(f"--size: found {quoted(text)}, expected WIDTHxHEIGHT in pixels, such as 832x1216")
    return int(match[1]), int(match[2])


def parse_lora(text: str) -> ChosenLora:
    """A LoRA and its strength from `PATH` or `PATH:STRENGTH`."""
    path, _, strength = text.rpartition(":")
    if path and not Path(text).exists():
        try:
            number = float(strength)
        except ValueError:
            return ChosenLora(Path(text))  # the colon belongs to the path
        if not math.isfinite(number):
            raise ConfigError(f"--lora {quoted(text)}: found the strength {strength}, expected a finite number")
        return ChosenLora(Path(path), number)
    return ChosenLora(Path(text))
