"""Numbers, lists and names in the form that people read."""

from collections.abc import Sequence

MAX_LISTED = 20  # files named in one message


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Return the number with its noun: `3 images`, `1 image`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def format_bytes(num_bytes: float) -> str:
    """Return a number of bytes in a larger unit: 1536 is `1.5 KiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def listed(lines: Sequence[str], most: int = MAX_LISTED) -> list[str]:
    """Return the first `most` lines, fit to be printed, and one with the number of the others."""
    more = len(lines) - most
    return [printable(line) for line in lines[:most]] + ([f"... and {more:,} more"] if more > 0 else [])


def printable(text: str) -> str:
    """Return the text with escapes for what a terminal would obey or cannot show; names of files may hold both."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def printable_lines(text: str) -> str:
    """Return text of several lines with the same escapes, line ends kept."""
    return "\n".join(map(printable, text.split("\n")))


def format_duration(seconds: float) -> str:
    """Return a time in a larger unit: 3700 is `1 h 2 min`."""
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"
