"""Paths of this machine, left out of pages that may be shown to others."""

import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import PureWindowsPath
from typing import Any

import tomli_w

from anima_train.core.format import Listing

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Folders, from the root to the last separator before a name; not in addresses, as hf://owner/name.
FOLDERS = re.compile(r"(?<![\w.:/\\])(~[\w.-]*|[A-Za-z]:)?([/\\][^/\\\s\"'<>|]+)+[/\\](?=[^/\\\s])")


def shared_config(text: str) -> tuple[str, list[str]]:
    """Return a config with names instead of paths, and the paths; of text that is no TOML only folders are left out."""
    try:
        table = tomllib.loads(text)
    except ValueError:
        return shared_text(text, ()), []
    return tomli_w.dumps(without_places(table)), list(places_of(table))


def without_places(value: Any, key: str = "") -> Any:
    """Return a value of a config, or all values in a table or list of one, each path as its last part."""
    if isinstance(value, dict):
        return {name: without_places(each, name) for name, each in value.items()}
    if isinstance(value, list):
        return [without_places(each, key) for each in value]
    if key == "judge" and isinstance(value, str):
        name, colon, text = value.partition(":")
        return f"{name}{colon}{last_part(text) if is_absolute(text) else text}"
    return last_part(value) if isinstance(value, str) and is_place(key, value) else value


def is_place(key: str, value: str) -> bool:
    """Return True if the value of this key is a path on this machine."""
    if key == "hf_dataset":
        return HUB_NAME.fullmatch(value) is None
    is_path = key in ("path", "dataset", "config", "init_from_existing") or key.endswith(("_path", "_dir"))
    return is_path and not value.startswith("hf://")


def last_part(path: str) -> str:
    """Return a path's last part, whichever system it is written for."""
    return PureWindowsPath(path).name


def places_of(value: Any, key: str = "") -> Iterator[str]:
    """Yield every path in a table or list of a config."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from places_of(each, name)
    elif isinstance(value, list):
        for each in value:
            yield from places_of(each, key)
    elif isinstance(value, str) and is_place(key, value):
        yield value
    elif isinstance(value, str) and key == "judge":
        yield from filter(is_absolute, [value.partition(":")[2]])


def shared_text(text: str, places: Iterable[str]) -> str:
    """Return a message without the folders of these places, which may hold spaces, and any that begin at the root.

    A `Listing` stays one, its entries too without them.
    """
    if isinstance(text, Listing):
        places = list(places)
        entries = [shared_text(entry, places) for entry in text.entries]
        return Listing(shared_text(str(text), places), entries, text.num_shown)
    longest_first = sorted({place.rstrip("/\\") for place in places if is_in_folder(place)}, key=len, reverse=True)
    for place in longest_first:
        text = text.replace(place, last_part(place))
    for place in filter(is_absolute, longest_first):  # what lies beside it is private too
        text = text.replace(place.removesuffix(last_part(place)), "")
    return FOLDERS.sub("", text)


def is_absolute(path: str) -> bool:
    """Return True if a path begins at a root, whichever system it is written for."""
    return path.startswith(("/", "~")) or PureWindowsPath(path).is_absolute()


def is_in_folder(path: str) -> bool:
    """Return True if a path names a folder above it, other than the root."""
    return bool(last_part(path.rstrip("/\\").removesuffix(last_part(path))))
