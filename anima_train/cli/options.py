"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from anima_train import __version__


def print_version(wanted: bool) -> None:
    """Print the version and end, if it is wanted."""
    if wanted:
        print(f"anima-train {__version__}")
        raise typer.Exit


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The TOML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change one key; the value is TOML.", show_default=False),
]
Version = Annotated[
    bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version, and end.")
]
