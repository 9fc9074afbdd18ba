"""Files that a process that was killed left in the folder of its run; the next start of the run removes them."""

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from anima_train.checkpoint.training_state import remove_unfinished
from anima_train.run.folder import RunFolder

TEMPORARY = r"\.(?:{})\.\w+\.tmp"  # see `core.files.temporary_beside`, which cuts long names
LENGTH = 40


def remove_leftovers(folder: RunFolder) -> list[str]:
    """Remove what an earlier start has left: unfinished files and states, and states that it has set aside.

    Those (`unused-step-...`) are removed whether or not the run has come as far again. The names of what is removed are
    returned, without those of unfinished states.

    Only a process that holds the lock of the folder may do so. Files that others write there, such as pages, stay.
    """
    removed = []
    remove_unfinished(folder.checkpoints)
    for path in (*unfinished_files(folder), *folder.checkpoints.glob("unused-step-*")):
        with contextlib.suppress(OSError):  # what cannot be removed does no harm
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            removed.append(path.name)
    return removed


def unfinished_files(folder: RunFolder) -> Iterator[Path]:
    """Yield the temporary files of weights, previews and records."""
    weights = re.escape(folder.name[:LENGTH])
    for place, names in (
        (folder.weights_path(None).parent, rf"{weights}.*"),
        *((place, r"s\d+_\d+\.png") for place in (folder.path / "samples", *folder.strengths_folder.glob("*"))),
        (folder.path, "|".join(re.escape(path.name) for path in folder.written)),
    ):
        pattern = re.compile(TEMPORARY.format(names))
        yield from (path for path in sorted(place.glob(".*.tmp")) if pattern.fullmatch(path.name))
