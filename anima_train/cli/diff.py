"""`anima diff`."""

from pathlib import Path
from typing import Annotated

from anima_train.cli.options import Argument, Json, Option
from anima_train.cli.output import Findings, show
from anima_train.core.files import written_to


def diff(
    base: Annotated[Path, Argument(metavar="A", help="A checkpoint: a transformer's .safetensors file.")],
    other: Annotated[Path, Argument(metavar="B", help="Another one, or a LoRA or another adapter.")],
    html: Annotated[Path | None, Option(dir_okay=False, help="A page to write, with a picture of the blocks.")] = None,
    directions: Annotated[
        int, Option(min=0, help="Leading directions of each matrix in which changes count as interference; 0: none.")
    ] = 16,
    as_json: Json = False,
) -> None:
    """Show what changed between two checkpoints, or what an adapter adds: how much, where, and along which directions.

    relative: the size of the change over that of the weights. moved: share of the values that are others in the
    checkpoint's own precision. rank: effective, |D|^4 / |D'D|^2, mean over the matrices. in top k: share of the change
    in the k leading singular directions of its matrix, on either side, where what the base knows best lies.
    """
    show(lambda: compare(base, other, html, directions), as_json)


def compare(base: Path, other: Path, html: Path | None, directions: int) -> Findings:
    """Return the difference for programs, and as lines; write its page.

    Raises:
        ConfigError: the page cannot be written.
        UserError: as `difference`.
    """
    from tqdm import tqdm

    from anima_train.reports.diff_page import write_diff_page
    from anima_train.tools.diff import difference, table

    with tqdm(desc="tensors", unit="", leave=False) as bar:
        found = difference(base, other, directions, tell=lambda name: bar.update())
    if html is None:
        return vars(found), table(found)
    with written_to(html):
        write_diff_page(html, found)
    return vars(found), [*table(found), f"page: {html}"]
