"""The difference of two files as a page: a map of the blocks, made from `diff.html`."""

import math
from pathlib import Path

from anima_train.core.files import write_text
from anima_train.reports.html import TEMPLATES
from anima_train.tools.diff import Change, Difference, cells, share

FAINTEST = 1e-6  # relative change; what is below looks as no change


def write_diff_page(path: Path, found: Difference) -> None:
    """Write the page.

    Raises:
        SpaceError: the disk is full; an earlier page is intact.
    """
    most = max((change.relative for changes in found.by_block.values() for change in changes.values()), default=0.0)
    rows = [
        (block or "others", [(share(changes.get(key)), strength(changes.get(key), most)) for key in found.by_component])
        for block, changes in found.by_block.items()
    ]
    page = TEMPLATES.get_template("diff.html").render(
        title=f"{found.base} and {found.other}",
        found=found,
        numbers=[cells("all", found.whole), *(cells(key, change) for key, change in found.by_component.items())],
        rows=rows,
        largest=[cells(name, change) for name, change in found.largest],
    )
    write_text(path, page)


def strength(change: Change | None, most: float) -> float:
    """Return how strong the colour of a change is, from 0 to 1, on a logarithmic scale up to the largest one."""
    if change is None or change.relative <= FAINTEST:
        return 0.0
    return max(0.05, math.log(change.relative / FAINTEST) / math.log(most / FAINTEST))
