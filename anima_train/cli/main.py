"""`anima-train` and `anima`: prints user errors without a traceback, and ends with their exit code.

The modules of the commands hold what `--help` shows and import their work inside the function: help, a version and a
slip of the pen need not wait for torch, nor a refused configuration for transformers and diffusers.
"""

import errno
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer

from anima_train.cli.cache import cache
from anima_train.cli.check import check
from anima_train.cli.command import Command
from anima_train.cli.compare import compare
from anima_train.cli.convert import convert
from anima_train.cli.diff import diff
from anima_train.cli.download import download
from anima_train.cli.extract import extract, resize
from anima_train.cli.inspect import inspect
from anima_train.cli.merge import merge
from anima_train.cli.options import Version
from anima_train.cli.reference import reference
from anima_train.cli.remap import remap
from anima_train.cli.report import report
from anima_train.cli.sample import sample
from anima_train.cli.streams import outlive_readers
from anima_train.cli.tiny import tiny
from anima_train.cli.train import train, with_resume_path
from anima_train.cli.verify import verify
from anima_train.core.errors import ConfigError
from anima_train.core.interrupts import ctrl_c_in_one_line
from anima_train.distributed.failures import run_program
from anima_train.distributed.launcher import rank

COMMANDS: tuple[Callable[..., None], ...] = (
    train, check, report, sample, compare, cache, convert, diff, verify, inspect, merge, extract, resize, remap,
    tiny, download, reference,
)  # fmt: skip
NAMES = [command.__name__ for command in COMMANDS]
USAGE_ERROR: Any = typer.BadParameter.__base__  # click's, or that of typer's own copy of click
OTHERS = f"`anima-train COMMAND` is the same as `anima COMMAND`: {', '.join(NAMES)}."


def application(commands: tuple[Callable[..., None], ...], text: str, more: str | None = None) -> typer.Typer:
    """Return a typer application with these commands; a single one needs no name on the command line.

    Args:
        commands: their names are those of the functions.
        text: what the help begins with where there are several.
        more: what the help of each command ends with.
    """
    names = {"help_option_names": ["--help", "-h"]}
    app = typer.Typer(
        help=text, no_args_is_help=False, pretty_exceptions_enable=False, context_settings=names,
        rich_markup_mode=None,  # rich would take longer than everything else that `--help` needs
    )  # fmt: skip
    for command in commands:
        app.command(context_settings=names, epilog=more, cls=Command)(command)
    if len(commands) > 1:
        app.callback(invoke_without_command=True)(without_command)
    return app


def without_command(context: typer.Context, version: Version = False) -> None:
    """Take the option --version before a command; where there is no command, show the help."""
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(2)


def main() -> None:
    """Run the `anima` command."""
    run(application(COMMANDS, "Tools for training the Anima text-to-image model."))


def train_main() -> None:
    """Run the `anima-train` command: with the name of a command first as `anima` does, else the training."""
    if is_command(*sys.argv[1:2]):
        main()
    else:
        run(application((train,), "Train a LoRA, or the whole Anima model, from a TOML file.", OTHERS))


def is_command(word: str = "") -> bool:
    """Return True if a word is the name of a command, or looks like a slip in one and is no file."""
    return word in NAMES or (word.isalpha() and bool(get_close_matches(word, NAMES)) and not Path(word).exists())


def run(app: typer.Typer) -> None:
    """Run an application; a user's mistake is a message, a fault of ours a traceback."""
    outlive_readers()
    with ctrl_c_in_one_line(is_main=rank() == 0):
        run_program(lambda: obey(app, with_resume_path(sys.argv[1:])))


def obey(app: typer.Typer, arguments: list[str]) -> None:
    """Run the command that the arguments ask for, and end with its exit code.

    Raises:
        ConfigError: there is no such command or option, or a value is none; its usage is printed. Or a path is one that
            no disk takes.
    """
    try:
        sys.exit(app(args=arguments, standalone_mode=False))
    except USAGE_ERROR as error:
        if (context := error.ctx) is not None:
            hint = f"Try '{context.command_path} {context.help_option_names[0]}' for help.\n"
            print(f"{context.get_usage()}\n{hint}", file=sys.stderr)
        raise ConfigError(error.format_message()) from error
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise ConfigError(f"{error.filename}: {error.strerror}; a name has at most 255 bytes") from error
