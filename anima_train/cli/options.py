"""Arguments and options that several commands share."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from anima_train import __version__


def print_version(wanted: bool) -> None:
    """Print the version and end, if it is wanted."""
    if wanted:
        print(f"anima-train {__version__}")
        raise typer.Exit


# Of those that need no default in the help: none is there, or the help says what holds without it.
Argument = partial(typer.Argument, show_default=False)
Option = partial(typer.Option, show_default=False)
ConfigPath = Annotated[Path, Argument(metavar="CONFIG", help="The TOML file.")]
Overrides = Annotated[
    list[str] | None, Option("--set", metavar="KEY.PATH=VALUE", help="Change one key; the value is TOML.")
]
Version = Annotated[
    bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version, and end.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Tell nothing but warnings and errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on standard output.")]
