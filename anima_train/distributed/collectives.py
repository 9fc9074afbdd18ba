"""Values that all processes agree on."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from anima_train.core.errors import UserError

Made = TypeVar("Made")


def from_main(accelerator: Accelerator, make: Callable[[], Made]) -> Made:
    """What the main process makes, on all processes; a `UserError` in making it is raised on all of them."""
    made: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            made[0] = make()
        except UserError as error:
            made[1] = (type(error), error.problems)
    if accelerator.num_processes > 1:
        broadcast_object_list(made)
    if made[1] is not None:
        kind, problems = made[1]
        raise kind(problems)
    result: Made = made[0]
    return result


def votes(accelerator: Accelerator, asked: list[bool]) -> list[bool]:
    """For each question, whether the answer of any process is yes."""
    if accelerator.num_processes == 1:
        return asked
    numbers = torch.tensor(asked, dtype=torch.float32, device=accelerator.device)
    return [number > 0 for number in accelerator.reduce(numbers, "sum").tolist()]
