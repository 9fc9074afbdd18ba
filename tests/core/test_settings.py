"""Strict settings, and the sentences about wrong ones."""

import datetime
import tomllib
from typing import Annotated, Any, Literal

import pytest
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from anima_train.core.settings import (
    ErrorPlace,
    Settings,
    describe_value,
    key_path,
    nearest,
    quoted,
    tables,
    validation_problems,
)


class Red(Settings):
    """A choice."""

    type: Literal["red"] = "red"
    depth: int = 1
    """How deep."""


class Blue(Settings):
    """Another."""

    type: Literal["blue"] = "blue"
    width: float | list[float] = 1.0
    """How wide."""


class Leaf(Settings):
    """An entry of a list."""

    name: str
    """Its name."""
    sizes: list[int | list[int]] = Field(default=[])
    """Its sizes."""


class Folder(Settings):
    """An entry with a path."""

    path: str | None = None
    """Where it is."""


Colour = Annotated[Red | Blue, Field(discriminator="type")]


class Tree(Settings):
    """Everything that pydantic inserts names for."""

    colour: Colour = Red()
    """A table by its type."""
    short: Annotated[Colour, BeforeValidator(lambda v: {"type": v} if isinstance(v, str) else v)] = Red()
    """A table, or the name of its type."""
    leaf: str | Leaf = "none"
    """A path or a table."""
    leaves: list[Leaf] = Field(default=[])
    """A list of tables."""
    mixed: list[str | Leaf] | None = None
    """A list of paths or tables."""
    number: Annotated[int | list[list[int]], AfterValidator(lambda value: value)] | None = None
    """A number or a list."""
    names: list[str] = Field(default=[], min_length=0)
    """A list of texts."""
    pair: list[float] = Field(default=[0.5, 0.5], min_length=2, max_length=2)
    """Two numbers."""
    folders: list[Folder] = Field(default=[])
    """A list of tables with a path."""
    wide: float = Field(default=0.5, ge=0, lt=1)
    """A share."""


def problems(**data: Any):
    with pytest.raises(ValidationError) as caught:
        Tree.model_validate(data)
    return validation_problems(caught.value, data, Tree, {"foreign": "it is called wide"})


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"wide": 1.0}, {"wide": "found 1.0 (a number), expected less than 1"}),
        ({"wide": -1}, {"wide": "found -1 (an integer), expected at least 0"}),
        ({"leaf": {"name": 3}}, {"leaf.name": "found 3 (an integer), expected text in quotes"}),
        ({"leaf": {"naem": "a"}},
         {"leaf.name": "missing, and required", "leaf.naem": "unknown key; did you mean name?"}),
        ({"leaf": 3}, {"leaf": "found 3 (an integer), expected text in quotes or a table"}),
        ({"leaves": [{"name": "a"}, {"name": "b", "sizes": [1, "2", [3, "4"]]}]},
         {"leaves[1].sizes[1]": 'found "2" (text), expected an integer or a list',
          "leaves[1].sizes[2][1]": 'found "4" (text), expected an integer'}),
        ({"mixed": ["a", {"name": 3}, 4]},
         {"mixed[1].name": "found 3 (an integer), expected text in quotes",
          "mixed[2]": "found 4 (an integer), expected text in quotes or a table"}),
        ({"number": {"int": 3}}, {"number": "found a table, expected an integer or a list"}),
        ({"number": [[1, None]]}, {"number[0][1]": "found null (NoneType), expected an integer"}),
        ({"colour": {"type": "blue", "width": ["1"]}}, {"colour.width[0]": 'found "1" (text), expected a number'}),
        ({"colour": {"type": "blue", "blue": 1}}, {"colour.blue": 'unknown key; "blue" has width'}),
        ({"colour": {"type": "blue", "depth": 1}}, {"colour.depth": 'unknown key of type "blue"; only "red" has it'}),
        ({"colour": {"type": "bleu"}},
         {"colour.type": 'found "bleu" (text), expected one of "red", "blue"; did you mean "blue"?'}),
        ({"colour": {}}, {"colour.type": 'missing; expected one of "red", "blue"'}),
        ({"colour": "red"}, {"colour": 'found "red" (text), expected a table'}),
        ({"short": "rde"}, {"short": 'found "rde" (text), expected one of "red", "blue"'}),
        ({"short": {"type": "red", "depth": True}}, {"short.depth": "found true, expected an integer"}),
        ({"foreign": 1, "FOREIGN": 2},
         {"foreign": "unknown key; it is called wide", "FOREIGN": "unknown key; it is called wide"}),
        ({"names": "a", "leaves": [{"name": "b", "sizes": 4}]},
         {"names": 'found "a" (text), expected a list, such as ["a"]',
          "leaves[0].sizes": "found 4 (an integer), expected a list, such as [4]"}),
        ({"names": {"a": 1}, "pair": 0.5, "folders": "data/cats"},
         {"names": "found a table, expected a list",
          "pair": "found 0.5 (a number), expected a list",
          "folders": 'found "data/cats" (text), expected a list, such as [{ path = "data/cats" }]'}),
        ({"pair": [0, 9, 0, 99]},
         {"pair": "found [0, 9, 0, 99] (a list), expected a list of 2 or fewer; the decimal sign is a point: "
                  "[0.9, 0.99]"}),
        ({"pair": [0.5, 1, 2, 3]}, {"pair": "found [0.5, 1, 2, 3] (a list), expected a list of 2 or fewer"}),
        ({"depth": 1}, {"depth": "unknown key; it belongs in [colour] or in [short]"}),
        ({"sizes": 1}, {"sizes": "unknown key; it belongs in [leaf] or in [[leaves]] or in [[mixed]]"}),
        ({"leaves": [{"name": "a", "wide": 1}]},
         {"leaves[0].wide": "unknown key; it belongs at the top of the file, above the first [table]"}),
    ],
)  # fmt: skip
def test_paths_and_sentences_are_the_users(data, expected):
    assert problems(**data) == expected


def test_all_problems_are_found_at_once():
    assert list(problems(wide="1", leaf=2, leaves=[{}], zzz=1)) == ["leaf", "leaves[0].name", "wide", "zzz"]


@pytest.mark.parametrize("value", ["1", True, datetime.date(2020, 1, 1), float("nan"), float("inf"), None, [1.0]])
def test_settings_are_strict(value):
    with pytest.raises(ValidationError):
        Tree(wide=value)


def test_settings_cannot_be_changed_and_equal_by_value():
    assert Tree() == Tree()
    with pytest.raises(ValidationError, match="frozen"):
        Tree().wide = 0.1


def test_defaults_are_checked_too():
    class Wrong(Settings):
        number: int = "1"

    with pytest.raises(ValidationError):
        Wrong()


def test_docstrings_become_descriptions():
    assert Tree.model_fields["wide"].description == "A share."


@pytest.mark.parametrize(
    ("location", "text"),
    [
        ((), ""),
        (("a",), "a"),
        (("directory", 0, "path"), "directory[0].path"),
        (("a", 0, 1, "b"), "a[0][1].b"),
        (("a", "b c", "\x1b"), 'a."b c"."\\u001b"'),
        (("", "ü"), '""."ü"'),
    ],
)
def test_locations_read_like_toml(location, text):
    assert key_path(location) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3 (an integer)"),
        (True, "true"),
        (1e-4, "0.0001 (a number)"),
        (float("-inf"), "-inf (a number)"),
        ("1e-4", '"1e-4" (text)'),
        ("猫\x9b", '"猫\\U0000009b" (text)'),
        ([1, "a"], '[1, "a"] (a list)'),
        ({"a": 1}, "a table"),
        (datetime.date(2020, 1, 2), '"2020-01-02" (date)'),
        ("x" * 100, '"' + "x" * 56 + "... (text)"),
    ],
)
def test_values_are_shown_with_their_kind(value, text):
    assert describe_value(value) == text


def test_quoted_text_is_toml():
    for text in ("plain", 'with "quotes"', "C:\\new", "a\nb\x1b\x9b\x7f\u2028", "猫 😀"):
        assert quoted(text).isprintable()
        assert tomllib.loads(f"x = {quoted(text)}")["x"] == text


@pytest.mark.parametrize(
    ("word", "close"), [("rnak", "rank"), ("RANK", "rank"), ("alpa", "Alpha"), ("zzz", None), ("", None)]
)
def test_the_nearest_name_is_found_whatever_its_case(word, close):
    assert nearest(word, ["rank", "Alpha", "dropout"]) == close


def test_tables_are_named_as_they_are_written():
    assert [(place, table.__name__) for place, table in tables(Tree)] == [
        ("at the top of the file, above the first [table]", "Tree"),
        ("in [colour]", "Red"),
        ("in [colour]", "Blue"),
        ("in [short]", "Red"),
        ("in [short]", "Blue"),
        ("in [leaf]", "Leaf"),
        ("in [[leaves]]", "Leaf"),
        ("in [[mixed]]", "Leaf"),
        ("in [[folders]]", "Folder"),
    ]


def test_a_location_that_the_classes_do_not_know_is_kept():
    assert ErrorPlace.of(("unknown", "deep", 3), Tree).location == ("unknown", "deep", 3)
