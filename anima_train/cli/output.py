"""The output of a command: for people, quiet, or one JSON object for programs."""

import contextlib
import json
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import typer

from anima_train.core.errors import UserError
from anima_train.core.format import printable

Facts = Mapping[str, Any]
Findings = tuple[Facts, Iterable[str]]  # the same for programs, and in lines for people


@contextlib.contextmanager
def quiet(wanted: bool) -> Iterator[None]:
    """Tell nothing but warnings and errors while entered, if that is wanted: no lines, no bars."""
    if not wanted:
        yield
        return
    level = logging.root.manager.disable
    logging.disable(logging.INFO)  # which bars heed, too
    try:
        yield
    finally:
        logging.disable(level)


def print_json(make: Callable[[], Facts]) -> None:
    """Print what is made as one JSON object, and nothing else on standard output; errors are such an object, too.

    Whatever else is printed meanwhile goes to stderr.

    Raises:
        UserError: as making it; it is printed already.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = make()
    except UserError as error:
        errors = ["\n  ".join([problem, *getattr(problem, "entries", ())]) for problem in error.problems]
        print(json.dumps({"errors": errors, "exit_code": error.exit_code}))
        raise
    print(json.dumps(as_json(found), allow_nan=False))


def show(make: Callable[[], Findings], in_json: bool) -> None:
    """Print what is made, for programs or for people; errors as of `print_json`."""
    if in_json:
        print_json(lambda: make()[0])
        return
    for line in make()[1]:
        print(printable(line))


def as_json(value: Any) -> Any:
    """Return a value as JSON has it: dataclasses are objects, paths text, numbers that are not finite null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def check_written(path: Path, program: Literal["ComfyUI", "diffusers"] = "ComfyUI") -> None:
    """Verify the weights that a command has made; tell what is wrong, and end with 1, or say nothing.

    Args:
        path: a file, or a folder with files in it.
        program: that they are for.
    """
    from anima_train.tools.verify import verify

    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    complaints = [f"{file} is written, but {text}" for file in files for text in verify(file).complaints(program)]
    for complaint in complaints:
        print(printable(complaint), file=sys.stderr)
    if complaints:
        raise typer.Exit(1)
