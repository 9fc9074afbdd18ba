"""The reference configuration and the JSON schemas, written from the settings classes themselves."""

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import tomli_w
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from anima_train.config.config import Config
from anima_train.core.files import write_text
from anima_train.core.settings import Settings, settings_in
from anima_train.data.sources import DatasetSettings, Directory

WIDTH = 116
HEADER = """\
# Every key of anima-train, with its default and its meaning. Written by `anima reference`; do not edit.
# A line that is commented out shows the default or, after "required", the type. Tables whose name is followed by a type
# show one of several choices.
"""
DATASET_HEADER = """\
# Every key of a dataset file, with its default and its meaning. Written by `anima reference`; do not edit.
# The same keys can stand in the main file, in [dataset].
"""


def write_reference(folder: Path) -> list[Path]:
    """Write the reference files into a folder; returns their paths."""
    files = {
        "reference.toml": HEADER + "\n" + "\n".join(settings_lines(Config, "")),
        "reference_dataset.toml": DATASET_HEADER + "\n" + "\n".join(settings_lines(DatasetSettings, "")),
        "schema.json": schema(Config),
        "schema_dataset.json": schema(DatasetSettings),
    }
    for name, text in files.items():
        write_text(folder / name, text.rstrip() + "\n")
    return [folder / name for name in files]


def schema(root: type[Settings]) -> str:
    """A JSON schema for editors."""
    return json.dumps(root.model_json_schema(), indent=1)


def settings_lines(root: type[Settings], table: str) -> Iterator[str]:
    """The keys of a settings class, then its tables."""
    tables: list[tuple[str, FieldInfo]] = []
    for name, field in root.model_fields.items():
        if is_table(field):
            tables.append((name, field))
            continue
        yield from comment(field.description or "")
        yield f"# {name} = {default_text(field)}"
        yield ""
    for name, field in tables:
        path = f"{table}{name}"
        is_list = get_origin(bare(field.annotation)) is list
        for choice in settings_in(field.annotation):
            yield from comment(field.description or "")
            if has_type(choice):
                yield from comment(f'type = "{choice.model_fields["type"].default}": {choice.__doc__ or ""}')
            yield f"# [[{path}]]" if is_list else f"# [{path}]"
            yield ""
            yield from settings_lines(choice, f"{path}.")


def has_type(settings: type[Settings]) -> bool:
    """Whether a settings class is one of several choices."""
    return "type" in settings.model_fields and settings.model_fields["type"].default is not PydanticUndefined


def is_table(field: FieldInfo) -> bool:
    """Whether a key's value is a table, or a list of tables, with keys of its own."""
    annotation = bare(field.annotation)
    if str in get_args(annotation) or field.annotation in (str,):
        return False
    inner = list(settings_in(annotation))
    return bool(inner) and (inner != [DatasetSettings] or inner == [Directory])


def bare(annotation: Any) -> Any:
    """An annotation without `Annotated`."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def default_text(field: FieldInfo) -> str:
    """A default in TOML, or what is expected where there is none."""
    if field.is_required():
        return f"(required: {type_text(field.annotation)})"
    default = field.get_default(call_default_factory=True)
    if default is None:
        return f"(absent: {type_text(field.annotation)})"
    if isinstance(default, Settings):
        return json.dumps(default.model_dump()["type"])
    return tomli_w.dumps({"x": default}, multiline_strings=False).partition("=")[2].strip()


def type_text(annotation: Any) -> str:
    """A type in TOML's words."""
    names = {str: "text", int: "integer", float: "number", bool: "true or false"}
    annotation = bare(annotation)
    if annotation in names:
        return names[annotation]
    if get_origin(annotation) is list:
        return f"list of {type_text(get_args(annotation)[0])}"
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return "table"
    arguments = [argument for argument in get_args(annotation) if argument is not type(None)]
    if arguments and all(isinstance(argument, str | bool) for argument in arguments):
        return " or ".join(json.dumps(argument) for argument in arguments)
    return " or ".join(dict.fromkeys(type_text(argument) for argument in arguments))


def comment(text: str) -> Iterator[str]:
    """Text as TOML comments."""
    yield from (f"# {line}" for line in textwrap.wrap(" ".join(text.split()), WIDTH))
