"""The progress of a run at the terminal: a live line, or in a log now and then a line that says the same."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from tqdm import tqdm
from tqdm.utils import disp_len

from anima_train.core.averages import ExponentialAverage
from anima_train.core.format import format_bytes, format_duration, printable, printable_lines

LINE_EVERY = 30.0  # seconds between lines in a log
FAST, SLOW = 0.9, 0.99  # decay per step of the two averages whose distance is the loss's trend
LEVEL = 0.01  # relative distance below which a loss neither falls nor rises


def columns(stream: TextIO) -> int:
    """Return the width of the terminal that a stream leads to; 80 where it does not tell."""
    with contextlib.suppress(OSError, ValueError):  # it is gone, or no terminal
        if (width := os.get_terminal_size(stream.fileno()).columns) > 0:
            return width
    return 80


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

    The live line fits into the terminal: step, loss, speed and the time that is left come first, and what has no room
    is left out. The time that is left is that of the steps to come, at the mean speed of those that this process made:
    evaluations, previews and waits for what is saved, all that is entered as `doing`, count in neither.

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
        self.started, self.seconds_doing = clock(), 0.0  # the latter between steps, see `doing`
        self.last_line: float | None = None
        self.trend = Trend()
        self.step = start
        self.numbers: list[str] = []  # of the last step: loss, speed, the time that is left
        self.others: list[str] = []
        is_live = is_shown and self.stream.isatty()
        self.bar = tqdm(total=num_steps, initial=start, bar_format="{desc}", file=self.stream) if is_live else None

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
        stepping = self.clock() - self.started - self.seconds_doing
        left = (self.num_steps - step) * stepping / (step - self.start)
        self.step = step
        self.numbers = [
            f"loss {self.trend.fast.value:.4f} {self.trend.word}",
            f"{images_per_second:.2f} images/s",
            f"{format_duration(left)} left" if step < self.num_steps else "done",
        ]
        self.others = [*([following] if following else []), format_bytes(memory)]
        if self.bar is not None:
            self.bar.set_description_str(self.live_line(), refresh=False)
            self.bar.update()
        elif self.is_due() or step == self.num_steps:
            self.write_line(", ".join((*self.numbers, *self.others)))

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Say what the run is doing between two steps, while entered: "evaluation"; no step takes that time."""
        entered, before = self.clock(), self.seconds_doing
        if self.bar is not None:
            self.bar.set_description_str(self.live_line(what))
        elif self.is_shown and self.is_due():
            self.write_line(f"{what} ...")
        try:
            yield
        finally:
            self.seconds_doing = before + self.clock() - entered  # with what was entered inside
            if self.bar is not None:
                self.bar.set_description_str(self.live_line())

    def is_due(self) -> bool:
        """Return True if it is time for another line in a log."""
        return self.last_line is None or self.clock() - self.last_line >= LINE_EVERY

    def write_line(self, text: str) -> None:
        """Write a line into a log."""
        self.last_line = self.clock()
        percent = f"{self.step / self.num_steps:.0%}"
        self.say(f"{self.name}: step {self.step:,} of {self.num_steps:,} ({percent}): {text}")

    def live_line(self, doing: str = "") -> str:
        """Return what a terminal shows: as much as it has room for."""
        room = columns(self.stream) - 1  # a full line would become two
        parts = [*([f"{doing} ..."] if doing else []), *self.numbers, *([] if doing else self.others), self.name]
        line = f"step {self.step:,}/{self.num_steps:,}"[:room]
        for part in map(printable, parts):
            if disp_len(longer := f"{line}, {part}") <= room:
                line = longer
        return line

    def say(self, line: str) -> None:
        """Write a line of its own, above the live one."""
        if self.is_shown:
            tqdm.write(printable_lines(line), file=self.stream)

    def close(self) -> None:
        """Leave the live line as it is."""
        if self.bar is not None:
            self.bar.close()


class DrawingBar:
    """The progress of pictures that are drawn: one live line in a terminal, nothing in anything else.

    Args:
        num_steps: of each picture.
        is_shown: False to show nothing.
        stream: where to.
        clock: seconds, for tests.
    """

    def __init__(
        self, num_steps: Sequence[int], is_shown: bool = True, stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.stream = sys.stderr if stream is None else stream
        self.num_steps = num_steps
        self.clock = clock
        self.started: float | None = None
        self.num_pictures = self.step = self.steps_before = 0
        self.level = math.inf
        is_live = is_shown and self.stream.isatty()
        self.bar = tqdm(bar_format="{desc}", file=self.stream, leave=False) if is_live else None

    def tell(self, level: float) -> None:
        """Take in the noise level of a pass: a lower one than before is that of the next step."""
        if self.started is None:  # not while models are loaded
            self.started = self.clock()
        if level == self.level:
            return
        self.level = level
        total = self.num_steps[self.num_pictures]
        self.step = min(self.step + 1, total)
        if self.bar is not None:
            done = self.steps_before + self.step - 1  # this one has begun
            left = (sum(self.num_steps) - done) * (self.clock() - self.started) / done if done else None
            time_left = "" if left is None else f", {format_duration(left)} left"
            line = f"picture {self.num_pictures + 1:,}/{len(self.num_steps):,}, step {self.step:,}/{total:,}{time_left}"
            self.bar.set_description_str(line[: columns(self.stream) - 1])

    def finished(self, line: str) -> None:
        """Say where a picture is, on standard output."""
        self.steps_before += self.num_steps[self.num_pictures]
        self.num_pictures, self.step, self.level = self.num_pictures + 1, 0, math.inf
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Take the live line away."""
        if self.bar is not None:
            self.bar.close()
