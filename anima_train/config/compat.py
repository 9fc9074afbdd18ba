"""The keys of other trainers: accepted with a note, refused for now, or translated in an error message."""

import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anima_train.core.settings import quoted

TABLES = tomllib.loads(Path(__file__).with_name("other_trainers.toml").read_text(encoding="utf-8"))
# Name in another trainer, or in an earlier version -> what to write here.
FOREIGN: dict[str, str] = TABLES["foreign"] | {
    name: f"it is called {ours}" for ours, names in TABLES["renamed"].items() for name in names
}


@dataclass(frozen=True)
class Keys:
    """The keys of a file that its settings classes do not have. Names are dotted."""

    ignored: dict[str, str]  # without meaning here: why. Accepted with one note each
    off: dict[str, Any] = field(default_factory=dict)  # not supported yet: the value that means "off", accepted
    not_yet: dict[str, list[str]] = field(default_factory=dict)  # values of our own keys that are not supported yet
    instead: dict[str, dict[str, str]] = field(default_factory=dict)  # values that are not chosen: what to write


MAIN, DATASET = Keys(**TABLES["main"]), Keys(**TABLES["dataset"])


def translate(
    data: dict[str, Any],
    keys: Keys,
    problem: Callable[[str, str], None],
    note: Callable[[str, str], None],
    prefix: str = "",
) -> dict[str, Any]:
    """Return a copy of a table without the keys that other trainers have and this one does not.

    Args:
        data: one table; nested tables are looked into.
        keys: what its file may hold besides settings.
        problem: gets the name of each key that is not supported yet, and a sentence.
        note: gets the name of each key without meaning, and why.
        prefix: dotted name of the table, with a final dot, or "".
    """
    kept: dict[str, Any] = {}
    for key, value in data.items():
        name = prefix + key
        if name in keys.ignored:
            note(name, keys.ignored[name])
        elif name in keys.off:
            off = keys.off[name]
            if value != off or isinstance(value, bool) != isinstance(off, bool):
                problem(name, "not supported yet; remove it")
        else:
            if isinstance(value, str) and value.lower() in keys.not_yet.get(name, []):
                problem(name, f"found {quoted(value)}, which is not supported yet")
            if isinstance(value, str) and (other := keys.instead.get(name, {}).get(value.lower().replace("-", "_"))):
                problem(name, f"found {quoted(value)}, which is not one of ours: {other}")
            kept[key] = translate(value, keys, problem, note, f"{name}.") if isinstance(value, dict) else value
    return kept
