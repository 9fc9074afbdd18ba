"""`anima convert`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from anima_train.cli.options import Argument, Option, Overrides
from anima_train.core.errors import ConfigError
from anima_train.core.format import count, printable

Layout = Literal["diffusers", "comfyui", "kohya"]
Precision = Literal["bfloat16", "float32"]


def convert(
    source: Annotated[Path, Argument(metavar="CONFIG|ADAPTER", help="The TOML file, or a .safetensors file.")],
    out: Annotated[Path, Argument(metavar="OUT", help="The folder to make; of an adapter, the .safetensors file.")],
    to: Annotated[Layout, Option("--to", help="The layout to write; comfyui and kohya are keys of adapters.")],
    checkpoint: Annotated[
        Path | None, Option(help="A whole transformer, with the LLM adapter inside, instead of the config's.")
    ] = None,
    dtype: Annotated[Precision | None, Option(help="Of every tensor. Absent: as in the files.")] = None,
    overrides: Overrides = None,
) -> None:
    """Write a config's model, or a LoRA or another adapter, in the layout of another program."""
    if source.suffix == ".safetensors":
        if checkpoint is not None or overrides:
            raise ConfigError(
                f"--checkpoint and --set are for a config, and {source} is a file of weights; leave them out"
            )
        convert_file(source, out, to, dtype)
    elif to != "diffusers":
        raise ConfigError(f"--to {to} is for adapters: give a .safetensors file instead of {source}, or --to diffusers")
    else:
        convert_model(source, out, checkpoint, dtype, overrides or [])


def convert_file(path: Path, out: Path, to: Layout, dtype: Precision | None) -> None:
    """Write an adapter under other keys.

    Raises:
        UserError: as `convert_adapter`, or the file to write is there.
    """
    from anima_train.core.device import DTYPES
    from anima_train.tools.convert_adapter import convert_adapter
    from anima_train.tools.outputs import expect_new_file

    expect_new_file(out)
    number = convert_adapter(path, out, to, None if dtype is None else DTYPES[dtype])
    print(printable(f"{out}: {count(number, 'weight')} under the keys of {to}"))


def convert_model(
    config: Path, folder: Path, checkpoint: Path | None, dtype: Precision | None, overrides: list[str]
) -> None:
    """Write a config's model as a folder of diffusers.

    Raises:
        UserError: as `to_diffusers`, or the config is wrong.
    """
    from anima_train.config.model_part import load_model_part

    part = load_model_part(config, overrides)

    from anima_train.config.model_files import find_model_files
    from anima_train.core.device import DTYPES
    from anima_train.tools.convert import expect_new, to_diffusers

    expect_new(folder)  # before anything is downloaded
    files = find_model_files(part)
    if checkpoint is not None:
        files = replace(files, transformer=checkpoint, llm_adapter=None)
    files.check_headers()
    precision = None if dtype is None else DTYPES[dtype]
    try:
        to_diffusers(files, folder, precision)
    except OSError as error:  # a file where its folder should be, or a name that is none
        raise ConfigError(f"{folder} cannot be written ({error.strerror or error}); choose another place") from error
    print(f"{folder}: load it with diffusers.ModularPipeline.from_pretrained('{folder}'), then .load_components()")
