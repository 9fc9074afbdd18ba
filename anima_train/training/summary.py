"""The text that tells, before the first step, what a run will do."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from anima_train.config.config import Config
from anima_train.config.load import LoadedConfig
from anima_train.core.format import count, listed, printable, readable
from anima_train.data.plan import Plan, Timetable, batch_size_for, short_by
from anima_train.data.scan import Scan
from anima_train.model.loading import ModelFiles
from anima_train.optim.groups import GroupRow
from anima_train.training.build import (
    disk_plan,
    file_sizes,
    group_rows,
    make_plan,
    make_timetable,
    trainable_transformer,
)


def lr_text(row: GroupRow) -> str:
    """A component's learning rate, as tables show it."""
    return "frozen" if row.lr == 0 else f"{row.lr:g}" if row.num_parameters else "-"


@dataclass(frozen=True)
class Report:
    """Lines for the person at the terminal."""

    lines: Sequence[str]

    def __str__(self) -> str:
        return "\n".join(map(printable, self.lines))


def groups_text(rows: Iterable[GroupRow]) -> list[str]:
    """The groups as a table."""
    lines = [f"{'component':<12} {'lr':>10} {'modules':>8} {'parameters':>14}"]
    total_modules = total_parameters = 0
    for row in rows:
        lines.append(f"{row.component:<12} {lr_text(row):>10} {row.num_modules:>8,} {row.num_parameters:>14,}")
        total_modules += row.num_modules
        total_parameters += row.num_parameters
    lines.append(f"{'total':<12} {'':>10} {total_modules:>8,} {total_parameters:>14,}")
    return lines


def data_text(name: str, found: Scan) -> list[str]:
    """What a scan found."""
    pictures = {sample.picture.path for sample in found.samples}
    lines = [f"dataset {name}: {count(len(pictures), 'image')} of {found.num_images:,} found"]
    for title, items in (
        ("cannot be used", found.bad),
        ("set aside by a setting", found.skipped),
        ("warning", found.warnings),
    ):
        lines.extend(f"  {title}: {line}" for line in listed(items))
    return lines


def plan_text(plan: Plan, timetable: Timetable, config: Config) -> list[str]:
    """Buckets, batches and steps."""
    epochs = config.epochs
    lines = [f"{'bucket':<12} {'images':>8} {'batch':>6} {'short by':>9}"]
    buckets = Counter((sample.resolution, sample.size) for sample in plan.samples)
    draws = plan.draws(0)
    for (resolution, size), number in sorted(buckets.items()):
        batch = batch_size_for(plan.batch_sizes, resolution)
        lines.append(f"{size!s:<12} {number:>8,} {batch:>6} {short_by(len(draws[resolution, size]), batch):>9}")
    steps = plan.steps_in(0)
    ending = (
        "max_steps" if epochs is None or timetable.num_steps < timetable.first_steps[-1] else count(epochs, "epoch")
    )
    lines.append(f"{count(steps, 'step')} in the first epoch; {count(timetable.num_steps, 'step')} in all ({ending})")
    if config.ema is not None and config.ema.decay_after(timetable.num_steps) < config.ema.decay:
        lines.append(
            f"note: ema.decay: {config.ema.decay} is not reached in {count(timetable.num_steps, 'step')}: the average "
            "covers about the last ninth of the steps, and a larger one would change nothing"
        )
    return lines


def report(loaded: LoadedConfig, files: ModelFiles, scans: dict[str, Scan], num_processes: int) -> Report:
    """What the run would do."""
    rates = loaded.config.learning_rates()
    plan = make_plan(loaded, scans["train"].samples, num_processes)
    lines = [f"note: {note}" for note in loaded.notes]
    for name, found in scans.items():
        lines.extend(data_text(name, found))
    timetable = make_timetable(loaded, plan)
    lines.extend(plan_text(plan, timetable, loaded.config))
    transformer = trainable_transformer(loaded, files)
    lines.extend(groups_text(group_rows(transformer, rates)))
    planned = disk_plan(loaded, file_sizes(loaded, files), plan, timetable)
    lines.append(f"files: {planned.described()}: {readable(planned.num_bytes)} in all")
    if warning := planned.warning(loaded.config.keep_last):
        lines.append(f"warning: {warning}")
    return Report(lines)
