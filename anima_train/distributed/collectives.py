"""Values that all processes agree on, and the place where they wait for long work of one of them.

A collective operation of training must end within `run.accelerator.TIMEOUT`: a process that hangs ends the run. So
whatever one process may do for longer, while the others wait, is followed by a `patient_barrier`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from anima_train.core.errors import Interrupted, UserError
from anima_train.run.accelerator import TIMEOUT

PATIENCE = timedelta(days=30)

Made = TypeVar("Made")


@functools.cache
def patient_group() -> torch.distributed.ProcessGroup:
    """Return the process group of patient barriers; all processes have to make it at the same time."""
    group = torch.distributed.new_group(timeout=PATIENCE, backend="gloo")
    assert isinstance(group, torch.distributed.ProcessGroup)
    return group


@functools.cache
def host_group() -> torch.distributed.ProcessGroup:
    """Return the process group of the hosts, with the timeout of training; all have to make it at the same time."""
    group = torch.distributed.new_group(timeout=TIMEOUT, backend="gloo")
    assert isinstance(group, torch.distributed.ProcessGroup)
    return group


def patient_barrier(accelerator: Accelerator) -> None:
    """Wait until all processes are here, however long one of them works."""
    if accelerator.num_processes > 1:
        torch.distributed.barrier(patient_group())


@contextlib.contextmanager
def main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """Have the main process do what is inside before the others do it, however long that takes."""
    if not accelerator.is_main_process:
        patient_barrier(accelerator)
    yield
    if accelerator.is_main_process:
        patient_barrier(accelerator)


@contextlib.contextmanager
def process_group(accelerator: Accelerator) -> Iterator[None]:
    """Close the process group at the end of a run; after a failure that may hang, and the end of the process does it.

    `Accelerator.end_training` would also close the trackers: their thread does that.
    """
    yield
    for group in (patient_group, host_group):
        group.cache_clear()  # what is held until the interpreter ends may end it by an abort
    accelerator.state.destroy_process_group()


def broadcast_from_main(accelerator: Accelerator, make: Callable[[], Made]) -> Made:
    """Return on all processes what the main process makes, however long that takes.

    Raises:
        UserError: on all processes, if making it has raised one.
    """
    made: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            made[0] = make()
        except Interrupted:
            raise  # a signal to this process: it ends, and the launcher ends the others
        except UserError as error:
            made[1] = (type(error), error.problems)
    if accelerator.num_processes > 1:
        patient_barrier(accelerator)
        broadcast_object_list(made)
    if made[1] is not None:
        kind, problems = made[1]
        raise kind(problems)
    result: Made = made[0]
    return result


def any_rank(accelerator: Accelerator, answers: list[bool]) -> list[bool]:
    """Return for each answer True if it is True on any process; the hosts ask each other, no device is waited for."""
    if accelerator.num_processes == 1:
        return answers
    numbers = torch.tensor(answers, dtype=torch.float32)
    torch.distributed.all_reduce(numbers, group=None if accelerator.device.type == "cpu" else host_group())
    return [number > 0 for number in numbers.tolist()]
