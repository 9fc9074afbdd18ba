"""Steps whose numbers are still on their way from the device: they are told late, but in order."""

from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from anima_train.training.metrics import MadeStep


class LateSteps:
    """The steps that the device has been told to make, and of which nobody knows yet what has come out.

    Where an error ends the run, those that were made before it are still logged; not after a second Ctrl-C.

    Args:
        lag: steps that the device is told to make before the numbers of one are read; 0: they are waited for at once.
        log: called with each step, in order; it must not wait for other processes.
        check: called with each step after that; it may end the run.
    """

    def __init__(self, lag: int, log: Callable[[MadeStep], object], check: Callable[[MadeStep], object]) -> None:
        self.lag = lag
        self.log = log
        self.check = check
        self.waiting: deque[MadeStep] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not issubclass(kind, Exception):
            return
        try:
            while self.waiting:
                self.log(self.waiting.popleft())
        except Exception:
            if error is None:
                raise  # else of the same cause, such as a device that is lost

    def add(self, made: MadeStep) -> None:
        """Add a step, and tell about those that are old enough."""
        self.waiting.append(made)
        self.tell_all_but(self.lag)

    def tell_all(self) -> None:
        """Tell about all steps: before something looks at the run from outside of a step."""
        self.tell_all_but(0)

    def tell_all_but(self, number: int) -> None:
        """Tell about all steps but this number of the last."""
        while len(self.waiting) > number:
            made = self.waiting.popleft()
            self.log(made)
            try:
                self.check(made)
            except BaseException:
                self.waiting.clear()  # nothing is left of a run after its end
                raise
