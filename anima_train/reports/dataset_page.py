"""The report of a dataset as one HTML file without scripts, made from `check.html`."""

from collections.abc import Sequence

from anima_train.model.text import MAX_TOKENS
from anima_train.reports.charts import Line, chart
from anima_train.reports.dataset import Bucket, DatasetReport
from anima_train.reports.html import TEMPLATES
from anima_train.training.summary import lr_text

BIN = 32  # tokens


def render(report: DatasetReport) -> str:
    """Return the whole page, the same for the same report."""
    lr = Line("learning rate", [(step + 1, 100 * factor) for step, factor in report.curve])
    return TEMPLATES.get_template("check.html").render(
        title=report.title,
        report=report,
        lr_chart=chart("learning rate in percent", [lr], from_zero=True),
        exposures=[(f"{times:,} times", number) for times, number in report.exposures],
        bucket_rows=bucket_rows,
        histogram=histogram,
        lr_text=lr_text,
        max_tokens=MAX_TOKENS,
    )


def bucket_rows(buckets: Sequence[Bucket]) -> list[tuple[str, int]]:
    """Return (size, number of images) for each bucket."""
    return [(f"{bucket.size} ({bucket.resolution} px)", bucket.num_images) for bucket in buckets]


def histogram(lengths: Sequence[int]) -> list[tuple[str, int]]:
    """Return (range, number) for ranges of `BIN` tokens up to the last that is needed, and for lengths cut off."""
    needed = [length for length in lengths if length <= MAX_TOKENS]
    tops = range(BIN, max(needed, default=0) + BIN, BIN)
    rows = []
    for top in tops:
        number = sum(top - BIN < max(length, 1) <= top for length in needed)
        rows.append((f"{0 if top == BIN else top - BIN + 1} to {top}", number))
    over = len(lengths) - len(needed)
    return [*rows, (f"over {MAX_TOKENS}", over)] if over else rows
