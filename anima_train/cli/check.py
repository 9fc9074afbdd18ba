"""`anima check`."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from anima_train.cli.options import ConfigPath, Json, Option, Overrides, Quiet
from anima_train.cli.output import Facts, print_json, quiet
from anima_train.core.errors import ConfigError, DataError
from anima_train.core.format import printable


def check(
    config: ConfigPath,
    overrides: Overrides = None,
    html: Annotated[
        Path | None, Option(dir_okay=False, help="The page to write. Absent: check_CONFIG.html in output_dir.")
    ] = None,
    measure_steps: Annotated[
        int | None,
        Option(
            "--measure",
            min=1,
            metavar="N",
            help="Run N training steps each, after a first one that is not timed, on the smallest and the largest "
            "bucket: memory, time.",
        ),
    ] = None,
    no_html: Annotated[bool, typer.Option("--no-html", help="Write no page, and decode no image for it.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="End with exit code 3 if there is a warning.")] = False,
    as_json: Json = False,
    quietly: Quiet = False,
) -> None:
    """Check a config, its model files and its images, and report what a run would do, as text and as a page."""
    if html is not None and no_html:
        raise ConfigError("--html and --no-html exclude each other; give one of them")
    if as_json:
        print_json(lambda: run_check(config, overrides or [], html, measure_steps, no_html, strict, quietly))
    else:
        run_check(config, overrides or [], html, measure_steps, no_html, strict, quietly)


def run_check(
    config: Path, overrides: Sequence[str], html: Path | None, measure_steps: int | None, no_html: bool, strict: bool,
    quietly: bool,
) -> Facts:  # fmt: skip
    """Do what `check` does; return its findings for programs.

    Raises:
        DataError: `strict`, and there is a warning.
    """
    from anima_train.config.load import load_config

    loaded = load_config(config, overrides)

    from anima_train.cli.check_report import report_check
    from anima_train.config.launch import launch_settings
    from anima_train.distributed.environment import read_environment
    from anima_train.run.log import WarningsList, logged_to, terminal

    launch = read_environment(os.environ, launch_settings(loaded.config, num_processes=1))
    loaded = replace(loaded, notes=(*loaded.notes, *launch.notes))
    page = None if no_html else html or Path(loaded.config.output_dir) / f"check_{config.stem}.html"
    logged = WarningsList()
    with quiet(quietly), logged_to(terminal(is_main=True), logged):
        facts = report_check(loaded, f"Check of {config.name}", measure_steps, page)
    warnings = [*facts["warnings"], *logged.texts]
    if strict and warnings:
        raise DataError([f"{warning} (a warning, which --strict makes an error)" for warning in warnings])
    if quietly:
        for warning in facts["warnings"]:
            print(printable(f"warning: {warning}"))
    return {"config": config, **facts, "warnings": warnings}
