"""Errors meant for the person at the terminal: one class per exit code, all problems of one kind in one report."""

from collections.abc import Iterable, Sequence

from anima_train.core.format import CHECK_PAGE, message_lines


class UserError(Exception):
    """A problem that the user can solve; printed without a traceback, and the process ends with `exit_code`."""

    exit_code = 1
    label = "error"  # what the message begins with
    where = CHECK_PAGE  # the place where those of the problems that are a `Listing` are whole

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: Sequence[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(line for problem in self.problems for line in message_lines(problem)))


class Interrupted(UserError):
    """A run that stopped in good order, as somebody asked it to."""

    label = "stopped"

    def __init__(self, problem: str, exit_code: int) -> None:
        super().__init__(problem)
        self.exit_code = exit_code


class ConfigError(UserError):
    """A wrong configuration or command-line argument."""

    exit_code = 2


class DataError(UserError):
    """Images, captions or a cache of them that cannot be used."""

    exit_code = 3


class ModelFileError(UserError):
    """A model or tokenizer file that is missing, damaged, or not what its slot expects."""

    exit_code = 4


class NumericError(UserError):
    """Numbers of training that are not finite."""

    exit_code = 5


class SpaceError(UserError):
    """A disk that is full, read-only, or will not hold what the run needs."""

    exit_code = 6
