"""The report of a dataset as one HTML file without scripts, made from `check.html`."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from anima_train.core.format import count, prefixed
from anima_train.core.text_batch import MAX_TOKENS
from anima_train.reports.charts import Line, chart
from anima_train.reports.dataset import Bucket, DatasetReport, RunLength
from anima_train.reports.html import TEMPLATES
from anima_train.training.summary import lr_text

BIN = 32  # tokens


def render(report: DatasetReport) -> str:
    """Return the whole page, the same for the same report."""
    lr = Line("learning rate", [(step + 1, 100 * factor) for step, factor in report.curve])
    return TEMPLATES.get_template("check.html").render(
        title=report.title,
        report=report,
        warnings=list(findings(report)),
        length_rows=length_rows(report.length),
        lr_chart=chart("learning rate in percent", [lr], from_zero=True),
        exposures=[(f"{times:,} times", number) for times, number in report.exposures],
        bucket_rows=bucket_rows,
        histogram=partial(histogram, max_tokens=report.max_tokens),
        lr_text=lr_text,
        max_tokens=report.max_tokens,
    )


def findings(report: DatasetReport) -> Iterator[str]:
    """Yield what to look at first: the warnings, and a line for each list of the page that is one."""
    yield from report.warnings
    if report.memory is not None:
        yield from report.memory.warnings
    for dataset in report.sets:
        found = [
            *dataset.warnings,
            *numbered(len(dataset.bad), "image cannot be used", "images cannot be used"),
            *numbered(len(dataset.damaged), "image is damaged", "images are damaged"),
            *numbered(len(dataset.skipped), "image is skipped", "images are skipped"),
            *(f"{count(len(each.images), 'image')} without {each.described}" for each in dataset.missing),
        ]
        for text in found:
            yield prefixed(f"dataset {dataset.name}: ", text) if len(report.sets) > 1 else text


def numbered(number: int, one: str, several: str) -> list[str]:
    """Return a line that points to a list further down the page; none where that is empty."""
    return [f"{count(number, one, several)}; the list is below"] if number else []


def length_rows(length: RunLength) -> list[tuple[str, str]]:
    """Return (what, number) for the way from images to steps."""
    rows = {
        "images": f"{length.num_images:,}",
        "samples": f"{length.num_samples:,}, an image at each of its resolutions",
        "shown in the first epoch": f"{length.num_shown:,}, with repeats and weights",
        "micro-batches": f"{length.num_micro_batches:,}, each of images of one size",
        "steps in the first epoch": f"{length.steps_in_epoch:,}",
    }
    if length.micro_batches_per_step > 1:
        rows["steps in the first epoch"] += f", each of {length.micro_batches_per_step:,} micro-batches"
    epochs = length.epochs
    ending = "max_steps" if epochs is None else count(epochs, "epoch")
    if epochs is None and length.steps_in_epoch:
        ending += f", about {length.num_steps / length.steps_in_epoch:.3g} epochs"
    return [*rows.items(), ("steps in all", f"{length.num_steps:,} ({ending})")]


def render_refusal(title: str, problems: Iterable[str], found: Iterable[str]) -> str:
    """Return the page of a run that would not start: the reasons, and what else was found, with all of their files."""
    return TEMPLATES.get_template("refusal.html").render(title=title, problems=list(problems), found=list(found))


def bucket_rows(buckets: Sequence[Bucket]) -> list[tuple[str, int]]:
    """Return (size, number of images) for each bucket."""
    return [(f"{bucket.size} ({bucket.resolution} px)", bucket.num_images) for bucket in buckets]


def histogram(lengths: Sequence[int], max_tokens: int = MAX_TOKENS) -> list[tuple[str, int]]:
    """Return (range, number) for ranges of `BIN` tokens up to the last that is needed, and for lengths cut off."""
    needed = [length for length in lengths if length <= max_tokens]
    tops = range(BIN, max(needed, default=0) + BIN, BIN)
    rows = []
    for top in tops:
        number = sum(top - BIN < max(length, 1) <= top for length in needed)
        rows.append((f"{0 if top == BIN else top - BIN + 1} to {top}", number))
    over = len(lengths) - len(needed)
    return [*rows, (f"over {max_tokens}", over)] if over else rows
