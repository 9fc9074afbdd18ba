"""The reference configuration and the JSON schemas, written from the settings classes themselves."""

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import annotated_types
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from anima_train.config.changes import at_resume
from anima_train.config.config import Config
from anima_train.core.files import write_text
from anima_train.core.settings import Settings, is_list, is_settings, item_types, members_of, type_name
from anima_train.data.settings import DatasetSettings

WIDTH = 118
HOW_TO_READ = """\
# `#key = value` is a key with its default: to change it, remove the # and write another value.
# `# key = (kind of value)` is a key without a default. Only those that are required have to be there.
# "Fixed at --resume": may not change when a run is resumed, as docs/resume.md explains. All other keys may.
"""
HEADER = f"""\
# Every key of anima-train, with its meaning. Written by `anima reference`; do not edit.
{HOW_TO_READ}# A table that is shown several times, each with another `type`, is a choice: use one of them.
"""
DATASET_HEADER = f"""\
# Every key of a dataset file, with its meaning. Written by `anima reference`; do not edit.
# The same keys can stand in the main file, in [dataset].
{HOW_TO_READ}# That is for the training set: of an evaluation set all keys may change.
"""
KINDS: dict[Any, str] = {str: "text", int: "integer", float: "number", bool: "true or false"}


def write_reference(folder: Path) -> list[Path]:
    """Write the reference files into a folder; return their paths."""
    files = {
        "reference.toml": "\n".join([HEADER, *settings_lines(Config)]),
        "reference_dataset.toml": "\n".join([DATASET_HEADER, *settings_lines(DatasetSettings, place="dataset.")]),
        "schema.json": json.dumps(Config.model_json_schema(), indent=1),
        "schema_dataset.json": json.dumps(DatasetSettings.model_json_schema(), indent=1),
    }
    for name, text in files.items():
        write_text(folder / name, text.rstrip() + "\n")
    return [folder / name for name in files]


def settings_lines(
    root: type[Settings], path: str = "", above: type[Settings] = Settings, place: str = ""
) -> Iterator[str]:
    """Yield the keys of a settings class, then its tables.

    Args:
        root: the class.
        path: of its table in the file, with a final dot.
        above: the class of the table around it; keys that it has too are only named.
        place: of the table in a whole configuration, as `path`.
    """
    fields = sorted(root.model_fields.items(), key=lambda item: item[0] != "type")
    shared = [name for name, field in fields if is_same(field, above.model_fields.get(name))]
    for name, field in fields:
        if name not in shared and (not choices_of(field) or accepts_name(field)):
            yield from comment(meaning(field, f"{place}{name}"))
            yield key_line(name, field)
            yield ""
    if shared:
        yield from comment(
            f"These keys, explained above, can stand here too, for this table alone: {', '.join(shared)}."
        )
        yield ""
    for name, field in fields:
        choices = [] if name in shared else choices_of(field)
        for number, choice in enumerate(choices):
            decided_by = f"{place}{name}.type" if len(choices) > 1 else f"{place}{name}"
            yield from comment(meaning(field, decided_by)) if number == 0 else ()
            yield from comment((choice.__doc__ or "").partition("\n\n")[0]) if len(choices) > 1 else ()
            yield f"#[[{path}{name}]]" if any(map(is_list, members_of(field.annotation))) else f"#[{path}{name}]"
            yield from () if type_name(choice) else ("",)  # a choice starts with its type
            yield from settings_lines(choice, f"{path}{name}.", root, f"{place}{name}.")


def meaning(field: FieldInfo, name: str) -> str:
    """Return what a key means, and what may not be done with it when a run is resumed; `name` as in `key_names`."""
    return f"{field.description} {at_resume(name)}".strip() if field.description else ""


def is_same(field: FieldInfo, other: FieldInfo | None) -> bool:
    """Return True if two keys mean the same."""
    return other is not None and field.description == other.description


def choices_of(field: FieldInfo) -> list[type[Settings]]:
    """Return the settings classes of a key that is a table or a list of tables; none if a path can stand instead."""
    members = item_types(field.annotation)
    return [] if str in members else list(filter(is_settings, members))


def accepts_name(field: FieldInfo) -> bool:
    """Return True if the name of a choice can stand for its table."""
    return any(isinstance(part, BeforeValidator) for part in field.metadata)


def key_line(name: str, field: FieldInfo) -> str:
    """Return a key with its default and the kind of its value."""
    kind = ", ".join([kind_text(field.annotation), *limits(field)])
    if field.is_required():
        return f"# {name} = (required: {kind})"
    default = field.get_default(call_default_factory=True)
    if default is None:
        return f"# {name} = ({kind})"
    value = json.dumps(type_name(type(default)) if isinstance(default, Settings) else default)
    return f"#{name} = {value}" + ("" if kind in (value, KINDS[bool]) else f"  # {kind}")


def kind_text(annotation: Any) -> str:
    """Return a type in TOML's words."""
    kinds = []
    for member in members_of(annotation):
        if is_list(member):
            kinds.append(f"[{kind_text(get_args(member)[0])}, ...]")
        elif get_origin(member) is Literal:
            kinds.extend(map(json.dumps, get_args(member)))
        elif is_settings(member):
            kinds.append(json.dumps(type_name(member)) if type_name(member) else "table")
        elif get_origin(member) is dict:
            names, value = get_args(member)
            kinds.append(f"table of {kind_text(value)} by {kind_text(names)}")
        else:
            kinds.append(KINDS[member])
    return " or ".join(filter(None, [", ".join(kinds[:-1]), kinds[-1]]))


def limits(field: FieldInfo) -> Iterator[str]:
    """Yield the smallest and largest value of a number."""
    for part in field.metadata:
        match part:
            case annotated_types.Ge():
                yield f"at least {part.ge}"
            case annotated_types.Gt():
                yield f"more than {part.gt}"
            case annotated_types.Le():
                yield f"at most {part.le}"
            case annotated_types.Lt():
                yield f"less than {part.lt}"


def comment(text: str) -> Iterator[str]:
    """Yield text as TOML comments."""
    yield from (f"# {line}" for line in textwrap.wrap(" ".join(text.split()), WIDTH))
