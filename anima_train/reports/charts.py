"""Curves over steps as SVG inside a page; all text in what is marked as markup goes through `text`."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from anima_train.reports.html import text
from anima_train.reports.series import Series

WIDTH, HEIGHT = 640, 180
NUM_COLOURS = 8  # in charts.css
NUM_TICKS = 5
LOG_RATIO = 50  # of the highest value and the median: with more, a linear axis shows nothing but the highest

Place = tuple[float, float]


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
            return found
        rough = (self.high - self.low) / NUM_TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough)
        return [n * step for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


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
        return Markup(f'<p class="note">{text(label)}: no finite number was logged.</p>')
    first, last = min(steps), max(steps)
    x_axis = Axis(first, max(last, first + 1), WIDTH)
    y_axis = value_axis(values, from_zero)
    grid = "".join(f"M0 {HEIGHT - y_axis.place(tick):.1f}H{WIDTH}" for tick in y_axis.ticks())
    drawn = [curve(line, place % NUM_COLOURS, x_axis, y_axis) for place, line in enumerate(lines)]
    labels = [
        f'<text x="-6" y="{HEIGHT - y_axis.place(tick) + 4:.1f}" text-anchor="end">{tick or 0.0:.4g}</text>'
        for tick in y_axis.ticks()
    ] + [
        f'<text x="{x_axis.place(tick):.1f}" y="{HEIGHT + 16}" text-anchor="middle">{tick:,.0f}</text>'
        for tick in x_axis.ticks()
        if tick == int(tick)
    ]
    return Markup(
        f'<div class="graph">{legend(lines) if len(lines) > 1 else ""}'
        f'<svg class="chart" role="img" aria-label="{text(label)}" viewBox="-60 -8 {WIDTH + 80} {HEIGHT + 30}" '
        f'data-left="{x_axis.low:.0f}" data-right="{x_axis.high:.0f}" data-low="{y_axis.low!r}" '
        f'data-high="{y_axis.high!r}" data-log="{int(y_axis.is_log)}" data-width="{WIDTH}" data-height="{HEIGHT}">'
        f'<path d="{grid}"/><path d="M0 0V{HEIGHT}H{WIDTH}"/>{"".join(drawn)}{"".join(labels)}'
        f'<path class="cursor" d="M0 0"/></svg>{LOG_NOTE if y_axis.is_log else ""}</div>'
    )


LOG_NOTE = '<p class="note">The axis is logarithmic.</p>'


def legend(lines: Sequence[Line]) -> str:
    """Return the name of each colour."""
    items = (
        f'<span><i class="c{place % NUM_COLOURS}"></i>{text(line.name)}</span>' for place, line in enumerate(lines)
    )
    return f'<p class="legend">{"".join(items)}</p>'


def curve(line: Line, colour: int, x_axis: Axis, y_axis: Axis) -> str:
    """Return a curve over its band, and the marks below it."""

    def at(step: int, value: float) -> str:
        return f"{x_axis.place(step):.2f},{HEIGHT - y_axis.place(value):.2f}"

    parts = []
    for stretch in stretches(line.band):
        corners = [at(step, high) for step, _, high in stretch] + [at(step, low) for step, low, _ in stretch[::-1]]
        parts.append(f'<polygon class="c{colour}" points="{" ".join(corners)}"/>')
    for stretch in stretches(line.points):
        places = [at(step, value) for step, value in stretch]
        parts.append(
            f'<polyline class="c{colour}" data-name="{text(line.name)}" points="{" ".join(places)}"/>'
            + "".join(dot(place, colour) for place in places if len(places) == 1)
        )
    marks = "".join(f"M{x_axis.place(step):.1f} {HEIGHT - 6}V{HEIGHT}" for step in line.marks)
    return "".join(parts) + (f'<path class="mark" d="{marks}"/>' if marks else "")


def dot(place: str, colour: int) -> str:
    """Return a point that no line leads to."""
    x, y = place.split(",")
    return f'<circle class="c{colour}" cx="{x}" cy="{y}" r="2.5"/>'


def stretches(points: Sequence[tuple]) -> Iterator[list[tuple]]:
    """Yield the points between gaps; a gap is a point with a number that is not finite."""
    for is_finite, stretch in groupby(points, lambda point: all(map(math.isfinite, point))):
        if is_finite:
            yield list(stretch)
