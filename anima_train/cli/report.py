"""`anima report`."""

from pathlib import Path
from typing import Annotated

from anima_train.cli.options import Argument, Option
from anima_train.core.errors import ConfigError


def report(
    run: Annotated[Path, Argument(metavar="RUN", help="The run's folder.")],
    html: Annotated[
        Path | None, Option(dir_okay=False, help="The page to write. Absent: report.html in the folder.")
    ] = None,
) -> None:
    """Show a run as a page: losses, evaluations, costs, previews, data; whether it has ended or not."""
    from anima_train.reports.run_page import write_run_report

    try:
        print(f"page: {write_run_report(run, html)}")
    except OSError as error:  # no permission, or a file where a folder should be
        raise ConfigError(
            f"{error.filename}: cannot be read or written ({error.strerror}); --html chooses another page"
        ) from error
