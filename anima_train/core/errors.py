"""Errors meant for the person at the terminal: one class per exit code, all problems of one kind in one report."""

from collections.abc import Iterable, Sequence


class UserError(Exception):
    """Something the user can put right; printed without a traceback, and the process ends with `exit_code`."""

    exit_code = 1
    label = "error"  # what the message begins with

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: Sequence[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class Interrupted(UserError):
    """Somebody asked the run to stop, and it did so in good order."""

    label = "stopped"

    def __init__(self, problem: str, exit_code: int) -> None:
        super().__init__(problem)
        self.exit_code = exit_code


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
