"""The findings of `anima check` as lines for the terminal."""

from anima_train.core.format import count, format_bytes, printable
from anima_train.reports.dataset import DatasetReport, SetReport


def summary(found: DatasetReport) -> list[str]:
    """Return the findings of the page that `describe_run` lacks, in a few lines."""
    lines = []
    for item in found.sets:
        facts = item.captions
        lines.append(
            f"captions of {item.name}: {len(facts.lengths):,} different, {len(facts.truncated):,} cut off, "
            f"{len(facts.unknown):,} characters T5 cannot read, {len(facts.typos):,} tags that look mistyped"
        )
        named = {"tags": "of tags", "sentences": "of sentences", "both": "of tags and sentences"}
        made_of = [f"{len(item.kinds[kind]):,} {text}" for kind, text in named.items() if item.kinds[kind]]
        if made_of:
            lines.append(f"images of {item.name} by their captions: {', '.join(made_of)}")
        lines.extend(missing_text(item))
    kinds = ", ".join(f"{cost.number:,} {cost.kind}" for cost in found.cache if cost.number)
    lines.append(f"cache: {kinds}, {format_bytes(sum(cost.num_bytes for cost in found.cache))} in all")
    lines.extend(costs_text(found))
    return lines


def missing_text(found: SetReport) -> list[str]:
    """Return a line about trigger words, if images lack one."""
    lacking = [
        f"{count(len(item.images), 'image')} of directory[{item.directory}] without {item.described}"
        for item in found.missing
    ]
    return [printable(f"trigger words of {found.name}: {'; '.join(lacking)}")] if lacking else []


def costs_text(found: DatasetReport) -> list[str]:
    """Return lines with memory and time of the training set's buckets: measured, or the estimate for the largest."""
    buckets = found.sets[0].buckets
    lines = []
    for bucket in buckets:
        if (measured := bucket.measured) is None:
            continue
        title = f"measured {bucket.size}, batch {bucket.batch_size:,}:"
        if measured.seconds_per_step is None:
            lines.append(f"{title} {measured.described}; what to change, in order of cost: {'; '.join(bucket.savings)}")
        else:
            lines.append(f"{title} {measured.described} a step, {format_bytes(measured.peak_bytes)} of memory at most")
    if not lines:
        memory = max(bucket.memory.total for bucket in buckets if bucket.memory is not None)
        lines.append(f"memory: about {format_bytes(memory)} on the device for the largest bucket (an estimate)")
    if found.run_seconds is not None:
        lines.append(f"the whole run: {found.run_time}")
    return lines
