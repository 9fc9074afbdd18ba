"""`anima check`."""

from pathlib import Path
from typing import Annotated

import typer

from anima_train.caching.text_encoding import encodes_online
from anima_train.cli.train import ConfigPath, Overrides
from anima_train.config.load import load_config
from anima_train.config.model_files import find_model_files
from anima_train.core.device import DTYPES, choose_device, describe_device
from anima_train.core.errors import ConfigError
from anima_train.core.files import write_text
from anima_train.reports.check import dataset_report, summary
from anima_train.reports.dataset import MAX_THUMBNAILS
from anima_train.reports.dataset_page import render
from anima_train.training.build import make_plan
from anima_train.training.memory_check import extremes, measure
from anima_train.training.prepare import scan_all
from anima_train.training.summary import report


def check(
    config: ConfigPath,
    overrides: Overrides = None,
    html: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, help="The page to write. Absent: check_CONFIG.html in output_dir.", show_default=False
        ),
    ] = None,
    measure_steps: Annotated[
        int | None,
        typer.Option(
            "--measure",
            min=1,
            metavar="N",
            help="Run N training steps each on the smallest and the largest bucket: memory, time.",
            show_default=False,
        ),
    ] = None,
    no_html: Annotated[bool, typer.Option("--no-html", help="Write no page, and decode no image for it.")] = False,
) -> None:
    """Check a config, its model files and its images, and report what a run would do, as text and as a page."""
    if html is not None and no_html:
        raise ConfigError("--html and --no-html exclude each other; give one of them")
    loaded = load_config(config, overrides or [])
    files = find_model_files(loaded)
    files.check_headers()
    scans = scan_all(loaded, write=True)
    print(describe_device(choose_device(), DTYPES[loaded.config.model.dtype]))
    print(report(loaded, files, scans, num_processes=1))
    measured = []
    if measure_steps is not None:  # before any picture is decoded: the CPU's peak is that of the process
        buckets = extremes(make_plan(loaded, scans["train"].samples, num_processes=1))
        is_online = encodes_online(loaded.config.model.cache_text_embeddings, scans["train"].samples)
        measured = measure(loaded, files, buckets, measure_steps, is_online)
    found = dataset_report(f"Check of {config.name}", loaded, files, scans, 0 if no_html else MAX_THUMBNAILS, measured)
    print(summary(found))
    if not no_html:
        page = html or Path(loaded.config.output_dir) / f"check_{config.stem}.html"
        try:
            write_text(page, render(found))
        except OSError as error:  # a file where its folder should be, or a name that is none
            raise ConfigError(
                f"{page} cannot be written ({error.strerror}); choose another place with --html"
            ) from error
        print(f"page with pictures: {page}")
