"""Files written by a thread of its own, so that training waits only until their tensors are copied."""

import time
from collections.abc import Callable, Mapping
from functools import partial

import psutil
from torch import Tensor

from anima_train.core.background import BackgroundThread

Groups = Mapping[str, Mapping[str, Tensor]]  # by file, then by name
MAX_WAITING = 2  # jobs, each with its copies
RESERVE = 2**30  # bytes of memory that a copy leaves free


class AsyncWriter(BackgroundThread):
    """The thread that writes; errors of writing are raised in the caller's thread, by a later call."""

    def __init__(self) -> None:
        super().__init__("writer", MAX_WAITING)
        self.seconds = 0.0  # that the last job took

    def write(self, groups: Groups, job: Callable[[Groups], object]) -> None:
        """Copy tensors to the host and have `job` called with the copies, after the jobs before.

        Where the host's memory does not hold copies, `job` gets the tensors themselves, at once.
        """
        num_bytes = sum(tensor.nbytes for tensors in groups.values() for tensor in tensors.values())
        if num_bytes + RESERVE > psutil.virtual_memory().available:
            self.wait()
            self.do(partial(job, groups))
            self.check()
        else:
            self.submit(partial(job, on_host(groups)))

    def do(self, job: Callable[[], object]) -> None:
        """Do a job, keep what it raises, and take its time."""
        started = time.monotonic()
        super().do(job)
        self.seconds = time.monotonic() - started


def on_host(groups: Groups) -> Groups:
    """Return copies in the host's memory, which later steps do not change."""
    return {
        file: {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        for file, tensors in groups.items()
    }
