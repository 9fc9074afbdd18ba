"""Passes through a divided model that one process needs: all have to make them, as each holds a part of it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor

from anima_train.distributed.collectives import patient_group
from anima_train.distributed.signals import Abandoned, SignalHandler

Made = TypeVar("Made", bound=Tensor)


class Lockstep:
    """The passes that process 0 leads: before each it tells the others, which make one like it of nothing.

    Args:
        signals: of the run; all leave together where any process has received one.
        passes: what the others do, one for each kind of pass.
    """

    def __init__(self, signals: SignalHandler, passes: Sequence[Callable[[], object]]) -> None:
        self.signals = signals
        self.passes = passes
        self.is_led = False  # the others wait for the next pass
        self.is_broken = False  # a pass failed on this process, in which the others went on

    def lead(self, kind: int, make: Callable[[], Made]) -> Made:
        """Return what a pass of this process gives, while the others make one of this kind.

        Raises:
            Abandoned: the run is to stop.
        """
        self.tell(kind + 1)
        self.is_broken = True
        made = make()
        self.is_broken = False
        return made

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Lead within this, and let the others go on afterwards, if they wait and a pass has not failed."""
        self.is_led = True
        try:
            yield
        finally:
            if self.is_led and not self.is_broken:
                self.tell(0)

    def follow(self) -> None:
        """Make passes until process 0 needs no more.

        Raises:
            Abandoned: the run is to stop.
        """
        with torch.no_grad():
            while kind := self.tell(0):
                self.passes[kind - 1]()

    def tell(self, number: int) -> int:
        """Return what process 0 tells: one more than the kind of the next pass, 0: there is none.

        Raises:
            Abandoned: there is one, and some process has received a signal.
        """
        told = torch.tensor([number, self.signals.received != 0], dtype=torch.int64)
        torch.distributed.all_reduce(told, group=patient_group())
        if told[0] and told[1]:
            self.is_led = False
            raise Abandoned
        return int(told[0])
