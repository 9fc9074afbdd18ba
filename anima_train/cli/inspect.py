"""`anima inspect`."""

from pathlib import Path
from typing import Annotated

from anima_train.cli.options import Argument, Json, Option
from anima_train.cli.output import Facts, print_json
from anima_train.core.errors import ConfigError
from anima_train.core.format import printable


def inspect(
    path: Annotated[Path, Argument(metavar="FILE", help="A LoRA or adapter of any kind, or a transformer.")],
    html: Annotated[Path | None, Option(dir_okay=False, help="A page to write, with a picture of the blocks.")] = None,
    as_json: Json = False,
) -> None:
    """Show what is in a file: metadata, norms, effective ranks and dead weights, by component, block and weight.

    norm: |D| of a change at strength 1, or of the weights of a checkpoint. spectral: the largest singular value. rank:
    effective, |D|^4 / |D'D|^2, the mean over the weights of an adapter. dead: all zero.
    """
    if as_json:
        print_json(lambda: look(path, html)[0])
        return
    for line in look(path, html)[1]:
        print(printable(line))
    if html is not None:
        print(printable(f"page: {html}"))


def look(path: Path, html: Path | None) -> tuple[Facts, list[str]]:
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
    if html is not None:
        try:
            write_inspect_page(html, found)
        except OSError as error:
            raise ConfigError(f"{html}: cannot be written ({error.strerror}); choose another place") from error
    return vars(found), list(inspection.table(found))
