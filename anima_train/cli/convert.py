"""`anima convert`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from anima_train.cli.options import Argument, ConfigPath, Option, Overrides
from anima_train.core.errors import ConfigError

# Converting needs no images: those that the config names may be on another machine.
WITHOUT_IMAGES = ('dataset={directory=[{path="."}]}', "eval_datasets=[]")


def convert(
    config: ConfigPath,
    folder: Annotated[Path, Argument(metavar="OUT", help="The folder to make.")],
    to: Annotated[Literal["diffusers"], Option("--to", help="The layout to write.")],
    checkpoint: Annotated[
        Path | None, Option(help="A whole transformer, with the LLM adapter inside, instead of the config's.")
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float32"] | None, Option(help="Of every tensor. Absent: as in the files.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Write a config's model in the layout of another library."""
    from anima_train.config.load import load_config

    loaded = load_config(config, [*(overrides or []), *WITHOUT_IMAGES])

    from anima_train.config.model_files import find_model_files
    from anima_train.core.device import DTYPES
    from anima_train.tools.convert import expect_new, to_diffusers

    expect_new(folder)  # before anything is downloaded
    files = find_model_files(loaded.config)
    if checkpoint is not None:
        files = replace(files, transformer=checkpoint, llm_adapter=None)
    files.check_headers()
    precision = None if dtype is None else DTYPES[dtype]
    try:
        to_diffusers(files, folder, precision)
    except OSError as error:  # a file where its folder should be, or a name that is none
        raise ConfigError(f"{folder} cannot be written ({error.strerror or error}); choose another place") from error
    print(f"{folder}: load it with {to}.ModularPipeline.from_pretrained('{folder}'), then .load_components()")
