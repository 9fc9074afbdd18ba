"""The statistics of a file as a page: a map of the blocks, made from `inspect.html`."""

from pathlib import Path

from anima_train.core.files import write_text
from anima_train.reports.html import TEMPLATES
from anima_train.tools.inspect import Inspection, cells


def write_inspect_page(path: Path, found: Inspection) -> None:
    """Write the page.

    Raises:
        SpaceError: the disk is full; an earlier page is intact.
    """
    most = max((group.rms for groups in found.by_block.values() for group in groups.values()), default=0.0) or 1.0
    rows = [
        (
            block or "others",
            [(f"{groups[key].norm:.4g}", groups[key].rms / most) if key in groups else ("-", 0.0)
             for key in found.by_component],
        )
        for block, groups in found.by_block.items()
    ]  # fmt: skip
    page = TEMPLATES.get_template("inspect.html").render(
        title=found.path,
        found=found,
        numbers=[cells("all", found.whole), *(cells(key, group) for key, group in found.by_component.items())],
        rows=rows,
    )
    write_text(path, page)
