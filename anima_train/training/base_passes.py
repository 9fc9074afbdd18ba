"""The passes of the base model in a step, for samples whose target is its velocity, and the time that they take."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from anima_train.core.transfers import is_asynchronous
from anima_train.data.loader import Batch
from anima_train.objective.step import with_base_velocity


class BasePasses:
    """The base's velocities, asked of the weights in training.

    Args:
        transformer: in training.
        as_base: makes it the base model while its context is open.
        device: of it.
    """

    def __init__(
        self, transformer: nn.Module, as_base: Callable[[], AbstractContextManager[None]], device: torch.device
    ) -> None:
        self.transformer = transformer
        self.as_base = as_base
        self.is_asynchronous = is_asynchronous(device)
        self.passed = 0.0  # seconds of the passes that are known to be over
        self.under_way: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # their beginnings and ends, on CUDA

    def complete(self, batch: Batch) -> Batch:
        """Return a batch on the device with the base's velocity, if it has samples that keep it."""
        if batch.preserved is None:
            return batch
        if not self.is_asynchronous:
            started = time.perf_counter()
            batch = with_base_velocity(self.transformer, batch, self.as_base)
            self.passed += time.perf_counter() - started
            return batch
        started_at, ended_at = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started_at.record()
        batch = with_base_velocity(self.transformer, batch, self.as_base)
        ended_at.record()
        self.under_way.append((started_at, ended_at))
        return batch

    def seconds(self) -> float:
        """Return the seconds that the passes have taken, as far as the device is done with them."""
        while self.under_way and self.under_way[0][1].query():
            started_at, ended_at = self.under_way.pop(0)
            self.passed += started_at.elapsed_time(ended_at) / 1000
        return self.passed

    def cost(self, seconds: float) -> str:
        """Return a line about what they took of these seconds, in which evaluations and saving are, too."""
        share = self.seconds() / seconds if seconds else 0.0
        taken = f"{self.seconds():.1f} s, {share:.1%} of the time since the first step"
        return f"preservation: the base's passes took {taken}"
