"""`anima tiny`."""

from pathlib import Path
from typing import Annotated

import typer

from anima_train.cli.options import Argument


def tiny(
    folder: Annotated[Path, Argument(help="Where to write it.")],
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    comfy: Annotated[bool, typer.Option("--comfy", help="The smallest shapes unmodified ComfyUI accepts.")] = False,
) -> None:
    """Write a random tiny model in the official file layout, to try everything on."""
    from anima_train.model.tiny import write_tiny

    paths = write_tiny(folder, seed, comfy)
    for path in (paths.transformer, paths.vae, paths.llm, paths.tokenizer, paths.t5_tokenizer):
        print(path)
