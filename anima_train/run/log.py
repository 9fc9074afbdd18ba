"""Lines for people: on the terminal, above its progress bars, and warnings in the run's folder as well."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import TextIO

from tqdm import tqdm

from anima_train.core.format import printable_lines
from anima_train.run.folder import RunFolder

PACKAGE = logging.getLogger("anima_train")


class TerminalHandler(logging.Handler):
    """Writes each record as lines of its own: `text`, `step 3: text`, or `warning: step 3: text`, by its level.

    Args:
        level: the lowest that is shown.
        stream: the place of the lines; None: whatever standard output is at the time.
    """

    def __init__(self, level: int, stream: TextIO | None = None) -> None:
        super().__init__(level)
        self.stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        step = getattr(record, "step", 0)
        text = f"step {step:,}: {record.getMessage()}" if step else record.getMessage()
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        tqdm.write(printable_lines(text), file=self.stream or sys.stdout)


class WarningsHandler(logging.Handler):
    """Keeps warnings in a run's warnings.jsonl, each with the step it is about (`extra={"step": 3}`).

    Those that come before the run's records are in order wait until `open`.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.folder: RunFolder | None = None
        self.waiting: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        self.keep(getattr(record, "step", 0), record.getMessage())

    def keep(self, step: int, text: str) -> None:
        """Keep a warning; step 0 is before the first."""
        if self.folder is None:
            self.waiting.append((step, text))
        else:
            self.folder.warn(step, text)

    def open(self, folder: RunFolder) -> None:
        """Write those that wait, and from now on each as it comes."""
        for step, text in self.waiting:
            folder.warn(step, text)
        self.folder = folder


@contextlib.contextmanager
def logged_to(*handlers: logging.Handler) -> Iterator[None]:
    """Hand the package's records to these handlers while entered."""
    level = PACKAGE.level
    PACKAGE.setLevel(logging.INFO)
    for handler in handlers:
        PACKAGE.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            PACKAGE.removeHandler(handler)
        PACKAGE.setLevel(level)


def terminal(is_main: bool, stream: TextIO | None = None) -> TerminalHandler:
    """Return the terminal's handler: one process speaks, the others only in case of an error."""
    return TerminalHandler(logging.INFO if is_main else logging.ERROR, stream)
