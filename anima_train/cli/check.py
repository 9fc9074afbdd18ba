"""`anima check`."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anima_train.cli.options import ConfigPath, Overrides
from anima_train.core.errors import ConfigError
from anima_train.core.format import printable

if TYPE_CHECKING:
    from anima_train.config.load import LoadedConfig
    from anima_train.reports.dataset import DatasetReport


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
    from anima_train.config.load import load_config

    loaded = load_config(config, overrides or [])
    page = None if no_html else html or Path(loaded.config.output_dir) / f"check_{config.stem}.html"
    report_check(loaded, f"Check of {config.name}", measure_steps, page)


def report_check(loaded: "LoadedConfig", title: str, measure_steps: int | None, page: Path | None) -> None:
    """Print what a run would do, measure its steps if their number is given, and write the page if there is to be one.

    Raises:
        ConfigError: the page cannot be written.
        UserError: what is wrong with the model files or the images.
    """
    from anima_train.caching.text_encoding import encodes_online
    from anima_train.config.model_files import build_model_spec
    from anima_train.core.device import choose_device, describe_device
    from anima_train.reports.check import dataset_report, summary
    from anima_train.reports.dataset import MAX_THUMBNAILS
    from anima_train.training.build import plan_run
    from anima_train.training.dry_run import describe_run
    from anima_train.training.memory_check import extremes, measure
    from anima_train.training.prepare import scan_all

    device = choose_device()
    spec = build_model_spec(loaded, device)
    scans = scan_all((loaded.train, *loaded.evals), loaded.config.seed, write=True)
    show([describe_device(device, spec.dtype), *describe_run(loaded, spec, scans, num_processes=1)])
    measured = []
    if measure_steps is not None:  # before any picture is decoded: the CPU's peak is that of the process
        plan, _ = plan_run(loaded.config, scans["train"].samples, num_processes=1)
        is_online = encodes_online(loaded.config.model.cache_text_embeddings, scans["train"].samples)
        measured = measure(loaded.config, spec, extremes(plan), measure_steps, is_online)
    found = dataset_report(title, loaded, spec, scans, 0 if page is None else MAX_THUMBNAILS, measured)
    show(summary(found))
    if page is not None:
        write_page(page, found)


def write_page(page: Path, found: "DatasetReport") -> None:
    """Write the page of a check, and print where it is.

    Raises:
        ConfigError: it cannot be written.
    """
    from anima_train.core.files import write_text
    from anima_train.reports.dataset_page import render

    try:
        write_text(page, render(found))
    except OSError as error:  # a file where its folder should be, or a name that is none
        raise ConfigError(f"{page} cannot be written ({error.strerror}); choose another place with --html") from error
    print(f"page with pictures: {page}")


def show(lines: Iterable[str]) -> None:
    """Print lines, made fit for a terminal."""
    print("\n".join(map(printable, lines)))
