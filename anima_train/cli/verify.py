"""`anima verify`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from anima_train.cli.options import Argument, Json, Option
from anima_train.cli.output import Findings, show


def verify(
    path: Annotated[Path, Argument(metavar="FILE", help="A .safetensors file.")],
    base: Annotated[Path | None, Option(help="A checkpoint that it is for: names and shapes are compared.")] = None,
    program: Annotated[
        Literal["ComfyUI", "diffusers"],
        Option(help="Whose ignoring a key makes the exit code 1. Absent: ComfyUI.", case_sensitive=False),
    ] = "ComfyUI",
    as_json: Json = False,
) -> None:
    """Tell what a file is, and which of its keys ComfyUI and diffusers would use.

    Exit code 1: something is missing in it, or a key would be ignored. Only the header is read, whatever the size.
    """
    from anima_train.tools import verdict, verify

    is_good = False

    def look() -> Findings:
        nonlocal is_good
        found = verify.verify(path, base)
        is_good = found.is_good_for(program)
        good_for = {name: found.is_good_for(name) for name in found.programs}
        return vars(found) | {"good_for": good_for}, verdict.lines(found)

    show(look, as_json)
    if not is_good:
        raise typer.Exit(1)
