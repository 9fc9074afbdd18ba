"""Numbers, lists and names as people read them."""

from collections.abc import Sequence

MAX_LISTED = 20  # files named in one message


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


def readable_time(seconds: float) -> str:
    """3700 as 1 h 2 min."""
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def duration_text(run_seconds: float) -> str:
    """How long the run will take, and what is not counted."""
    return (
        f"about {readable_time(run_seconds)} in one process, without caching, evaluation and saving (an estimate from "
        "what was measured)"
    )
