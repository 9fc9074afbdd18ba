"""`anima inspect`."""

from pathlib import Path
from typing import Annotated

from anima_train.cli.options import Argument, Json, Option
from anima_train.cli.output import Findings, show
from anima_train.core.files import written_to


def inspect(
    path: Annotated[Path, Argument(metavar="FILE", help="A LoRA or adapter of any kind, or a transformer.")],
    html: Annotated[Path | None, Option(dir_okay=False, help="A page to write, with a picture of the blocks.")] = None,
    as_json: Json = False,
) -> None:
    """Show what is in a file: metadata, norms, effective ranks and dead weights, by component, block and weight.

    norm: |D| of a change at strength 1, or of the weights of a checkpoint. spectral: the largest singular value. rank:
    effective, |D|^4 / |D'D|^2, the mean over the weights of an adapter. dead: all zero.
    """
    show(lambda: look(path, html), as_json)


def look(path: Path, html: Path | None) -> Findings:
    """Return the statistics for programs, and as lines; write their page.

    Raises:
        ConfigError: the page cannot be written.
        UserError: as `inspect`.
    """
    from tqdm import tqdm

    from anima_train.reports.inspect_page import write_inspect_page
    from anima_train.tools import inspect as inspection

    with tqdm(desc="weights", unit="", leave=False) as bar:
        found = inspection.inspect(path, tell=lambda name: bar.update())
    if html is None:
        return vars(found), inspection.table(found)
    with written_to(html):
        write_inspect_page(html, found)
    return vars(found), [*inspection.table(found), f"page: {html}"]
