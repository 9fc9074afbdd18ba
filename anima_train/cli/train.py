"""`anima train`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anima_train.cli.options import ConfigPath, Overrides, Version
from anima_train.core.format import printable
from anima_train.distributed.launcher import rank

if TYPE_CHECKING:
    from anima_train.config.load import LoadedConfig

RESUME = "--resume"


def train(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, report, and stop.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume this run, or from a PATH: a training state, or another run.")
    ] = False,
    resume_path: Annotated[Path | None, typer.Option("--resume-path", hidden=True)] = None,
    version: Version = False,
) -> None:
    """Train a LoRA, or the whole Anima model, from a TOML file."""
    from anima_train.config.load import load_config

    train_and_report(load_config(config, overrides or []), dry_run, resume, resume_path)


def train_and_report(
    loaded: "LoadedConfig", dry_run: bool = False, resume: bool = False, resume_path: Path | None = None
) -> Path | None:
    """Run the training, then write its page; return as `run_training` does."""
    from anima_train.training.train import run_training

    final = run_training(loaded, dry_run, resume, resume_path)
    if final is not None and rank() == 0:
        write_report(final.parent.parent)
    return final


def with_resume_path(arguments: Sequence[str]) -> list[str]:
    """Return command-line arguments in which `--resume PATH`, whose path may be absent, is an option typer knows.

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


def write_report(run: Path) -> None:
    """Write the page of a run that has ended; the run does not fail where that does."""
    from anima_train.reports.run_page import write_run_report

    try:
        print(f"report {printable(str(write_run_report(run)))}")
    except Exception as error:  # noqa: BLE001 whatever it is: the weights are saved, and `anima report` can be tried again
        print(printable(f"warning: no report of the run was written ({type(error).__name__}: {error})"))
