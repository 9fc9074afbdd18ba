"""Work done behind the training's back, by a thread that cannot hold the exit."""

import contextlib
import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

Job = Callable[[], object]


class BackgroundThread:
    """A daemon thread that does one job after the other.

    What a job raises is raised in the caller's thread, by a later `check`. On leaving, all jobs are waited for, unless
    the way out is a second Ctrl-C.
    """

    def __init__(self, name: str, max_waiting: int) -> None:
        self.jobs: queue.Queue[Job | None] = queue.Queue(max_waiting)
        self.errors: list[BaseException] = []
        self.thread = threading.Thread(target=self.run, name=name, daemon=True)
        self.thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, Exception):
            self.close()
        if kind is None:
            self.check()

    def submit(self, job: Job, timeout: float | None = None) -> bool:
        """Have a job done after those before; return False if there was no room for it in `timeout` seconds."""
        with contextlib.suppress(queue.Full):
            self.jobs.put(job, timeout=timeout)
            return True
        return False

    def run(self) -> None:
        """Do the jobs, until `close`."""
        while (job := self.jobs.get()) is not None:
            self.do(job)
            del job  # with what it holds
            self.jobs.task_done()

    def do(self, job: Job) -> None:
        """Do a job, and keep what it raises."""
        try:
            job()
        except BaseException as error:  # noqa: BLE001  # raised by `check`
            self.errors.append(error)

    def wait(self) -> None:
        """Wait until all jobs are done, and raise what one of them has raised."""
        self.jobs.join()
        self.check()

    def check(self) -> None:
        """Raise what a job has raised so far, once."""
        if self.errors:
            error = self.errors[0]
            self.errors.clear()
            raise error

    def close(self, patience: float | None = None) -> bool:
        """End the thread after its jobs; return False if they are not done after `patience` seconds."""
        with contextlib.suppress(queue.Full):
            self.jobs.put(None, timeout=patience)
            self.thread.join(patience)
        return not self.thread.is_alive()
