"""`anima reference`."""

from pathlib import Path
from typing import Annotated

import typer


def reference(folder: Annotated[Path, typer.Argument(help="Where to write the files.")] = Path("configs")) -> None:
    """Write reference.toml, with every key, its default and its meaning, and the JSON schemas for editors."""
    from anima_train.config.reference import write_reference

    for path in write_reference(folder):
        print(path)
