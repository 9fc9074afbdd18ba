"""Numbers of every step, smoothed and thinned as they are read: a run of a million steps takes no more memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from anima_train.core.averages import ExponentialAverage

Item = TypeVar("Item")

MAX_POINTS = 1000  # of a curve
LARGEST = 3.5e38  # of float32: what is beyond is taken for infinite


def evenly(items: Sequence[Item], number: int) -> list[Item]:
    """Return at most that many of the items, spread evenly, the first included."""
    if number >= len(items):
        return list(items)
    return [items[index * len(items) // number] for index in range(number)]


def evenly_to_last(items: Sequence[Item], number: int) -> list[Item]:
    """Return at most that many of the items, spread evenly, the last included."""
    return [*evenly(items[:-1], number - 1), *items[-1:]]


def number(value: object) -> float:
    """Return a number as it was logged; NaN for anything else, and for what float32 does not hold."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= LARGEST:
        return math.nan
    return float(value)


@dataclass(slots=True)
class Point:
    """A point of a curve that stands for neighbouring values; NaN where none of them is finite."""

    step: int  # of the last of them
    low: float = math.nan
    high: float = math.nan
    smooth: float = math.nan  # the average after the last of them
    has_gap: bool = False  # one of them is not finite


class Series:
    """A curve over steps: extremes and average of its values, at most `MAX_POINTS` points for the values announced."""

    def __init__(self, num_values: int, decay: float) -> None:
        self.points: list[Point] = []
        self.values_per_point = max(1, math.ceil(num_values / MAX_POINTS))
        self.average = ExponentialAverage(decay)
        self.num_values = 0
        self.last = math.nan
        self.num_gaps = 0  # values that are not finite
        self.first_gap = 0  # step of the first of them

    @property
    def highest(self) -> float:
        """The highest finite value; NaN if there is none."""
        return max((point.high for point in self.points if math.isfinite(point.high)), default=math.nan)

    def add(self, step: int, value: float) -> None:
        """Append a value."""
        if self.num_values % self.values_per_point == 0:
            self.points.append(Point(step))
        self.num_values += 1
        self.last = value
        point = self.points[-1]
        point.step = step
        if not math.isfinite(value):
            self.first_gap = self.first_gap if self.num_gaps else step
            self.num_gaps += 1
            point.has_gap = True
            return
        self.average.add(value)
        point.low = value if math.isnan(point.low) else min(point.low, value)
        point.high = value if math.isnan(point.high) else max(point.high, value)
        point.smooth = self.average.value
