"""The report of a run as one HTML file; its script adds a cursor on the curves and a slider over the previews."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from anima_train.core.files import write_text
from anima_train.core.format import count, readable, readable_time
from anima_train.reports import charts
from anima_train.reports.charts import Line, chart, line_of
from anima_train.reports.dataset import evenly
from anima_train.reports.html import bars, bulleted, document, note, table, text
from anima_train.reports.run import PREVIEW_SIDE, Evaluated, Metrics, Preview, RunReport, Share, collect_run
from anima_train.reports.series import MAX_POINTS, Series
from anima_train.training.metrics import T_BINS

MAX_ROWS = 20  # of a table of evaluations, and of a histogram
MAX_NAMED = 10  # samples seen least, and most

STYLE = f"""{charts.STYLE}
pre {{ white-space: pre-wrap; font: 13px/1.45 ui-monospace, monospace }}
summary {{ cursor: pointer; color: var(--faint) }}
.timeline .pictures {{ flex-wrap: nowrap; overflow-x: auto; padding-bottom: .6rem }}
.timeline figure {{ width: auto; flex: none }} .timeline img {{ display: block; max-width: {PREVIEW_SIDE}px }}
.control {{ display: flex; gap: 1rem; align-items: center }} .control input[type=range] {{ flex: 1; max-width: 30rem }}
.pair .bar + .bar {{ margin-top: 2px; background: var(--c1) }} .readout {{ min-height: 1.5em; margin: 0 }}
"""

SCRIPT = """
"use strict";
for (const svg of document.querySelectorAll("svg.chart")) {
  const { left, right, low, high, log, width, height } = Object.fromEntries(
    Object.entries(svg.dataset).map(([key, value]) => [key, Number(value)]));
  const cursor = svg.querySelector(".cursor"), lines = [...svg.querySelectorAll("polyline")];
  const readout = svg.parentNode.appendChild(document.createElement("p"));
  readout.className = "note readout";
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
    const wanted = (event.clientX - box.left) * view.width / box.width + view.x;
    const nearest = new Map();
    for (const line of lines) for (const point of line.points) {
      const found = nearest.get(line.dataset.name);
      if (!found || Math.abs(point.x - wanted) < Math.abs(found.x - wanted)) nearest.set(line.dataset.name, point);
    }
    const words = [...nearest].map(([name, point]) => {
      const part = 1 - point.y / height;
      const value = log ? low * (high / low) ** part : low + (high - low) * part;
      const step = Math.round(left + (right - left) * point.x / width);
      cursor.setAttribute("d", `M${point.x} 0V${height}`);
      return `${name}: ${Number(value.toPrecision(4))} at step ${step.toLocaleString("en")}`;
    });
    readout.textContent = words.join(", ");
  });
}
for (const part of document.querySelectorAll(".timeline")) {
  const figures = [...part.querySelectorAll("figure")];
  const steps = [...new Set(figures.map((figure) => Number(figure.dataset.step)))].sort((a, b) => a - b);
  if (steps.length < 2) continue;
  const control = document.createElement("p"), slider = document.createElement("input");
  const label = document.createElement("span"), all = document.createElement("label");
  const box = document.createElement("input");
  control.className = "control";
  Object.assign(slider, { type: "range", min: 0, max: steps.length - 1, value: steps.length - 1 });
  slider.setAttribute("aria-label", "step of the previews");
  box.type = "checkbox";
  all.append(box, " all steps");
  control.append(slider, label, all);
  part.prepend(control);
  const show = () => {
    label.textContent = `step ${steps[slider.value].toLocaleString("en")}`;
    slider.disabled = box.checked;
    for (const figure of figures) figure.hidden = !box.checked && Number(figure.dataset.step) !== steps[slider.value];
  };
  slider.addEventListener("input", show);
  box.addEventListener("input", show);
  show();
}
"""


def write_run_report(run: Path, page: Path | None = None) -> Path:
    """Write the report of a run, by default into its folder; returns the page's path.

    Raises:
        ConfigError: the folder holds no run.
        SpaceError: the disk is full; an earlier page is intact.
    """
    page = page or run / "report.html"
    write_text(page, render_run(collect_run(run)))
    return page


def render_run(report: RunReport) -> str:
    """The whole page, the same for the same report."""
    metrics = report.metrics
    parts = [
        overview_part(report),
        bulleted("Notes", report.notes),
        bulleted("Warnings of the run", report.warnings),
        loss_part(metrics),
        t_part(metrics.first_by_t, metrics.last_by_t),
        *(evaluation_part(name, points) for name, points in report.evaluations.items()),
        optimizer_part(metrics),
        cost_part(metrics),
        previews_part(report.previews, report.num_previews),
        data_part(report.buckets, report.seen),
        manifest_part(report.manifest),
        config_part(report.config),
    ]
    return document(f"Run {report.name}", parts, STYLE, SCRIPT)


# What the run did


def number_text(value: float) -> str:
    """A number as tables show it; empty where there is none."""
    return f"{value + 0.0:.5g}" if math.isfinite(value) else ""  # + 0.0: -0 is 0


def overview_part(report: RunReport) -> str:
    """The run in a few lines."""
    metrics, curves = report.metrics, report.metrics.curves
    rows = [
        ("steps", f"{metrics.num_steps:,}"),
        ("epochs begun", f"{metrics.num_epochs:,}"),
        ("images seen", f"{metrics.num_examples:,}"),
    ]
    if metrics.seconds:
        speed = metrics.num_examples / metrics.seconds
        rows.append(("time", f"{readable_time(metrics.seconds)}, {speed:.3g} images/s, evaluation and saving included"))
    if "loss" in curves:
        rows.append(("loss, averaged, at the end", number_text(curves["loss"].average.value)))
    if "memory_bytes" in curves and math.isfinite(curves["memory_bytes"].last):
        rows.append(("memory at most", readable(curves["memory_bytes"].last)))
    for name, points in report.evaluations.items():
        best = min(points, key=lambda point: (math.isnan(point.loss), point.loss))
        rows.append((f"lowest loss on {name}", f"{number_text(best.loss)} at step {best.step:,}"))
    return "<h2>Overview</h2>\n" + table(("", ""), rows)


def gaps_note(series: Series) -> str:
    """How many numbers of a curve are none; nothing if all are."""
    if not series.num_gaps:
        return ""
    values = count(series.num_gaps, "value is", "values are")
    return note(f"{values} not finite (NaN or infinite), from step {series.first_gap:,} on: marked in red.")


def smoothing_note(metrics: Metrics) -> str:
    """What the lines of averages mean."""
    each = metrics.curves["loss"].values_per_point
    thinned = f" A point stands for {each:,} steps: their lowest and highest value, at most {MAX_POINTS:,} points."
    return note(
        f"Line: exponential moving average over about {metrics.window:.0f} steps (decay {1 - 1 / metrics.window:.4f}), "
        f"bias-corrected. Faint: the values themselves.{thinned if each > 1 else ''}"
    )


def loss_part(metrics: Metrics) -> str:
    """The loss, and the loss of each role."""
    curves = metrics.curves
    if "loss" not in curves:
        return "<h2>Loss</h2>\n" + note("No step was logged.")
    roles = [(key, curves[key]) for key in sorted(curves) if key.startswith("loss/")]
    parts = ["<h2>Loss</h2>", chart("loss", [line_of("loss", curves["loss"])]), gaps_note(curves["loss"])]
    parts += [
        smoothing_note(metrics),
        "<h3>The average alone</h3>",
        chart("loss, averaged", [average_of("loss", curves["loss"])]),
    ]
    if roles:
        lines = [average_of(key.removeprefix("loss/"), series) for key, series in roles]
        parts += ["<h3>By role</h3>", chart("loss by role", lines)]
        rows = [(line.name, number_text(series.average.value)) for line, (_, series) in zip(lines, roles, strict=True)]
        parts.append(table(("role", "averaged, at the end"), rows))
    return "\n".join(parts)


def average_of(name: str, series: Series) -> Line:
    """A series as its average alone."""
    return Line(name, [(point.step, point.smooth) for point in series.points])


def t_part(first: Sequence[Share], last: Sequence[Share]) -> str:
    """The loss by noise level, at the beginning and at the end of the run; nothing where it was not logged."""
    means = [share.mean for share in (*first, *last) if share.num_samples]
    if not means:
        return ""
    largest = max(means) or 1.0
    rows = []
    for place, (before, after) in enumerate(zip(first, last, strict=True)):
        change = f"{after.mean / before.mean - 1:+.1%}" if before.total and after.num_samples else ""
        widths = (100 * share.mean / largest if share.num_samples else 0 for share in (before, after))
        both = "".join(f'<div class="bar" style="width:{max(0, width):.1f}%"></div>' for width in widths)
        rows.append(
            f"<tr><td>{place / T_BINS:.1f} to {(place + 1) / T_BINS:.1f}</td>"
            + "".join(
                f'<td class="n">{number_text(share.mean)}</td><td class="n">{share.num_samples:,}</td>'
                for share in (before, after)
            )
            + f'<td class="n">{change}</td><td class="b pair">{both}</td></tr>'
        )
    headings = ("t", "first quarter", "samples", "last quarter", "samples", "change", "")
    return "\n".join(
        [
            "<h3>By t</h3>",
            '<p class="legend"><span><i class="c0"></i>first quarter of the run</span>'
            '<span><i class="c1"></i>last quarter</span></p>',
            "<table>\n<tr>" + "".join(f"<th>{heading}</th>" for heading in headings) + "</tr>",
            "\n".join(rows),
            "</table>",
            note("Mean loss of the samples of each quarter, by noise level: t = 0 is the image, t = 1 is noise."),
        ]
    )


def evaluation_part(name: str, points: Sequence[Evaluated]) -> str:
    """The evaluations of one set."""
    shown = [*evenly(points[:-1], MAX_POINTS - 1), points[-1]]
    listed = [*evenly(points[:-1], MAX_ROWS - 1), points[-1]]
    bands = [(point.step, point.difference - point.error, point.difference + point.error) for point in shown]
    parts = [
        f"<h2>Evaluation on {text(name)}</h2>",
        chart(f"loss on {name}", [Line("loss", [(point.step, point.loss) for point in shown])]),
    ]
    if any(math.isfinite(point.difference) for point in points):
        difference = Line("difference", [(point.step, point.difference) for point in shown], bands)
        parts += [
            "<h3>Difference from the base model</h3>",
            chart(f"difference from base on {name}", [difference], from_zero=True),
            note("Below zero is better than the base. Band: one standard error to either side, over samples."),
        ]
    rows = [
        (point.step, *map(number_text, (point.loss, point.difference, point.error)), *quantile_texts(point, points))
        for point in listed
    ]
    quantiles = [f"q {quantile}" for quantile in points[-1].quantiles]
    parts.append(table(("step", "loss", "difference", "standard error", *quantiles), rows))
    left_out = len(points) - len(listed)
    parts.append(note(f"{left_out:,} evaluations are left out of this table.") if left_out else "")
    if quantiles:
        parts.append(note("q 0.10 to q 0.90: the loss at these quantiles of the distribution of t."))
    return "\n".join(parts)


def quantile_texts(point: Evaluated, points: Sequence[Evaluated]) -> list[str]:
    """The loss at each quantile that the last evaluation has."""
    return [number_text(point.quantiles.get(quantile, math.nan)) for quantile in points[-1].quantiles]


def optimizer_part(metrics: Metrics) -> str:
    """Learning rates and gradient norm."""
    curves = metrics.curves
    rates = [(key.removeprefix("lr/"), curves[key]) for key in curves if key.startswith("lr/")]
    if not rates and "lr" in curves:
        rates = [("all", curves["lr"])]
    parts = []
    if rates:
        # The highest of each point's steps: there is nothing to average.
        lines = [Line(name, [(point.step, point.high) for point in series.points]) for name, series in rates]
        parts += ["<h2>Learning rate</h2>", chart("learning rate", lines, from_zero=True)]
        rows = [(name, *map(number_text, (highest(series), series.last))) for name, series in rates]
        parts.append(table(("component", "at most", "at the end"), rows))
    if "grad_norm" in curves:
        norm = curves["grad_norm"]
        parts += ["<h2>Gradient norm</h2>", chart("gradient norm", [line_of("gradient norm", norm)]), gaps_note(norm)]
        parts.append(note("Before clipping. A step whose norm is not finite is not applied."))
    return "\n".join(parts)


def highest(series: Series) -> float:
    """The highest value of a curve; NaN if none is finite."""
    return max((point.high for point in series.points if math.isfinite(point.high)), default=math.nan)


def cost_part(metrics: Metrics) -> str:
    """Throughput and memory."""
    parts = []
    if "speed" in metrics.curves:
        lines = [line_of("images per second", metrics.curves["speed"])]
        parts += ["<h2>Throughput, images per second</h2>", chart("images per second", lines, from_zero=True)]
        parts.append(note("From step to step, all processes together; evaluation and saving count for the next step."))
    if "memory_bytes" in metrics.curves:
        points = metrics.curves["memory_bytes"].points
        line = Line("GiB", [(point.step, point.high / 2**30) for point in points])
        parts += ["<h2>Memory, GiB</h2>", chart("memory in GiB", [line], from_zero=True)]
        parts.append(
            note("The most until then: on a GPU what tensors took in training, on the CPU that of the whole process.")
        )
    return "\n".join(parts)


def previews_part(previews: Sequence[Preview], num_previews: int) -> str:
    """The pictures generated during the run, a row for each prompt; nothing if there are none."""
    if not previews:
        return ""
    rows = []
    for name, row in groupby(previews, lambda preview: preview.name):
        figures = "\n".join(
            f'<figure data-step="{preview.step}"><img alt="{text(name)} at step {preview.step:,}" '
            f'src="data:image/jpeg;base64,{preview.jpeg}"><figcaption>step {preview.step:,}</figcaption></figure>'
            for preview in row
        )
        rows.append(f'<h3>{text(name)}</h3>\n<div class="pictures">\n{figures}\n</div>')
    shown = note(f"{len(previews):,} of {num_previews:,} are shown.")
    return f'<h2>Previews</h2>\n{shown}\n<div class="timeline">\n' + "\n".join(rows) + "\n</div>"


# What it did it with


def data_part(buckets: Sequence[tuple[str, int]], seen: Sequence[tuple[str, int]]) -> str:
    """What was seen of the data; nothing where it is not known."""
    parts = []
    if buckets:
        parts += ["<h2>Samples seen by bucket</h2>", bars(buckets)]
    if seen:
        parts += [
            "<h2>How often each sample was seen</h2>",
            note(f"{len(seen):,} samples. An image at two resolutions counts twice."),
            bars(histogram([times for _, times in seen])),
            "<h3>Seen least</h3>",
            table(("sample", "times"), seen[:MAX_NAMED]),
            "<h3>Seen most</h3>",
            table(("sample", "times"), seen[::-1][:MAX_NAMED]),
        ]
    return "\n".join(parts)


def histogram(times: Sequence[int]) -> list[tuple[str, int]]:
    """(how often, number of samples); in equal ranges where there are many different numbers."""
    found = Counter(times)
    if len(found) <= MAX_ROWS:
        return [(f"{number:,} times", found[number]) for number in sorted(found)]
    low, width = min(found), math.ceil((max(found) - min(found) + 1) / MAX_ROWS)
    ranges = Counter((number - low) // width for number in times)
    return [
        (f"{low + place * width:,} to {low + (place + 1) * width - 1:,} times", ranges[place])
        for place in range(max(ranges) + 1)
    ]


def manifest_part(manifest: Mapping[str, Any]) -> str:
    """The manifest: single facts in a table, and a table for each fact that is one."""
    if not manifest:
        return ""
    single = {key: value for key, value in manifest.items() if not is_table(value)}
    parts = ["<h2>Manifest</h2>", table(("", ""), [(key, fact_text(value)) for key, value in single.items()])]
    for key, value in manifest.items():
        if is_table(value):
            parts += [f"<h3>{text(key)}</h3>", fact_table(value)]
    return "\n".join(parts)


def is_table(value: object) -> bool:
    """Whether a fact has parts with names."""
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(each, dict) for each in value))


def fact_table(value: Any) -> str:
    """An object, or a list of them: a row for each entry."""
    entries = list(value.items()) if isinstance(value, dict) else [("", each) for each in value]
    keys = list(dict.fromkeys(key for _, each in entries if isinstance(each, dict) for key in each))
    rows = [
        (name, *(fact_text(each.get(key, "")) for key in keys))
        if isinstance(each, dict)
        else (name, fact_text(each), *("" for _ in keys[1:]))
        for name, each in entries
    ]
    return table(("", *(keys or [""])), rows)


def fact_text(value: object) -> object:
    """A fact for a cell of a table."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else value


def config_part(config: str) -> str:
    """The resolved config."""
    if not config:
        return ""
    lines = "\n".join(text(line) for line in config.splitlines())
    summary = "<summary>config.toml, every default in it; paths without their folders</summary>"
    return f"<h2>Config</h2>\n<details open>{summary}<pre>{lines}</pre></details>"
