"""`anima train`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from anima_train.config.load import load_config
from anima_train.training.train import run_training

RESUME = "--resume"

ConfigPath = Annotated[Path, typer.Argument(help="The TOML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change one key; the value is TOML.", show_default=False),
]


def train(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, report, and stop.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with this run, or from a PATH: a training state, or another run.")
    ] = False,
    resume_path: Annotated[Path | None, typer.Option("--resume-path", hidden=True)] = None,
) -> None:
    """Train a LoRA, or the whole model."""
    run_training(load_config(config, overrides or []), dry_run, resume, resume_path)


def with_resume_path(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments in which `--resume PATH`, where the path may be absent, is an option that typer knows.

    A configuration's file is not such a path.
    """
    found = list(arguments)
    for index, argument in enumerate(found):
        if argument.startswith(f"{RESUME}="):
            found[index : index + 1] = [f"{RESUME}-path", argument.partition("=")[2]]
        elif argument == RESUME and index + 1 < len(found):
            following = found[index + 1]
            if not following.startswith("-") and not following.endswith(".toml"):
                found[index] = f"{RESUME}-path"
    return found
