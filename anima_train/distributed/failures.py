"""The end of a process that fails among several.

The launcher's agent (of torchrun, which accelerate launch uses) sees that a process has ended, and ends the others on
its machine: by SIGTERM, and after 30 s by SIGKILL. It names the failure that was recorded first. On other machines
processes end as their connections do, or at the timeout of the process group.
"""

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable

from anima_train.core.errors import Interrupted, UserError
from anima_train.core.format import message_lines, printable_lines
from anima_train.core.interrupts import INTERRUPTED
from anima_train.distributed.launcher import rank, world_size

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
HEAD_START = 10.0  # seconds in which the process that says what is wrong ends, and the agent ends this one
# In errors of gloo and NCCL, which have no classes of their own:
LOST = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe",
    "remote process exited", "NCCL communicator was aborted",
)  # fmt: skip
LATE = ("Timed out waiting", "wait timeout after", "Socket Timeout", "Application timeout caused pair closure")


class ProcessLost(UserError):
    """This process cannot go on, as another one has ended."""

    label = "stopped"


def run_program(work: Callable[[], None]) -> None:
    """Run the program of this process; a user's mistake is a message, a fault of ours a traceback."""
    try:
        record_failures(lambda: give_precedence(work))
    except KeyboardInterrupt:  # which has said so already
        leave(INTERRUPTED)
    except UserError as error:
        if not isinstance(error, ProcessLost):  # which is printed already
            print_error(error)
        leave(error.exit_code)
    except Exception as error:  # noqa: BLE001  # printed with its traceback, and the process ends
        print_error(error)
        leave(1)


def record_failures(work: Callable[[], None]) -> None:
    """Do some work, and leave the exception that it raises where the launcher looks for it."""
    if ERROR_FILE not in os.environ:
        work()
        return
    from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, record  # not what one process needs

    class ErrorFile(ErrorHandler):
        """The file from which the launcher reads a failure: a user's mistake without a traceback."""

        def record_exception(self, e: BaseException) -> None:
            if not isinstance(e, UserError):
                super().record_exception(e)
                return
            facts = {"message": printable_lines(f"{e.label}: {e}"), "extraInfo": {"timestamp": str(int(time.time()))}}
            with contextlib.suppress(OSError), open(os.environ[ERROR_FILE], "w", encoding="utf-8") as file:
                json.dump({"message": facts}, file)

    record(work, ErrorFile())()


def give_precedence(work: Callable[[], None]) -> None:
    """Do some work; where it fails because of another process, or perhaps as another does, that one ends first.

    Raises:
        UserError: the work has raised it, or another process is missing.
    """
    try:
        work()
    except UserError:
        if rank() != 0:  # all processes may have met it: process 0 says it
            time.sleep(HEAD_START)
        raise
    except RuntimeError as error:
        if world_size() == 1:
            raise
        if any(sign in str(error) for sign in LATE):
            problem = f"no answer from another process: it hangs, or the network between them is gone ({error})"
            raise UserError(problem) from error
        if not any(sign in str(error) for sign in LOST):
            raise
        lost = ProcessLost("another process has ended")
        print_error(lost)
        time.sleep(HEAD_START)
        raise lost from error


def print_error(error: Exception) -> None:
    """Print an error, with the number of the process if there are several; a fault of ours with its traceback.

    Each of its problems begins a line, whatever has been written before it: an unfinished one is ended.
    """
    is_stop = isinstance(error, Interrupted)  # all processes stop together: one says so
    name = f" (process {rank()})" if world_size() > 1 and not is_stop else ""
    if not isinstance(error, UserError):
        traceback.print_exception(error)
        lines = [f"error{name}: {type(error).__name__}: {printable_lines(str(error))}"]
    elif rank() == 0 or not is_stop:
        lines = []
        for problem in error.problems:
            first, *entries = message_lines(problem, error.where)
            lines += [f"{error.label}{name}: {printable_lines(first)}", *entries]
    else:
        return
    # Another process may be in the middle of its line.
    is_inside_line = world_size() > 1 or getattr(sys.stderr, "is_inside_line", False)
    sys.stderr.write("\n" * is_inside_line + "".join(f"{line}\n" for line in lines))


def leave(exit_code: int) -> None:
    """End this process; one of several at once, as threads and the process group may wait for the others."""
    if world_size() == 1:
        sys.exit(exit_code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
