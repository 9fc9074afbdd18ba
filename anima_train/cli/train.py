"""`anima train`."""

from pathlib import Path
from typing import Annotated

import typer

from anima_train.config.load import load_config
from anima_train.training.train import run_training

ConfigPath = Annotated[Path, typer.Argument(help="The TOML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change one key; the value is TOML.", show_default=False),
]


def train(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, report, and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest training state of the run.")] = False,
) -> None:
    """Train a LoRA, or the whole model."""
    run_training(load_config(config, overrides or []), dry_run=dry_run, resume=resume)
