"""Lines for people: on the terminal, above its progress bars, and warnings in the run's folder as well."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import TextIO

from tqdm import tqdm

from anima_train.core.errors import UserError
from anima_train.core.format import CHECK_PAGE, Listing, message_lines, printable_lines
from anima_train.run.folder import RunFolder

PACKAGE = logging.getLogger("anima_train")


def message_of(record: logging.LogRecord) -> str:
    """Return a record's message, a `Listing` as that."""
    return record.msg if isinstance(record.msg, Listing) else record.getMessage()


class TerminalHandler(logging.Handler):
    """Writes each record as lines of its own: `text`, `step 3: text`, or `warning: step 3: text`, by its level.

    Args:
        level: the lowest that is shown.
        stream: the place of the lines; None: whatever standard output is at the time.
    """

    def __init__(self, level: int, stream: TextIO | None = None) -> None:
        super().__init__(level)
        self.stream = stream
        self.where = CHECK_PAGE  # the place where lists are whole

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        step = getattr(record, "step", 0)
        message = "\n".join(message_lines(message_of(record), self.where))
        text = f"step {step:,}: {message}" if step else message
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
        self.keep(getattr(record, "step", 0), message_of(record))

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


class ListsHandler(logging.Handler):
    """Keeps whole in a run's lists.txt each `Listing` that is logged."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__(logging.INFO)
        self.folder = folder

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record, if it is a list."""
        if isinstance(record.msg, Listing):
            self.folder.add_list(record.msg)


@contextlib.contextmanager
def lists_kept(folder: RunFolder) -> Iterator[None]:
    """Keep whole in a run's lists.txt each `Listing` that is logged, or is a part of the error that ends the run."""
    with logged_to(ListsHandler(folder)):
        try:
            yield
        except UserError as error:
            for problem in error.problems:
                if isinstance(problem, Listing):
                    folder.add_list(problem)
            error.where = folder.where_lists_are
            raise


class WarningsList(logging.Handler):
    """Keeps the texts of warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        self.texts.append(record.getMessage())


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


def is_quiet() -> bool:
    """Return True if nothing but warnings and errors is to be told."""
    return logging.root.manager.disable >= logging.INFO


def terminal(is_main: bool, stream: TextIO | None = None) -> TerminalHandler:
    """Return the terminal's handler: one process speaks, the others only in case of an error."""
    return TerminalHandler(logging.INFO if is_main else logging.ERROR, stream)
