"""The flags of other programs, and of settings, that no command of ours has."""

import re
from collections.abc import Sequence
from pathlib import Path

from anima_train.config.compat import FLAGS, FOREIGN

ELSEWHERE = {"json": "it is for anima check and anima report"}  # flags of some of our commands
PACKAGE = Path(__file__).parents[1]


def flag_fault(flag: str, own: Sequence[str]) -> str | None:
    """Return what to write instead of a flag that a command does not have; None if that is not known.

    Args:
        flag: as it was written, such as `--learning_rate`.
        own: the flags of the command.
    """
    name = flag.lstrip("-").replace("-", "_")
    in_our_spelling = "--" + name.replace("_", "-")
    for written in (in_our_spelling, in_our_spelling.lower()):
        if written in own:
            return f"{flag}: unknown flag; it is written {written}"
    text = ELSEWHERE.get(name) or FLAGS.get(name)
    meant = None if text is None else re.match(r"write (--\w+)", text)
    if text is not None and (meant is None or meant[1] in own):
        return f"{flag}: unknown flag; {text}"
    if (text := FOREIGN.get(name)) is not None:
        place = "settings stand in the TOML file, and " if text.startswith("it is called") else ""
        return f"{flag}: unknown flag; {place}{text.replace(': remove it', ': leave it out')}"
    path = setting_path(name)
    if path is not None and path.startswith("dataset."):  # --set cannot look into the file that `dataset` names
        return f"{flag}: unknown flag; settings stand in the TOML file, this one in the dataset's"
    if path is not None:
        return f"{flag}: unknown flag; settings stand in the TOML file; for one run write --set {path}=VALUE"
    return None


def is_declared(name: str) -> bool:
    """Return True if a class of the package has a field of this name, by its text: to import all takes seconds."""
    field = re.compile(rf"^    {re.escape(name)}: ", re.MULTILINE)
    return any(field.search(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py"))


def setting_path(name: str) -> str | None:
    """Return the dotted path of the first setting of this name, in no list and no table itself; None without one."""
    if name == "type" or not is_declared(name):  # that of many tables
        return None
    from anima_train.config.config import Config
    from anima_train.core.settings import is_settings, item_types, tables

    for place, table in tables(Config):
        if name not in table.model_fields or all(map(is_settings, item_types(table.model_fields[name].annotation))):
            continue
        if "[[" not in place and "eval_datasets" not in place:
            inside = place.partition("[")[2].rstrip("]") if place.startswith("in [") else ""
            return f"{inside}.{name}" if inside else name
    return None
