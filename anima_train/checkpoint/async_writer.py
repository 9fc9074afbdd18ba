"""Files written by a thread of its own, so that training waits only until their tensors are copied."""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType

import psutil
from torch import Tensor

Groups = Mapping[str, Mapping[str, Tensor]]  # by file, then by name
Job = Callable[[Groups], object]
MAX_WAITING = 2  # jobs, each with its copies
RESERVE = 2**30  # bytes of memory that a copy leaves free


class Writer:
    """Does one job after the other; what goes wrong is raised in the caller's thread, by a later call.

    On leaving, it waits for all jobs, unless the way out is a second Ctrl-C.
    """

    def __init__(self) -> None:
        self.jobs: queue.Queue[tuple[Job, Groups] | None] = queue.Queue(MAX_WAITING)
        self.errors: list[BaseException] = []
        self.seconds = 0.0  # that the last job took
        self.thread = threading.Thread(target=self.work, name="writer", daemon=True)

    def __enter__(self) -> "Writer":
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not issubclass(kind, Exception):
            return
        self.jobs.put(None)
        self.thread.join()
        if kind is None:
            self.check()

    def write(self, groups: Groups, job: Job) -> None:
        """Copy tensors to the host and have `job` done with the copies, after the jobs before.

        Where the host's memory does not hold copies, `job` gets the tensors themselves, at once.
        """
        num_bytes = sum(tensor.nbytes for tensors in groups.values() for tensor in tensors.values())
        if num_bytes + RESERVE > psutil.virtual_memory().available:
            self.wait()
            self.do(job, groups)
            self.check()
        else:
            self.jobs.put((job, on_host(groups)))

    def work(self) -> None:
        """Do what is handed over, until the end."""
        while (item := self.jobs.get()) is not None:
            self.do(*item)
            del item  # the copies
            self.jobs.task_done()

    def do(self, job: Job, groups: Groups) -> None:
        """Do a job, and keep what it raises."""
        started = time.monotonic()
        try:
            job(groups)
        except BaseException as error:  # noqa: BLE001  # raised by `check`
            self.errors.append(error)
        self.seconds = time.monotonic() - started

    def wait(self) -> None:
        """Wait until all jobs are done, and raise what one of them has raised."""
        self.jobs.join()
        self.check()

    def check(self) -> None:
        """Raise what a job has raised so far."""
        if self.errors:
            error = self.errors[0]
            self.errors.clear()
            raise error


def on_host(groups: Groups) -> Groups:
    """Copies in the host's memory, which later steps do not change."""
    return {
        file: {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        for file, tensors in groups.items()
    }
