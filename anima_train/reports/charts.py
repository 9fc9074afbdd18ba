"""Curves over steps as SVG inside a page, made from `chart.html`."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from anima_train.reports.html import TEMPLATES, finalize
from anima_train.reports.series import Series

WIDTH, HEIGHT = 640, 180
NUM_COLOURS = 8  # in charts.css
NUM_TICKS = 5
MAX_POWERS = 8  # of ten, on a logarithmic axis
MAX_DIGITS = 17  # what a float holds
LOG_RATIO = 50  # of the highest value and the median: with more, a linear axis shows nothing but the highest


@dataclass(frozen=True)
class Line:
    """A curve; values that are not finite are gaps."""

    name: str
    points: Sequence[tuple[int, float]]  # (step, value), by step
    band: Sequence[tuple[int, float, float]] = ()  # (step, low, high)
    marks: Sequence[int] = ()  # steps that are marked below the curve


def line_of(name: str, series: Series) -> Line:
    """Return a series as its average, with its extremes as the band and marks where a value is not finite."""
    points = series.points
    return Line(
        name,
        [(point.step, point.smooth) for point in points],
        [(point.step, point.low, point.high) for point in points],
        [point.step for point in points if point.has_gap],
    )


@dataclass(frozen=True)
class Axis:
    """The mapping from values to places on the page."""

    low: float
    high: float
    length: int
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return the place of a value, from 0 to `length`."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low) * self.length
        return (value - self.low) / (self.high - self.low) * self.length

    def ticks(self) -> list[float]:
        """Return round values on the axis."""
        powers = [10.0**n for n in range(math.floor(math.log10(self.low)), 40)] if self.is_log else []
        found = [power for power in powers if self.low <= power <= self.high]
        if len(found) > 1:
            return found[:: math.ceil(len(found) / MAX_POWERS)]
        rough = (self.high - self.low) / NUM_TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough)
        return [n * step for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]

    def labels(self) -> list[tuple[float, str]]:
        """Return (value, text) of each tick, with the digits by which they differ."""
        ticks = [tick or 0.0 for tick in self.ticks()]  # -0 is 0
        for digits in range(4, MAX_DIGITS + 1):
            texts = [f"{tick:.{digits}g}" for tick in ticks]
            if len(set(texts)) == len(ticks):
                break
        return list(zip(ticks, texts, strict=True))


def value_axis(values: Iterable[float], from_zero: bool) -> Axis:
    """Return the axis for these values; logarithmic where a few are far above all others."""
    found = sorted(filter(math.isfinite, values)) or [0.0]
    low, high = found[0], found[-1]
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
    elif low > 0 and high > LOG_RATIO * found[len(found) // 2]:
        return Axis(low, high, HEIGHT, is_log=True)
    if high - low <= max(1e-9 * abs(high), 1e-60):  # all are equal
        margin = abs(high) / 20 if abs(high) > 1e-50 else 1.0
        return Axis(low - margin, high + margin, HEIGHT)
    return Axis(low, high, HEIGHT)


def chart(label: str, lines: Sequence[Line], from_zero: bool = False) -> Markup:
    """Return the curves with axes and, for several, a legend; a sentence where there is nothing to draw.

    Args:
        label: for those who do not see the curves.
        lines: the curves.
        from_zero: zero is on the axis.
    """
    steps = [step for line in lines for step, *_ in (*line.points, *line.band)]
    values = [v for line in lines for v in (*(v for _, v in line.points), *(v for _, *pair in line.band for v in pair))]
    if not any(map(math.isfinite, values)):
        return Markup('<p class="note">{}: no finite number was logged.</p>').format(finalize(label))
    first, last = min(steps), max(steps)
    html = TEMPLATES.get_template("chart.html").render(
        label=label, lines=lines, width=WIDTH, height=HEIGHT, num_colours=NUM_COLOURS,
        x_axis=Axis(first, max(last, first + 1), WIDTH), y_axis=value_axis(values, from_zero),
        bands_of=bands_of, stretches_of=stretches_of,
    )  # fmt: skip
    return Markup(html)


def bands_of(line: Line, x_axis: Axis, y_axis: Axis) -> Iterator[list[str]]:
    """Yield the corners of each part of a curve's band: along its high edge, and back along the low one."""
    for stretch in stretches(line.band):
        edges = [(step, high) for step, _, high in stretch] + [(step, low) for step, low, _ in stretch[::-1]]
        yield [place_of(*corner, x_axis, y_axis) for corner in edges]


def stretches_of(line: Line, x_axis: Axis, y_axis: Axis) -> Iterator[list[str]]:
    """Yield the places of each part of a curve."""
    for stretch in stretches(line.points):
        yield [place_of(step, value, x_axis, y_axis) for step, value in stretch]


def place_of(step: int, value: float, x_axis: Axis, y_axis: Axis) -> str:
    """Return the place of a value in the picture."""
    return f"{x_axis.place(step):.2f},{HEIGHT - y_axis.place(value):.2f}"


def stretches(points: Sequence[tuple]) -> Iterator[list[tuple]]:
    """Yield the points between gaps; a gap is a point with a number that is not finite."""
    for is_finite, stretch in groupby(points, lambda point: all(map(math.isfinite, point))):
        if is_finite:
            yield list(stretch)
