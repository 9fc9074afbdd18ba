"""The progress of a run at the terminal: a live line, or in a log now and then a line that says the same."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

from anima_train.core.averages import ExponentialAverage
from anima_train.core.format import format_bytes, format_duration, printable_lines

LINE_EVERY = 30.0  # seconds between lines in a log
FAST, SLOW = 0.9, 0.99  # decay per step of the two averages whose distance is the loss's trend
LEVEL = 0.01  # relative distance below which a loss neither falls nor rises


class Trend:
    """The direction of a noisy number: a fast moving average against a slow one."""

    def __init__(self) -> None:
        self.fast, self.slow = ExponentialAverage(FAST), ExponentialAverage(SLOW)

    def add(self, value: float) -> None:
        """Take one value in."""
        self.fast.add(value)
        self.slow.add(value)

    @property
    def word(self) -> str:
        """ "falling", "rising" or "level"."""
        slow = self.slow.value
        change = (self.fast.value - slow) / slow if slow else 0.0
        return "level" if abs(change) < LEVEL else "falling" if change < 0 else "rising"


class ProgressBar:
    """The progress of a run: in a terminal one live line, in anything else a line every half minute.

    Args:
        name: of the run.
        num_steps: of the run.
        start: steps that were done before.
        is_shown: False on all processes but one.
        stream: where to.
        clock: seconds, for tests.
    """

    def __init__(
        self, name: str, num_steps: int, start: int, is_shown: bool, stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.stream = sys.stderr if stream is None else stream
        self.name, self.num_steps, self.start = name, num_steps, start
        self.is_shown = is_shown
        self.clock = clock
        self.started = clock()
        self.last_line: float | None = None
        self.trend = Trend()
        is_live = is_shown and self.stream.isatty()
        self.bar = tqdm(total=num_steps, initial=start, desc=name, unit="step", file=self.stream) if is_live else None

    def update(self, step: int, loss: float, images_per_second: float, memory: int, following: str) -> None:
        """Show a step.

        Args:
            step: how many there were in all.
            loss: of the step.
            images_per_second: so far.
            memory: most bytes in use on the device.
            following: what happens next, as "evaluation at 200".
        """
        if not self.is_shown:
            return
        self.trend.add(loss)
        parts = [f"loss {self.trend.fast.value:.4f} {self.trend.word}", f"{images_per_second:.2f} images/s"]
        parts += [format_bytes(memory), following] if following else [format_bytes(memory)]
        if self.bar is not None:
            self.bar.set_postfix_str(", ".join(parts), refresh=False)
            self.bar.update()
            return
        now = self.clock()
        if self.last_line is None or now - self.last_line >= LINE_EVERY or step == self.num_steps:
            self.last_line = now
            left = (self.num_steps - step) * (now - self.started) / (step - self.start)
            parts.append(f"{format_duration(left)} left" if step < self.num_steps else "done")
            percent = f"{step / self.num_steps:.0%}"
            self.say(f"{self.name}: step {step:,} of {self.num_steps:,} ({percent}): {', '.join(parts)}")

    def say(self, line: str) -> None:
        """Write a line of its own, above the live one."""
        if self.is_shown:
            tqdm.write(printable_lines(line), file=self.stream)

    def close(self) -> None:
        """Leave the live line as it is."""
        if self.bar is not None:
            self.bar.close()
