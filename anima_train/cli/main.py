"""`anima-train` and `anima`: prints user errors without a traceback, and ends with their exit code."""

import sys
from collections.abc import Callable

import typer

from anima_train.cli.cache import cache
from anima_train.cli.check import check
from anima_train.cli.convert import convert
from anima_train.cli.download import download
from anima_train.cli.reference import reference
from anima_train.cli.report import report
from anima_train.cli.sample import sample
from anima_train.cli.streams import outlive_readers
from anima_train.cli.tiny import tiny
from anima_train.cli.train import train, with_resume_path
from anima_train.distributed.failures import run_program

COMMANDS: tuple[Callable[..., None], ...] = (
    train, check, report, sample, cache, convert, tiny, download, reference,
)  # fmt: skip


def application(commands: tuple[Callable[..., None], ...], text: str) -> typer.Typer:
    """A typer application with these commands; a single one needs no name on the command line."""
    app = typer.Typer(help=text, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
    for command in commands:
        app.command()(command)
    return app


def main() -> None:
    """The `anima` command."""
    run(application(COMMANDS, "Tools for training the Anima text-to-image model."))


def train_main() -> None:
    """The `anima-train` command."""
    run(application((train,), "Train a LoRA, or the whole Anima model, from a TOML file."))


def run(app: typer.Typer) -> None:
    """Run an application; a user's mistake is a message, a fault of ours a traceback."""
    outlive_readers()
    run_program(lambda: app(args=with_resume_path(sys.argv[1:])))
