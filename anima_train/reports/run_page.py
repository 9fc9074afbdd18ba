"""The report of a run as one HTML file, made from `run.html`."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from anima_train.core.files import write_text
from anima_train.reports.charts import Line, chart, line_of
from anima_train.reports.checkpoints_page import band_line, kinds_chart, parts_chart, tradeoff
from anima_train.reports.evaluations import Evaluated, Scores, UpdateNorm
from anima_train.reports.html import TEMPLATES
from anima_train.reports.run import Preview, RunReport, collect_run
from anima_train.reports.series import MAX_POINTS, Series, evenly_to_last
from anima_train.reports.strengths import StrengthsReport, read_strengths

MAX_RANGES = 20  # of a histogram


def write_run_report(run: Path, page: Path | None = None, found: RunReport | None = None) -> Path:
    """Write the report of a run, by default into its folder; return the page's path.

    Args:
        run: its folder.
        page: the file to write.
        found: the report, if it was collected already.

    Raises:
        ConfigError: the folder holds no run.
        SpaceError: the disk is full; an earlier page is intact.
    """
    page = page or run / "report.html"
    write_text(page, render_run(found or collect_run(run), read_strengths(run)))
    return page


def render_run(report: RunReport, strengths: StrengthsReport | None = None) -> str:
    """Return the whole page, the same for the same report."""
    curves = report.metrics.curves
    roles = {key.removeprefix("loss/"): curves[key] for key in sorted(curves) if key.startswith("loss/")}
    rates = {key.removeprefix("lr/"): series for key, series in curves.items() if key.startswith("lr/")}
    if not rates and "lr" in curves:
        rates = {"all": curves["lr"]}
    rows = preview_rows(report.previews)
    return TEMPLATES.get_template("run.html").render(
        title=f"Run {report.name}",
        report=report,
        metrics=report.metrics,
        curves=curves,
        roles=roles,
        rates=rates,
        strengths=strengths,
        charts=run_charts(curves, roles, rates, report.updates, report.scores),
        facts=[(key, fact_text(value)) for key, value in report.manifest.items() if not is_table(value)],
        fact_tables=[(key, *fact_table(value)) for key, value in report.manifest.items() if is_table(value)],
        max_points=MAX_POINTS,
        difference_chart=difference_chart,
        evenly_to_last=evenly_to_last,
        histogram=histogram,
        kinds_chart=kinds_chart,
        loss_chart=loss_chart,
        lowest_loss=lowest_loss,
        parts_chart=parts_chart,
        preview_rows=rows,
        tradeoff=tradeoff(report.checkpoints, report.best, rows, report.scores),
    )


def preview_rows(previews: Sequence[Preview]) -> list[list[Preview]]:
    """Return the pictures that were drawn from the same settings, in rows."""
    rows: dict[tuple[str, str, str], list[Preview]] = defaultdict(list)
    for preview in previews:
        rows[preview.name, preview.prompt, preview.settings].append(preview)
    return list(rows.values())


# Curves


def run_charts(
    curves: Mapping[str, Series],
    roles: Mapping[str, Series],
    rates: Mapping[str, Series],
    updates: Mapping[str, Sequence[UpdateNorm]],
    scores: Scores | None,
) -> dict[str, Markup]:
    """Return the charts of those curves that there are, by key."""
    found = {}
    if "loss" in curves:
        found["loss"] = chart("loss", [line_of("loss", curves["loss"])])
        found["average"] = chart("loss, averaged", [average_of("loss", curves["loss"])])
    if roles:
        found["roles"] = chart("loss by role", [average_of(name, series) for name, series in roles.items()])
    if rates:
        found["rates"] = chart("learning rate", [highest_of(*item) for item in rates.items()], from_zero=True)
    if updates:
        shown = {component: evenly_to_last(points, MAX_POINTS) for component, points in updates.items()}
        lines = [Line(key, [(each.step, each.relative) for each in points]) for key, points in shown.items()]
        found["updates"] = chart("update relative to the base weights", lines, from_zero=True)
    if scores is not None:
        found["scores"] = chart(scores.judge, [band_line(scores.judge, list(scores.means.items()))])
    if "grad_norm" in curves:
        found["grad_norm"] = chart("gradient norm", [line_of("gradient norm", curves["grad_norm"])])
    if "speed" in curves:
        found["speed"] = chart("images per second", [line_of("images per second", curves["speed"])], from_zero=True)
    if "memory_bytes" in curves:
        memory = highest_of("GiB", curves["memory_bytes"], unit=2**30)
        found["memory_bytes"] = chart("memory in GiB", [memory], from_zero=True)
    return found


def average_of(name: str, series: Series) -> Line:
    """Return a series as its average alone."""
    return Line(name, [(point.step, point.smooth) for point in series.points])


def highest_of(name: str, series: Series, unit: float = 1) -> Line:
    """Return a series as the highest of each point's values, where there is nothing to average."""
    return Line(name, [(point.step, point.high / unit) for point in series.points])


def loss_chart(name: str, points: Sequence[Evaluated]) -> Markup:
    """Return the chart of a set's loss, of a T-LoRA also as it is trained."""
    shown = evenly_to_last(points, MAX_POINTS)
    lines = [Line("loss", [(point.step, point.loss) for point in shown])]
    if math.isfinite(points[-1].as_trained):
        lines.append(Line("loss as trained", [(point.step, point.as_trained) for point in shown]))
    return chart(f"loss on {name}", lines)


def difference_chart(name: str, points: Sequence[Evaluated]) -> Markup:
    """Return the chart of the difference from the base, with its standard error."""
    shown = evenly_to_last(points, MAX_POINTS)
    bands = [(point.step, point.difference - point.error, point.difference + point.error) for point in shown]
    line = Line("difference", [(point.step, point.difference) for point in shown], bands)
    return chart(f"difference from base on {name}", [line], from_zero=True)


# Tables


def lowest_loss(points: Sequence[Evaluated]) -> Evaluated:
    """Return the evaluation with the lowest loss, the first of equals."""
    return min(points, key=lambda point: (math.isnan(point.loss), point.loss))


def histogram(times: Sequence[int]) -> list[tuple[str, int]]:
    """Return (times seen, number of samples), in equal ranges where there are many different numbers."""
    found = Counter(times)
    if len(found) <= MAX_RANGES:
        return [(f"{number:,} times", found[number]) for number in sorted(found)]
    low, width = min(found), math.ceil((max(found) - min(found) + 1) / MAX_RANGES)
    ranges = Counter((number - low) // width for number in times)
    return [
        (f"{low + place * width:,} to {low + (place + 1) * width - 1:,} times", ranges[place])
        for place in range(max(ranges) + 1)
    ]


def is_table(value: object) -> bool:
    """Return True if a fact of the manifest has parts with names."""
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(each, dict) for each in value))


def fact_table(value: Any) -> tuple[list[str], list[list[object]]]:
    """Return headings and rows for an object, or for a list of them: a row for each entry."""
    entries = list(value.items()) if isinstance(value, dict) else [("", each) for each in value]
    keys = list(dict.fromkeys(key for _, each in entries if isinstance(each, dict) for key in each)) or [""]
    plain = [(name, each if isinstance(each, dict) else {keys[0]: each}) for name, each in entries]
    return ["", *keys], [[name, *(fact_text(each.get(key, "")) for key in keys)] for name, each in plain]


def fact_text(value: object) -> object:
    """Return a fact for a cell of a table."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else value
