"""`anima report`."""

from pathlib import Path
from typing import Annotated

from anima_train.cli.options import Argument, Json, Option
from anima_train.cli.output import Findings, show
from anima_train.core.errors import ConfigError


def report(
    run: Annotated[Path, Argument(metavar="RUN", help="The run's folder.")],
    html: Annotated[
        Path | None, Option(dir_okay=False, help="The page to write. Absent: report.html in the folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a run as a page: losses, evaluations, costs, previews, data; whether it has ended or not."""
    show(lambda: write_report(run, html), as_json)


def write_report(run: Path, html: Path | None) -> Findings:
    """Write the page of a run; return what is in it for programs.

    Raises:
        ConfigError: there is no run, or the page cannot be written.
    """
    from anima_train.reports.run import collect_run, run_facts
    from anima_train.reports.run_page import write_run_report

    try:
        found = collect_run(run)
        page = write_run_report(run, html, found)
        return {"page": page, **run_facts(found)}, [f"page: {page}"]
    except OSError as error:  # no permission, or a file where a folder should be
        raise ConfigError(
            f"{error.filename}: cannot be read or written ({error.strerror}); --html chooses another page"
        ) from error
