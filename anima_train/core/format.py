"""Numbers, lists and names in the form that people read."""

from collections.abc import Iterable, Sequence
from typing import Self

MAX_LISTED = 20  # files named in one message
CHECK_PAGE = "on the page of `anima check`"  # which holds all of a list


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


def listed(lines: Sequence[str], most: int = MAX_LISTED, where: str = "") -> list[str]:
    """Return the first `most` lines, fit to be printed, and one with the number of the others, and where they are."""
    more = f"... and {len(lines) - most:,} more {where}".rstrip()
    return [printable(line) for line in lines[:most]] + ([more] if len(lines) > most else [])


class Listing(str):
    """A message about files, or other entries, of which it shows the first ones and holds all.

    Whoever prints it shows its `lines`; somewhere else it is written whole: in a run's lists.txt, or on a page.
    """

    entries: Sequence[str]
    num_shown: int  # entries in lines of their own; 0 where the text itself names the first

    def __new__(cls, text: str, entries: Iterable[str] = (), num_shown: int = MAX_LISTED) -> Self:
        """Return the message with its entries; a text alone has none."""
        made = super().__new__(cls, text)
        made.entries, made.num_shown = tuple(entries), num_shown
        return made

    @classmethod
    def naming_first(cls, text: str, entries: Sequence[str]) -> Self:
        """Return a message in one line that has the number of its entries and names the first."""
        return cls(f"{text}: {len(entries):,}, such as {entries[0]}", entries, num_shown=0)

    def prefixed(self, prefix: str) -> Self:
        """Return the same with a longer text."""
        return type(self)(prefix + self, self.entries, self.num_shown)

    def lines(self, where: str = CHECK_PAGE) -> list[str]:
        """Return the text, and the first entries in lines of their own; `where` says the place of all of them."""
        if self.num_shown > 0:
            return [str(self), *(f"  {line}" for line in listed(self.entries, self.num_shown, where))]
        return [f"{self}; all {where}" if len(self.entries) > 1 else str(self)]


def prefixed(prefix: str, message: str) -> str:
    """Return a message with a prefix; a `Listing` stays one."""
    return message.prefixed(prefix) if isinstance(message, Listing) else prefix + message


def message_lines(message: str, where: str = CHECK_PAGE) -> list[str]:
    """Return the lines of a message, as `Listing.lines` does."""
    return message.lines(where) if isinstance(message, Listing) else [message]


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
