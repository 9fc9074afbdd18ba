"""The requests that signals and files make of a run: to save its state now, and perhaps to stop there.

SIGTERM, SIGHUP (the terminal was closed, the connection is gone), SIGUSR1, SIGUSR2 and SIGXCPU (which clusters send
before a deadline) and the first Ctrl-C save after the step that is being made and stop; an evaluation or preview that
is being made is left, and made by the process that resumes. Before the first step, where everything done is in the
cache already, they stop at once. A second Ctrl-C stops at once in any case. The files `save` and `save_quit` in the
run's folder do the same without a signal.
"""

import os
import signal
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from accelerate import Accelerator

from anima_train.core.errors import Interrupted
from anima_train.core.interrupts import INTERRUPTED, tell
from anima_train.distributed.collectives import any_rank
from anima_train.distributed.launcher import rank, world_size

SAVE_FILE, QUIT_FILE = "save", "save_quit"
NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")  # those that the system has
NOTICE = "stopping after this step; Ctrl-C stops at once"
AT_ONCE = "stopped: at once; what was saved before is whole"
TERMINATED = 143  # the exit code after all but Ctrl-C: that of SIGTERM, as shells count it


class Abandoned(Exception):  # as Interrupted: not an error
    """The end of work that was left in its middle, because the run is to stop; it changed nothing."""


@dataclass(frozen=True)
class StopRequest:
    """The answer to signals and files after a step."""

    weights: bool  # the main process writes them after this step
    state: bool  # it writes the training state
    exit_code: int | None  # None: to go on

    @property
    def waits(self) -> bool:
        """True if the main process writes something, which the others wait for."""
        return self.weights or self.state


class SignalHandler:
    """The handler of signals while it is entered; only in the main thread, where Python hears them.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.received = 0  # the signal
        self.is_stepping = False
        self.handlers: dict[int, Any] = {}
        self.wakeup: tuple[socket.socket, int] | None = None  # to which signals are written, and the one before it

    def __enter__(self) -> "SignalHandler":
        if threading.current_thread() is not threading.main_thread():
            return self
        for name in NAMES:
            number = getattr(signal, name, None)
            if number is None or (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):  # nohup
                continue
            self.handlers[number] = signal.signal(number, self.receive)
        written, read = socket.socketpair()
        written.setblocking(False)
        self.wakeup = written, signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self.watch, args=(read,), name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.wakeup is not None:
            written, before = self.wakeup
            signal.set_wakeup_fd(before)
            written.close()  # which ends the thread

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        is_first = self.received == 0
        self.received = number
        if not self.is_stepping:
            code = INTERRUPTED if number == signal.SIGINT else TERMINATED
            raise Interrupted("before the first step; what is in the cache stays", code)
        if rank() == 0 and is_first:
            tell(NOTICE)

    def watch(self, received: socket.socket) -> None:
        """End the process at the second Ctrl-C.

        A thread does it, which gets each signal as it comes: a handler waits until the main thread is out of C, and an
        exception there may abort the process. torchrun's agent turns the second Ctrl-C into a SIGTERM.
        """
        seconds = {signal.SIGINT, signal.SIGTERM} if world_size() > 1 else {signal.SIGINT}
        is_pressed = False
        with received:
            while numbers := received.recv(64):
                for number in numbers:
                    if is_pressed and number in seconds:
                        if rank() == 0:
                            tell(AT_ONCE)
                        os._exit(INTERRUPTED)
                    is_pressed = is_pressed or number == signal.SIGINT

    def leave_if_requested(self) -> None:
        """Raise `Abandoned` if this process has received a signal."""
        if self.received:
            raise Abandoned

    def is_requested(self, accelerator: Accelerator) -> bool:
        """Return True, on all processes, if any of them has received a signal."""
        return any(any_rank(accelerator, [self.received != 0]))

    def requested(self, accelerator: Accelerator, weights: bool = False, state: bool = False) -> StopRequest:
        """Return on all processes what was asked of any of them by now.

        Args:
            accelerator: of the run.
            weights: True on the main process if it is about to write weights anyway.
            state: the same of the training state.
        """
        asked = [self.received == signal.SIGINT, self.received not in (0, signal.SIGINT), False, False, weights, state]
        if accelerator.is_main_process:
            asked[2:4] = [self.take(QUIT_FILE), self.take(SAVE_FILE)]
        is_interrupted, is_terminated, quits, saves, weights, state = any_rank(accelerator, asked)
        code = INTERRUPTED if is_interrupted else TERMINATED if is_terminated else 0 if quits else None
        saves = saves or code is not None
        return StopRequest(saves or weights, saves or state, code)

    def take(self, name: str) -> bool:
        """Return True if there is a file of this name, and remove it, as it counts once."""
        try:
            (self.folder / name).unlink()
        except OSError:
            return False
        return True
