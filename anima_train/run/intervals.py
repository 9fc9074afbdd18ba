"""The steps after which evaluations and saves are due."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from anima_train.data.plan import EpochSchedule


@dataclass
class Interval:
    """The interval of something that happens every n epochs, steps, images or minutes."""

    epochs: int | None = None
    steps: int | None = None
    examples: int | None = None
    minutes: float | None = None
    last_time: float = 0.0

    def after(self, step: int, epochs_before: int, epochs_done: int, seen_before: int, seen: int) -> bool:
        """Return True if it is due after a step.

        Args:
            step: how many steps there were in all.
            epochs_before: epochs that were complete before the step.
            epochs_done: epochs that are complete with it.
            seen_before: images seen before.
            seen: images seen now.
        """
        passed = range(step - 1, step), range(epochs_before, epochs_done), range(seen_before, seen)
        due = self.count(*passed) > 0
        if self.minutes is not None and time.monotonic() - self.last_time >= self.minutes * 60:
            self.last_time = time.monotonic()
            due = True
        return due

    def count(self, steps: range, epochs: range, examples: range) -> int:
        """Return how often it is due, at most, while these numbers go from the start of their range to its stop."""
        passed = ((self.steps, steps), (self.epochs, epochs), (self.examples, examples))
        return sum(each.stop // every - each.start // every for every, each in passed if every is not None)

    def following(self, step: int, timetable: EpochSchedule) -> int | None:
        """Return the next step after which it is due, as far as steps and epochs tell; None: not before the end."""
        steps = []
        if self.steps is not None:
            steps.append((step // self.steps + 1) * self.steps)
        if self.epochs is not None:
            epoch = (timetable.locate(step)[0] // self.epochs + 1) * self.epochs
            steps.extend(timetable.epoch_starts[epoch : epoch + 1])
        return min((each for each in steps if each <= timetable.num_steps), default=None)

    def all_steps(self, timetable: EpochSchedule) -> Iterator[int]:
        """Yield the steps of the run after which it is due, as far as steps and epochs tell."""
        step = self.following(0, timetable)
        while step is not None:
            yield step
            step = self.following(step, timetable)


def next_event(events: dict[str, Interval], step: int, timetable: EpochSchedule) -> str:
    """Return the event that is due next, as "evaluation at 200"; "" where the end comes first."""
    found = [(at, name) for name, due in events.items() if (at := due.following(step, timetable)) is not None]
    return "{1} at {0:,}".format(*min(found)) if found else ""
