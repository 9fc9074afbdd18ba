"""Errors for the person at the terminal."""

import pytest

from anima_train.core import errors
from anima_train.core.errors import ConfigError, Interrupted, UserError
from anima_train.core.format import count, format_duration


def test_every_kind_of_error_has_its_own_exit_code():
    codes = {
        kind.__name__: kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, UserError) and kind is not Interrupted  # has the signal's
    }
    assert codes == {
        "UserError": 1, "ConfigError": 2, "DataError": 3, "ModelFileError": 4, "NumericError": 5, "SpaceError": 6
    }  # fmt: skip


@pytest.mark.parametrize("problems", ["one", ["one"], iter(["one"])])
def test_one_problem_or_several_are_kept(problems):
    error = ConfigError(problems)
    assert list(error.problems) == ["one"]
    assert str(error) == "one"


def test_the_text_has_a_line_for_each_problem():
    assert str(ConfigError(f"problem {number}" for number in (1, 2))) == "problem 1\nproblem 2"


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 images"), (1, "1 image"), (2, "2 images"), (12_345, "12,345 images")]
)
def test_numbers_agree_with_their_nouns(number, text):
    assert count(number, "image") == text


def test_an_irregular_plural_can_be_given():
    assert [count(number, "entry", "entries") for number in (1, 2)] == ["1 entry", "2 entries"]


def test_durations_are_readable():
    times = {0.25: "0.25 s", 59: "59 s", 61: "1 min", 3570: "1 h 0 min", 3700: "1 h 2 min", 360_000: "100 h 0 min"}
    assert {seconds: format_duration(seconds) for seconds in times} == times
