"""`anima train`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from anima_train.config.load import LoadedConfig, load_config
from anima_train.core.format import printable
from anima_train.distributed.launcher import rank
from anima_train.reports.run_page import write_run_report
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
    train_and_report(load_config(config, overrides or []), dry_run, resume, resume_path)


def train_and_report(
    loaded: LoadedConfig, dry_run: bool = False, resume: bool = False, resume_path: Path | None = None
) -> Path | None:
    """Run the training, then write its page; returns as `run_training` does."""
    final = run_training(loaded, dry_run, resume, resume_path)
    if final is not None and rank() == 0:
        leave_report(final.parent.parent)
    return final


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


def leave_report(run: Path) -> None:
    """Write the page of a run that has ended; the run does not fail where that does."""
    try:
        print(f"report {printable(str(write_run_report(run)))}")
    except Exception as error:  # noqa: BLE001 whatever it is: the weights are saved, and `anima report` can be tried again
        print(printable(f"warning: no report of the run was written ({type(error).__name__}: {error})"))
