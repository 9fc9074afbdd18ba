"""Output that nobody reads any more, as after `| head` or in a terminal that was closed, stops nothing."""

import os
import sys
from typing import Any, TextIO


class Unread:
    """A stream whose reader may go away: what is written after that is lost, without an error."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write, or lose it."""
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
    """Have stdout and stderr outlive whoever reads them; one that was closed from the beginning leads nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by `>&-`
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until the end of the process
        if not isinstance(stream, Unread):
            setattr(sys, name, Unread(stream))
