"""Errors meant for the person at the terminal: one class per exit code, all problems of one kind in one report."""

from collections.abc import Iterable, Sequence


class UserError(Exception):
    """Something the user can put right; printed without a traceback, and the process ends with `exit_code`."""

    exit_code = 1

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: Sequence[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ConfigError(UserError):
    """The configuration, or a command-line argument, is wrong."""

    exit_code = 2


class DataError(UserError):
    """The images, captions or their cache cannot be used."""

    exit_code = 3


class ModelFileError(UserError):
    """A model or tokenizer file is missing, damaged, or not what its slot expects."""

    exit_code = 4


class NumericError(UserError):
    """Training produced numbers that are not finite."""

    exit_code = 5


class SpaceError(UserError):
    """The disk is full, read-only, or will not hold what the run needs."""

    exit_code = 6


def count(number: int, noun: str, plural: str | None = None) -> str:
    """`3 images`, `1 image`: the number with its noun."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
