"""`anima check`."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from anima_train.cli.options import ConfigPath, Option, Overrides
from anima_train.core.errors import ConfigError


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
) -> None:
    """Check a config, its model files and its images, and report what a run would do, as text and as a page."""
    if html is not None and no_html:
        raise ConfigError("--html and --no-html exclude each other; give one of them")
    from anima_train.config.load import load_config

    loaded = load_config(config, overrides or [])

    from anima_train.cli.check_report import report_check
    from anima_train.config.launch import launch_settings
    from anima_train.distributed.environment import read_environment

    launch = read_environment(os.environ, launch_settings(loaded.config, num_processes=1))
    loaded = replace(loaded, notes=(*loaded.notes, *launch.notes))
    page = None if no_html else html or Path(loaded.config.output_dir) / f"check_{config.stem}.html"
    report_check(loaded, f"Check of {config.name}", measure_steps, page)
