"""Errors meant for the person at the terminal: one class per exit code, all problems of one kind in one report."""

from collections.abc import Iterable, Sequence

MAX_LISTED = 20  # files named in one message


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


def count(number: int, noun: str, plural: str | None = None) -> str:
    """`3 images`, `1 image`: the number with its noun."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def readable(num_bytes: float) -> str:
    """1536 as 1.5 KiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def readable_time(seconds: float) -> str:
    """Return 3700 as 1 h 2 min."""
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def listed(lines: Sequence[str], most: int = MAX_LISTED) -> list[str]:
    """The first lines, fit to be printed, and how many more there are."""
    more = len(lines) - most
    return [printable(line) for line in lines[:most]] + ([f"... and {more:,} more"] if more > 0 else [])


def printable(text: str) -> str:
    """The text with escapes for what a terminal would obey or cannot show; names of files may hold both."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def printable_lines(text: str) -> str:
    """The same for text of several lines."""
    return "\n".join(map(printable, text.split("\n")))
