"""Output stops nothing: nobody may read it any more, as after `| head` or in a terminal that was closed, and it may be
unable to show a character, as in ASCII or cp1252.
"""

import io
import os
import sys
from typing import Any, TextIO


class Unread:
    """A stream whose reader may go away: what is written after that is lost, without an error."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.is_inside_line = False  # after what was written last, such as a progress bar

    def write(self, text: str) -> int:
        """Write, or lose it."""
        if text:
            self.is_inside_line = not text.endswith("\n")
        try:
            return self.stream.write(text)
        except OSError:
            self.lose()
            return len(text)

    def flush(self) -> None:
        """Flush, or lose it."""
        try:
            self.stream.flush()
        except OSError:
            self.lose()

    def lose(self) -> None:
        """Lead the stream nowhere, so that what it still holds is lost without a word at the end of the process."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def outlive_readers() -> None:
    """Have stdout and stderr outlive whoever reads them, and escape what they cannot show.

    One that was closed from the beginning leads nowhere. Each line is written at once: in a log of both they stand in
    order, and none is lost where the process ends at once.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by `>&-`
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until the end of the process
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
        if not isinstance(stream, Unread):
            setattr(sys, name, Unread(stream))
