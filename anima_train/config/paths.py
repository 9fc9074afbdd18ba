"""The paths in a config: the search for them, and the messages about one that leads nowhere."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from anima_train.core.settings import nearest, quoted

CONTROL = "\t\n\r\b\f"  # what "\t", "\n", ... in double quotes turn into


@dataclass(frozen=True)
class Place:
    """A table in the user's files: its name in messages, and the folder its paths are looked for in."""

    file: str
    folder: Path
    prefix: str = ""  # key path of the table, with a final dot

    def inside(self, key: str) -> "Place":
        """Return the place of a table in this one."""
        return Place(self.file, self.folder, f"{self.prefix}{key}.")


def find_path(text: str, base: Path) -> Path:
    """Return a path as written if it exists from the current folder, else from `base`, the folder of its file."""
    path = Path(os.path.expanduser(text))  # unlike pathlib, takes an unknown ~name as it is
    return path if os.path.exists(path) or not os.path.exists(base / path) else base / path


def path_fault(text: str, base: Path, wanted: str) -> str | None:
    """Return why a path cannot be used, or None.

    Args:
        text: the path in the config.
        base: the folder of the file that names it.
        wanted: "file", "folder", or "file or folder".
    """
    if not text:
        return f'found "", expected a {wanted}'
    path = find_path(text, base)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        hint = "; write Windows paths in single quotes: 'C:\\new\\images'" if set(text) & set(CONTROL) else ""
        return f"{quoted(text)} does not exist{suggest(text, base)}{hint}"
    except (OSError, ValueError) as error:  # not allowed, a loop of links, too long a name, a zero character
        return f"{quoted(text)} cannot be used ({getattr(error, 'strerror', error)})"
    found = "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "special file"
    return None if found in wanted else f"{quoted(text)} is a {found}, expected a {wanted}"


def suggest(text: str, base: Path) -> str:
    """Return `; did you mean "data/cats"?`, or the part of the path that is missing; "" if that is all of it."""
    path = Path(os.path.expanduser(text))
    deepest = Path()
    for folder in (Path(), base):
        missing = next(part for part in (*reversed(path.parents), path) if not os.path.exists(folder / part))
        deepest = max(deepest, missing, key=lambda part: len(part.parts))
        try:
            names = set(os.listdir(folder / missing.parent)) - {missing.name}  # its own name: a link to nothing
        except OSError:  # no folder, or one that may not be listed
            continue
        if close := nearest(missing.name, sorted(names)):
            beside = missing.with_name(close)
            whole = beside / path.relative_to(missing)
            return f"; did you mean {quoted(str(whole if os.path.exists(folder / whole) else beside))}?"
    return "" if deepest == path else f" (there is no {quoted(str(deepest))})"


def expected_kind(text: str) -> str:
    """Return the kind of thing that a path to images should lead to: "file" for a .tar, else "folder"."""
    return "file" if text.lower().endswith(".tar") and not os.path.isdir(text) else "folder"
