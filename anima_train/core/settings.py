"""The base of every settings class, and the sentences shown when a setting is wrong."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

Location = tuple[int | str, ...]


class Settings(BaseModel):
    """Strict, immutable settings: unknown keys, wrong types, infinities and NaN are errors.

    The docstring under each field is its meaning in the reference config, the JSON schema and the error messages.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


def key_path(location: Location) -> str:
    """`("directory", 0, "path")` as `directory[0].path`."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def value_text(value: object) -> str:
    """A value as the user wrote it, shortened, with its type: `"1e-4" (a string)`."""
    kinds = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "a list", dict: "a table"}
    if isinstance(value, dict):
        return "a table"
    shown = json.dumps(value, ensure_ascii=True, default=str)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return f"{shown} ({kinds.get(type(value), type(value).__name__)})"


def validation_problems(
    error: ValidationError, data: object, root: type[Settings], foreign: Mapping[str, str]
) -> list[str]:
    """One sentence per mistake: key path, what was found, what was expected, and a suggestion for unknown keys.

    Args:
        error: what pydantic found, all of it.
        data: the input, to show the offending values.
        root: the settings class the input was meant for, to suggest its keys.
        foreign: names other trainers use -> what to write here.
    """
    known = dict(known_keys(root))
    problems: dict[Location, str] = {}
    expected: dict[Location, list[str]] = {}
    for detail in error.errors(include_url=False):
        location = real_location(detail["loc"], data)
        where = key_path(location) or "the file"
        if detail["type"] == "extra_forbidden":
            problems[location] = f"{where}: unknown key{suggestion(location, known, foreign)}"
        elif detail["type"] == "missing":
            problems[location] = f"{where}: missing, and required"
        elif detail["type"] == "value_error":
            problems[location] = (f"{where}: " if location else "") + str(detail["ctx"]["error"])
        elif detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
            tag = detail["ctx"].get("tag", "")
            names = detail["ctx"].get("expected_tags", "")
            found = f'found "{tag}"' if tag else "missing"
            problems[location] = f"{where}.type: {found}, expected one of {names or 'the documented types'}"
        else:
            wanted = detail["msg"].removeprefix("Input should be ").removeprefix("a valid ")
            expected.setdefault(location, []).append(wanted)
            found = value_text(value_at(data, location))
            problems[location] = f"{where}: found {found}, expected {' or '.join(dict.fromkeys(expected[location]))}"
    return list(problems.values())


def real_location(location: Location, data: object) -> Location:
    """Pydantic's location without the union members and tags it inserts: only the parts that lead into `data`."""
    real: list[int | str] = []
    here = data
    for position, part in enumerate(location):
        if isinstance(here, Mapping) and isinstance(part, str) and (part in here or position == len(location) - 1):
            real.append(part)
            here = here.get(part)
        elif isinstance(here, Sequence) and isinstance(part, int) and not isinstance(here, str):
            real.append(part)
            here = here[part] if part < len(here) else None
    return tuple(real)


def value_at(data: object, location: Location) -> object:
    """The value in nested tables and lists at this location, or None."""
    for part in location:
        try:
            data = data[part]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def known_keys(root: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path without list indices, key) for every key below a settings class, unions included."""
    for name, field in root.model_fields.items():
        yield prefix + name, name
        for inner in settings_in(field.annotation):
            yield from known_keys(inner, f"{prefix}{name}.")


def settings_in(annotation: Any) -> Iterator[type[Settings]]:
    """The settings classes inside an annotation such as `list[A] | B | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    elif get_origin(annotation) is not None or get_origin(annotation) is Union:
        for argument in get_args(annotation):
            yield from settings_in(argument)


def suggestion(location: Location, known: Mapping[str, str], foreign: Mapping[str, str]) -> str:
    """What the user may have meant by an unknown key."""
    key = str(location[-1])
    table = ".".join(str(part) for part in location[:-1] if isinstance(part, str))
    if key in foreign:
        return f"; {foreign[key]}"
    here = [name for path, name in known.items() if path.rpartition(".")[0] == table]
    if close := difflib.get_close_matches(key, here, n=1, cutoff=0.7):
        return f"; did you mean {close[0]}?"
    elsewhere = [path for path, name in known.items() if name == key]
    if elsewhere:
        return f"; it belongs at {elsewhere[0]}"
    if close := difflib.get_close_matches(key, list(known.values()), n=1, cutoff=0.8):
        path = next(path for path, name in known.items() if name == close[0])
        return f"; did you mean {path}?"
    return ""
