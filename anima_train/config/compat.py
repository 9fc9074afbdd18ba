"""The keys of other trainers: accepted with a note, refused for now, or translated in an error message."""

import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anima_train.core.settings import quoted

TABLES = tomllib.loads(Path(__file__).with_name("other_trainers.toml").read_text(encoding="utf-8"))
# Name in another trainer, or in an earlier version -> what to write here.
FOREIGN: dict[str, str] = {
    **{name: text for text, names in TABLES["foreign"].items() for name in names},
    **{name: f"it is called {ours}" for ours, names in TABLES["renamed"].items() for name in names},
}
# Flag of another program, without its dashes -> what to write here.
FLAGS: dict[str, str] = {name: text for text, names in TABLES["flags"].items() for name in names}


@dataclass(frozen=True)
class Keys:
    """The keys of a file that its settings classes do not have. Names are dotted."""

    ignored: dict[str, str]  # without meaning here: why. Accepted with one note each
    off: dict[str, Any] = field(default_factory=dict)  # values that mean that the key is absent
    not_yet: dict[str, dict[str, str]] = field(default_factory=dict)  # values that are not supported yet: what to do
    instead: dict[str, dict[str, str]] = field(default_factory=dict)  # values that are not chosen: what to write

    def value_fault(self, name: str, value: str) -> str | None:
        """Return what to write for a value that another trainer has, in any spelling; None for others."""
        key = name.removesuffix(".type") if name.startswith("lr_scheduler") else name
        word = value.rpartition(".")[2].lower().replace("-", "_").replace(" ", "_")  # it may be a path to a class
        if other := self.not_yet.get(key, {}).get(word):
            return f"found {quoted(value)}, which is not supported yet; {other}"
        if other := self.instead.get(key, {}).get(word):
            return f"found {quoted(value)}, which is not one of ours: {other}"
        return None


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
        problem: gets the name of each key whose value is not ours, and a sentence.
        note: gets the name of each key without meaning, and why.
        prefix: dotted name of the table, with a final dot, or "".
    """
    kept: dict[str, Any] = {}
    for key, value in data.items():
        name = prefix + key
        if name in keys.ignored:
            note(name, keys.ignored[name])
        elif name not in keys.off or value != keys.off[name]:
            if isinstance(value, str) and (fault := keys.value_fault(name, value)):
                problem(name, fault)
            kept[key] = translate(value, keys, problem, note, f"{name}.") if isinstance(value, dict) else value
    return kept
