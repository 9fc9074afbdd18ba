"""What signals and files ask of a run: to save its state now, and perhaps to stop there.

SIGTERM, SIGUSR1 (which clusters send before a deadline) and the first Ctrl-C save after the step that is being made and
stop; an evaluation or preview that is being made is left, and made by the process that goes on. Before the first step,
where everything done is in the cache already, they stop at once. A second Ctrl-C stops at once in any case. The files
`save` and `save_quit` in the run's folder do the same without a signal.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from accelerate import Accelerator

from anima_train.core.errors import Interrupted
from anima_train.distributed.collectives import votes
from anima_train.distributed.launcher import rank

SAVE_FILE, QUIT_FILE = "save", "save_quit"
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")  # those that the system has
NOTICE = b"\nstopping after this step; Ctrl-C stops at once\n"
TERMINATED, INTERRUPTED = 143, 130  # exit codes, as shells count them
MARGIN = 1.0  # seconds of the deadline that are not planned with


class Abandoned(Exception):  # as Interrupted: not an error
    """Work was left in its middle, because the run is to stop; it changed nothing."""


@dataclass(frozen=True)
class Wish:
    """What is asked of the run after a step."""

    saves: bool
    exit_code: int | None  # None: to go on


class Stopping:
    """Listens to signals while it is entered; only in the main thread, where Python hears them.

    Args:
        folder: of the run.
        deadline: seconds after a signal until the process is killed; None: it is not.
    """

    def __init__(self, folder: Path, deadline: float | None = None) -> None:
        self.folder = folder
        self.deadline = deadline
        self.received = 0  # the signal
        self.received_at = 0.0
        self.is_stepping = False
        self.needed_until: float | None = None  # when a step that may be left, and saving after it, would be done
        self.handlers: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        for name in NAMES if threading.current_thread() is threading.main_thread() else ():
            if (number := getattr(signal, name, None)) is not None:
                self.handlers[number] = signal.signal(number, self.receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # the next one stops at once
        if not self.received:
            self.received_at = time.monotonic()
        self.received = number
        if not self.is_stepping:
            raise Interrupted("before the first step; what is in the cache stays", self.exit_code)
        if rank() == 0:
            os.write(2, NOTICE)  # not `print`, which a signal may have interrupted
        self.leave_if_late()

    @property
    def exit_code(self) -> int:
        """That of the signal."""
        return INTERRUPTED if self.received == signal.SIGINT else TERMINATED

    @contextlib.contextmanager
    def leaving(self, seconds: float) -> Iterator[None]:
        """While entered, a signal raises `Abandoned` where the deadline comes before the work is done.

        Args:
            seconds: that the work, and saving after it, will take.
        """
        self.needed_until = time.monotonic() + seconds
        try:
            self.leave_if_late()
            yield
        finally:
            self.needed_until = None

    def leave_if_late(self) -> None:
        """Raise `Abandoned` if there is a deadline, and the work that may be left would not be done by then."""
        if not self.received or self.deadline is None or self.needed_until is None:
            return
        if self.needed_until > self.received_at + self.deadline - MARGIN:
            raise Abandoned

    def leave_if_asked(self) -> None:
        """Raise `Abandoned` if this process has received a signal."""
        if self.received:
            raise Abandoned

    def is_asked(self, accelerator: Accelerator) -> bool:
        """Whether any process has received a signal: all of them get the same answer."""
        return any(votes(accelerator, [self.received != 0]))

    def after_step(self, accelerator: Accelerator) -> Wish:
        """What is asked by now, of any process: all of them get the same answer."""
        asked = [self.received == signal.SIGINT, self.received not in (0, signal.SIGINT), False, False]
        if accelerator.is_main_process:
            asked[2:] = [self.taken(QUIT_FILE), self.taken(SAVE_FILE)]
        is_interrupted, is_terminated, quits, saves = votes(accelerator, asked)
        code = INTERRUPTED if is_interrupted else TERMINATED if is_terminated else 0 if quits else None
        return Wish(saves or code is not None, code)

    def taken(self, name: str) -> bool:
        """Whether there was a file of this name; it is removed, as it counts once."""
        try:
            (self.folder / name).unlink()
        except OSError:
            return False
        return True
