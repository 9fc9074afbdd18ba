"""Curves over steps, and points in a plane, as SVG inside a page, made from `chart.html` and `plane.html`."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from anima_train.reports.html import TEMPLATES, finalize
from anima_train.reports.series import Series

WIDTH, HEIGHT = 640, 180
PLANE_WIDTH, PLANE_HEIGHT = 420, 260
LABEL = (44, 16)  # width and height that a step takes beside its point
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


# Points in a plane


@dataclass(frozen=True)
class Dot:
    """A point with its standard errors, NaN where they are not known."""

    step: int
    x: float
    y: float
    x_error: float
    y_error: float
    is_marked: bool  # it is drawn full, with its step beside it, and a line leads through those that are
    words: str  # all that is to be told of it


def plane(label: str, x_label: str, y_label: str, dots: Sequence[Dot]) -> Markup:
    """Return points in a plane with zero on both axes; nothing if there is none.

    Args:
        label: for those who do not see the points.
        x_label: the words for the axis to the right.
        y_label: those for the axis upwards.
        dots: the points, whose x and y are finite.
    """
    if not dots:
        return Markup("")
    x_axis = padded_axis([(dot.x, dot.x_error) for dot in dots], PLANE_WIDTH)
    y_axis = padded_axis([(dot.y, dot.y_error) for dot in dots], PLANE_HEIGHT)
    html = TEMPLATES.get_template("plane.html").render(
        label=label, x_label=x_label, y_label=y_label, x_axis=x_axis, y_axis=y_axis, isfinite=math.isfinite,
        dots=sorted(dots, key=lambda dot: dot.is_marked), marked=sorted((d for d in dots if d.is_marked), key=by_place),
        named={dot.step for dot in named_dots(dots, x_axis, y_axis)},
    )  # fmt: skip
    return Markup(html)


def by_place(dot: Dot) -> tuple[float, float]:
    """Return the order of points along a front."""
    return dot.x, dot.y


def padded_axis(values: Iterable[tuple[float, float]], length: int) -> Axis:
    """Return the axis for (value, error), with zero on it and room at its ends."""
    edges = [value + side * (error if math.isfinite(error) else 0) for value, error in values for side in (-1, 1)]
    low, high = min(0.0, *edges), max(0.0, *edges)
    margin = (high - low) / 20 or 1.0
    return Axis(low - margin, high + margin, length)


def named_dots(dots: Sequence[Dot], x_axis: Axis, y_axis: Axis) -> list[Dot]:
    """Return the marked points that have room for their step beside them, the last ones first."""
    found: list[Dot] = []
    for dot in sorted((dot for dot in dots if dot.is_marked), key=lambda dot: -dot.step):
        x, y = x_axis.place(dot.x), y_axis.place(dot.y)
        if all(abs(x - x_axis.place(o.x)) > LABEL[0] or abs(y - y_axis.place(o.y)) > LABEL[1] for o in found):
            found.append(dot)
    return found
