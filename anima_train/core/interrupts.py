"""Ctrl-C and the end of a process at once: one line instead of a traceback, and never an abort."""

import contextlib
import os
import select
import signal
import threading
from collections.abc import Iterator
from types import FrameType

INTERRUPTED = 130  # the exit code after Ctrl-C, as shells count it
IMPORTING = "<frozen importlib"  # begins the file names of the frames of an import
STOPPED = "stopped: Ctrl-C"


def tell(line: str) -> None:
    """Write a line of its own to stderr: from a signal handler, where `print` may be interrupted already.

    Nothing is said where nobody reads, or where it would have to be waited for.
    """
    with contextlib.suppress(OSError, ValueError):
        if os.name == "nt" or select.select([], [2], [], 0)[1]:
            os.write(2, f"\n{line}\n".encode())


def listen_to_ctrl_c(is_main: bool) -> None:
    """Have Ctrl-C end this process with one line: at once if it is importing, or if it is the second.

    Nothing changes where Ctrl-C is ignored, as in the background of a script, or has another handler already.

    Args:
        is_main: True on the one of several processes that says it.
    """
    is_pressed = False

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal is_pressed
        if is_main and not is_pressed:
            tell(STOPPED)
        if is_pressed or is_importing(frame):  # an import may swallow the exception, or end in another one
            os._exit(INTERRUPTED)
        is_pressed = True
        raise KeyboardInterrupt

    is_main_thread = threading.current_thread() is threading.main_thread()
    if is_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, receive)


def is_importing(frame: FrameType | None) -> bool:
    """Return True if an import is in progress in a frame, or in one that has called it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(IMPORTING):
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def ctrl_c_in_one_line(is_main: bool) -> Iterator[None]:
    """Listen to Ctrl-C while entered, see `listen_to_ctrl_c`."""
    before = signal.getsignal(signal.SIGINT)
    listen_to_ctrl_c(is_main)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)
