"""The base of every settings class, and the sentences shown when a setting is wrong."""

import difflib
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

MAX_PLACES = 4  # tables that an unknown key is said to belong in
MAX_SUGGESTIONS = 100  # unknown keys of a table for which it is looked for; it takes milliseconds each
MAX_WORD = 100  # letters of a key that may be a slip of the pen
Location = tuple[int | str, ...]

KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text", list: "a list", dict: "a table"}
# What was expected, by pydantic's name of the error and with its context; other errors keep pydantic's words.
EXPECTED = {
    "bool_type": "true or false",
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text in quotes",
    "list_type": "a list",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
    "string_too_short": "text of {min_length} or more characters",
    "string_pattern_mismatch": "text that matches {pattern}",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of {max_length} or fewer",
}


class Settings(BaseModel):
    """Strict, immutable settings: unknown keys, wrong types, infinities and NaN are errors.

    The docstring under each field is its meaning in the reference config and the JSON schema.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


def expand_name(value: Any) -> Any:
    """Return `{type = "cosine"}` for `"cosine"`: a validator of fields that choose among classes with a type."""
    return {"type": value} if isinstance(value, str) else value


def quoted(text: str) -> str:
    """Return text in quotes as TOML has it, with escapes for whatever could move a terminal's cursor."""
    shown = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in shown)


def toml_line(key: str, path: Path) -> str:
    """Return a key with a path as a line of TOML, to be pasted."""
    return f"{key} = {quoted(path.as_posix())}"


def key_path(location: Location) -> str:
    """Return a location as users write it: `("directory", 0, "path")` is `directory[0].path`."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            shown = part if len(part) <= MAX_WORD else f"{part[:MAX_WORD]}... ({len(part):,} letters)"
            text += ("." if text else "") + (part if re.fullmatch(r"[A-Za-z0-9_-]+", shown) else quoted(shown))
    return text


def describe_value(value: object) -> str:
    """Return a value as the user wrote it, shortened, with its type: `"1e-4" (text)`."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, bool):
        return str(value).lower()
    shown = quoted(value) if isinstance(value, str) else json.dumps(value, default=str)
    shown = {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}.get(shown, shown)
    return f"{shown if len(shown) <= 60 else shown[:57] + '...'} ({KINDS.get(type(value), type(value).__name__)})"


def nearest(word: str, names: Iterable[str]) -> str | None:
    """Return the name that `word` was most likely meant to be, in any case of letters; None if no name is close."""
    if len(word) > MAX_WORD:
        return None
    by_lower = {name.lower(): name for name in names}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.7)
    return by_lower[found[0]] if found else None


def nearest_key(word: str, names: Iterable[str]) -> str | None:
    """Return the key that `word` was most likely meant to be: one that is close, and has a word like each of it."""
    close = nearest(word, names)
    if close is None:
        return None
    parts = close.lower().split("_")
    return close if all(any(is_alike(one, part) for part in parts) for one in word.split("_") if one) else None


def is_alike(word: str, part: str) -> bool:
    """Return True if a word may be a slip of another, or the two written together with more."""
    return part.startswith(word) or word.endswith(part) or difflib.SequenceMatcher(None, word, part).ratio() >= 0.65


def validation_problems(
    error: ValidationError, data: object, root: type[Settings], hints: Mapping[str, str]
) -> dict[str, str]:
    """Return key path -> message for every mistake: the value that was found, and what was expected.

    Args:
        error: what pydantic found, all of it.
        data: the input, to show the offending values.
        root: the settings class the input was meant for, to suggest its keys.
        hints: unknown key -> what to write instead, for keys that `root` knows nothing of.
    """
    problems: dict[Location, str] = {}
    num_searched = 0
    expected: dict[Location, list[str]] = {}  # a value that no member of a union takes has one entry for each
    for detail in error.errors(include_url=False):
        spot = ErrorPlace.of(detail["loc"], root)
        location = spot.location
        if detail["type"] == "extra_forbidden":
            is_known = as_ours(location[-1]) in hints
            num_searched += not is_known
            is_looked_for = is_known or num_searched <= MAX_SUGGESTIONS
            problems[location] = "unknown key" + (suggestion(spot, root, hints) if is_looked_for else "")
        elif detail["type"] == "missing":
            problems[location] = "missing, and required"
        elif detail["type"] == "value_error":
            problems[location] = str(detail["ctx"]["error"])
        elif detail["type"].startswith("union_tag_"):
            if isinstance(value_at(data, location), dict):  # else the type is short for a table
                location = (*location, "type")
            problems[location] = unknown_type(value_at(data, location), [type_name(choice) for choice in spot.members])
        else:
            words = expected.setdefault(location, [])
            words.append(expectation(detail))
            value = value_at(data, location)
            found = describe_found(location, value)
            problems[location] = f"found {found}, expected {' or '.join(dict.fromkeys(words))}"
            if words == [EXPECTED["list_type"]]:
                problems[location] += list_example(spot.table, str(location[-1]), value)
            elif detail["type"] == "too_long":
                problems[location] += decimal_commas(value, detail["ctx"]["max_length"])
    # A value that could be a number or a list, and is a list, is wrong only where one of its items is.
    shallow = {location[:length] for location in problems for length in range(len(location))} & set(expected)
    return {key_path(location): text for location, text in problems.items() if location not in shallow}


def expectation(detail: ErrorDetails) -> str:
    """Return what pydantic expected, in TOML's words."""
    if detail["type"] not in EXPECTED:
        return detail["msg"].removeprefix("Input should be ")
    return EXPECTED[detail["type"]].format(**detail.get("ctx", {})).replace("'", '"')


def list_example(table: type[Settings], key: str, value: object) -> str:
    """Return the list that someone may have meant who gave the only item of it; "" where none is right."""
    if isinstance(value, int | float) and is_right(table, key, [value]):
        return f", such as [{value}]"
    if isinstance(value, str) and is_right(table, key, [value]):
        return f", such as [{quoted(value)}]"
    if isinstance(value, str) and is_right(table, key, [{"path": value}]):
        return f", such as [{{ path = {quoted(value)} }}]"
    return ""


def is_right(table: type[Settings], key: str, value: object) -> bool:
    """Return True if a key of a settings class takes a value, whatever the others have."""
    try:
        table.model_validate({key: value})
    except ValidationError as error:
        return all(each["loc"][:1] != (key,) for each in error.errors())
    return True


def decimal_commas(value: object, max_length: int) -> str:
    """Return the advice about a list of integers that were meant in pairs, as in `0,9`; "" for other lists."""
    if not isinstance(value, list) or len(value) != 2 * max_length or any(type(part) is not int for part in value):
        return ""
    numbers = [f"{value[place]}.{value[place + 1]}" for place in range(0, len(value), 2)]
    return f"; the decimal sign is a point: [{', '.join(numbers)}]"


def describe_found(location: Location, value: object) -> str:
    """Return a value for a message; of a secret only the type."""
    if str(location[-1]).endswith("api_key"):
        return KINDS.get(type(value), "something else")
    return describe_value(value)


def unknown_type(value: object, names: list[str]) -> str:
    """Return the message about a `type` that is none of `names`."""
    listed = f"expected one of {', '.join(map(quoted, names))}"
    if value is None:
        return f"missing; {listed}"
    close = nearest(value, names) if isinstance(value, str) else None
    return f"found {describe_value(value)}, {listed}" + (f"; did you mean {quoted(close)}?" if close else "")


def as_ours(key: object) -> str:
    """Return a key as the names of settings are written."""
    return str(key).lower().replace("-", "_")


def suggestion(spot: "ErrorPlace", root: type[Settings], hints: Mapping[str, str]) -> str:
    """Return the end of the message about an unknown key: what the user may have meant, or the keys of the type."""
    key = str(spot.location[-1])
    word = as_ours(key)
    if word in hints:
        return f"; {hints[word]}"
    if owners := [type_name(choice) for choice in spot.choices if key in choice.model_fields]:
        has = "has" if len(owners) == 1 else "have"
        return f" of type {quoted(type_name(spot.table))}; only {' and '.join(map(quoted, owners))} {has} it"
    places = places_of_keys(root)
    if key in places:
        return f"; it belongs {' or '.join(places[key][:MAX_PLACES])}"
    if close := nearest_key(word, {field: None for choice in spot.choices for field in choice.model_fields}):
        return f"; did you mean {close}?"
    if close := nearest_key(word, places):
        return f"; did you mean {close}, {places[close][0]}?"
    others = [field for field in spot.table.model_fields if field != "type"]
    return f"; {quoted(name)} has {', '.join(others)}" if (name := type_name(spot.table)) and others else ""


@functools.cache
def places_of_keys(root: type[Settings]) -> dict[str, list[str]]:
    """Return the tables below a settings class that have a key, by the key."""
    places: dict[str, list[str]] = {}
    for name, table in tables(root):
        for field in table.model_fields:
            if name not in places.setdefault(field, []):
                places[field].append(name)
    return places


@dataclass(frozen=True)
class ErrorPlace:
    """The place of a mistake in the user's data, and the types that meet there."""

    location: Location  # only keys and indices that the user wrote, or should have
    table: type[Settings]  # the table its last key stands in
    choices: list[type[Settings]]  # the tables that could stand in that one's place
    members: list[Any]  # the types that the value may have

    @classmethod
    def of(cls, location: Location, root: type[Settings]) -> "ErrorPlace":
        """Return the place that pydantic means: it adds the name of the member after each key of a union type."""
        real: list[int | str] = []
        table = root
        choices: list[type[Settings]] = []
        tried: list[Any] = []
        here = members_of(root)
        for part in location:
            if len(here) > 1:
                tried, here = here, [member for member in here if is_named_like(member, part)]
                continue
            real.append(part)
            member = here[0] if here else None
            if is_settings(member):
                table, choices = member, list(filter(is_settings, tried)) if member in tried else [member]
                field = member.model_fields.get(str(part))
                here = [] if field is None else members_of(field.annotation)
            else:
                here = members_of(get_args(member)[0]) if is_list(member) else []
        return cls(tuple(real), table, choices, here)


def members_of(annotation: Any) -> list[Any]:
    """Return the types a value may have: those in a union, else the one there is; without None and `Annotated`."""
    if get_origin(annotation) is Annotated:
        return members_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for part in get_args(annotation) if part is not NoneType for member in members_of(part)]
    return [annotation]


def item_types(annotation: Any) -> list[Any]:
    """Return the types that a value, or where it is a list an item of it, may have."""
    members = members_of(annotation)
    return [item for member in members for item in (members_of(get_args(member)[0]) if is_list(member) else [member])]


def is_list(annotation: Any) -> bool:
    """Return True if this type is a list of something."""
    return get_origin(annotation) is list


def is_settings(annotation: Any) -> TypeGuard[type[Settings]]:
    """Return True if this type is a settings class."""
    return isinstance(annotation, type) and issubclass(annotation, Settings)


def is_named_like(member: Any, name: int | str) -> bool:
    """Return True if pydantic calls this member of a union by this name."""
    if is_settings(member):
        return name in (member.__name__, type_name(member))
    return is_list(member) and str(name).startswith("list[")


def type_name(table: type[Settings]) -> str:
    """Return the value of `type` by which a settings class is chosen; "" if there is no choice."""
    field = table.model_fields.get("type")
    return "" if field is None or field.is_required() else str(field.default)


def tables(root: type[Settings], name: str = "", in_list: bool = False) -> Iterator[tuple[str, type[Settings]]]:
    """Yield (place in the file, class) for every table below a settings class, itself included."""
    place = f"in [[{name}]]" if in_list else f"in [{name}]"
    yield place if name else "at the top of the file, above the first [table]", root
    for key, field in root.model_fields.items():
        for inner in filter(is_settings, item_types(field.annotation)):
            yield from tables(inner, f"{name}.{key}" if name else key, any(map(is_list, members_of(field.annotation))))


def value_at(data: object, location: Location) -> object:
    """Return the value in nested tables and lists at this location, or None."""
    for part in location:
        try:
            data = data[part]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            return None
    return data
