"""`anima convert`."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from anima_train.cli.extract import Energy, Rank, extracted, limit_of, resized
from anima_train.cli.options import Argument, Option, Overrides
from anima_train.cli.output import check_written, show
from anima_train.core.errors import ConfigError
from anima_train.core.format import count, printable

if TYPE_CHECKING:
    import torch

    from anima_train.tools.spectra import Limit

SameWeights = Literal["diffusers", "comfyui", "kohya", "parts"]
Layout = Literal[SameWeights, "lora"]
Precision = Literal["bfloat16", "float32"]
Prefix = Literal["net.", "model.diffusion_model.", "none"]


def convert(
    source: Annotated[
        Path, Argument(metavar="SOURCE", help="A config's TOML file, a .safetensors file, or a folder of diffusers.")
    ],
    out: Annotated[Path, Argument(metavar="OUT", help="The folder or the .safetensors file to make.")],
    to: Annotated[
        Layout,
        Option(
            "--to",
            help="comfyui: the keys of an adapter, or a whole model as one file; kohya: the keys of an adapter; "
            "diffusers: of a config a folder, or the keys of an adapter; lora: of another adapter the nearest LoRA; "
            "parts: of a bundle its files, in a folder.",
        ),
    ],
    checkpoint: Annotated[
        Path | None, Option(help="A whole transformer, with the LLM adapter inside, instead of the config's.")
    ] = None,
    dtype: Annotated[Precision | None, Option(help="Of every tensor. Absent: as in the files.")] = None,
    prefix: Annotated[
        Prefix | None, Option(help="Of the keys of a whole model. Absent: net., as the official base has it.")
    ] = None,
    rank: Rank = None,
    energy: Energy = None,
    base: Annotated[
        Path | None, Option(help="The checkpoint that a DoRA was trained on, with --to lora; then float32 is written.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Write a config's model, a whole model or an adapter in the layout of another program."""
    is_config = source.suffix != ".safetensors" and not source.is_dir()
    if not is_config and (checkpoint is not None or overrides):
        raise ConfigError(f"--checkpoint and --set are for a config, and {source} holds weights; leave them out")
    if is_config and to != "diffusers":
        raise ConfigError(f"--to {to} is for files of weights: give one instead of {source}, or --to diffusers")
    if to != "lora" and not (rank is None and energy is None and base is None):
        raise ConfigError(f"--rank, --energy and --base are for --to lora, found --to {to}; leave them out")
    if prefix is not None and to != "comfyui":
        raise ConfigError("--prefix is for a whole model as one file, with --to comfyui; leave it out")
    if is_config:
        convert_model(source, out, checkpoint, dtype, overrides or [])
    elif to == "lora":
        convert_to_lora(source, out, base, limit_of(rank, energy), dtype)
    else:
        from anima_train.run.log import logged_to, terminal

        with logged_to(terminal(is_main=True, stream=sys.stderr)):
            convert_weights(source, out, to, dtype, prefix)


def convert_weights(path: Path, out: Path, to: SameWeights, dtype: Precision | None, prefix: Prefix | None) -> None:
    """Write an adapter under other keys, a whole model as one file, or a bundle as several.

    Raises:
        UserError: as `convert_adapter`, `convert_checkpoint` and `split_bundle`, or the file to write is there.
    """
    from anima_train.adapters.parts import is_adapter
    from anima_train.core.device import DTYPES
    from anima_train.model.safetensors_io import open_header
    from anima_train.tools.convert_adapter import convert_adapter
    from anima_train.tools.convert_checkpoint import convert_checkpoint, described, split_bundle
    from anima_train.tools.outputs import expect_new_file

    precision: torch.dtype | None = None if dtype is None else DTYPES[dtype]
    if to == "parts":
        print(printable(f"{out}: {described(split_bundle(path, out, precision))}"))
        check_written(out)
        return
    is_lora = not path.is_dir() and is_adapter(open_header(path))
    if not is_lora and to != "comfyui":
        way = "give the config that names it" if to == "diffusers" else "kohya's scripts read the official file"
        raise ConfigError(f"--to {to} is for adapters, and {path} is a whole model; {way}")
    expect_new_file(out)
    if is_lora:
        if prefix is not None:
            raise ConfigError(f"--prefix is for whole models, and {path} is an adapter; leave it out")
        number = convert_adapter(path, out, to, precision)
        print(printable(f"{out}: {count(number, 'weight')} under the keys of {to}"))
        check_written(out, "diffusers" if to == "diffusers" else "ComfyUI")
        return
    keys = "" if prefix == "none" else prefix or "net."
    number = convert_checkpoint(path, out, keys, precision)
    print(printable(f"{out}: {count(number, 'tensor')} with the prefix {keys or 'none'}"))
    check_written(out)


def convert_to_lora(path: Path, out: Path, base: Path | None, limit: "Limit", dtype: Precision | None) -> None:
    """Write the LoRA that is nearest to an adapter of another kind, and tell the error of each module.

    Raises:
        UserError: as `resized` and `extracted`, or it is none, or a DoRA without its base.
    """
    from anima_train.adapters.parts import adapter_keys, is_adapter
    from anima_train.adapters.updates import is_for_one_base
    from anima_train.model.file_kinds import uncompiled
    from anima_train.model.safetensors_io import open_header

    header = None if path.is_dir() else open_header(path)
    if header is None or not is_adapter(header):
        raise ConfigError(
            f"--to lora is for adapters, and {path} is none; `anima extract BASE` makes one of a fine-tune"
        )
    keys = adapter_keys(uncompiled(header).entries)
    if base is None and is_for_one_base({key.part for key in keys if key.module}):
        raise ConfigError(f"{path} has values that hold for its base alone, as a DoRA has; give that base as --base")
    if base is None:
        show(lambda: resized(path, out, limit, dtype), False)
    else:
        show(lambda: extracted(base, path, out, limit, dtype or "float32"), False)
    check_written(out)


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
    from anima_train.core.files import written_to
    from anima_train.tools.convert import expect_new, to_diffusers

    expect_new(folder)  # before anything is downloaded
    files = find_model_files(part)
    if checkpoint is not None:
        files = replace(files, transformer=checkpoint, llm_adapter=None)
    files.check_headers()
    precision = None if dtype is None else DTYPES[dtype]
    with written_to(folder):
        to_diffusers(files, folder, precision)
    print(f"{folder}: load it with diffusers.ModularPipeline.from_pretrained('{folder}'), then .load_components()")
    check_written(folder, "diffusers")
