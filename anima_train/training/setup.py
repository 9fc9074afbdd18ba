"""Everything before the first step that needs no training: the scan, the plan, the groups, and reports of them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from anima_train.adapters.full import Full
from anima_train.config.config import Config
from anima_train.config.load import Dataset, LoadedConfig
from anima_train.core.errors import ConfigError, DataError, count, listed, printable, readable
from anima_train.core.files import Need
from anima_train.data.plan import Plan, Timetable, batch_size_for
from anima_train.data.samples import Sample
from anima_train.data.scan import Scan, scan
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.llm_adapter import LLMAdapter, LLMAdapterShape
from anima_train.model.text import load_tokenizers
from anima_train.optim.groups import GroupRow, LearningRates, group_table, optimizer_groups
from anima_train.tools.dataset_report import DatasetReport, SetReport, collect, short_by
from anima_train.tools.report_costs import Measured, ModelStats, total_bytes
from anima_train.tools.report_html import duration_text, lr_text
from anima_train.training.model import DTYPES, ModelFiles, load_transformer
from anima_train.training.space import Writings, file_sizes, first_needs, space_warning, writings
from anima_train.training.texts import has_live_texts


def scan_dataset(dataset: Dataset, seed: int, write: bool) -> Scan:
    """Look at every image of a dataset; see `data.scan.scan`."""
    return scan(dataset.settings, dataset.folders, dataset.masks, dataset.caches, seed, write, dataset.offline)


def scan_all(loaded: LoadedConfig, write: bool) -> dict[str, Scan]:
    """Look at every image of the training set and the evaluation sets.

    Raises:
        DataError: a set is empty, or too many of its images are bad; for all sets at once.
    """
    scans = {}
    problems: list[str] = []
    for dataset in (loaded.train, *loaded.evals):
        try:
            scans[dataset.name] = scan_dataset(dataset, loaded.config.seed, write)
            scans[dataset.name].check(dataset.settings.max_bad_fraction)
        except DataError as error:
            problems.extend(f"dataset {dataset.name}: {problem}" for problem in error.problems)
    if problems:
        raise DataError(problems)
    train = scans[loaded.train.name]
    for dataset in loaded.evals:
        found = scans[dataset.name]
        scans[dataset.name] = replace(found, warnings=[*found.warnings, *overlap(train.samples, found.samples)])
    return scans


def overlap(train: Iterable[Sample], evaluation: Iterable[Sample]) -> list[str]:
    """A warning if images are in the training set and in an evaluation set, whatever the files are called."""
    trained = {sample.picture.sha256 for sample in train}
    both = list(dict.fromkeys(sample.picture.path for sample in evaluation if sample.picture.sha256 in trained))
    if not both:
        return []
    are = "is" if len(both) == 1 else "are"
    return [
        f"{count(len(both), 'image')} {are} in the training set too, such as {both[0]}; the loss on them shows memory, "
        "not quality"
    ]


def make_plan(loaded: LoadedConfig, samples: Sequence[Sample], num_processes: int) -> Plan:
    """The plan of the run's batches."""
    config = loaded.config
    return Plan(samples, config.seed, config.batch_sizes(), config.gradient_accumulation_steps * num_processes)


def make_timetable(loaded: LoadedConfig, plan: Plan) -> Timetable:
    """The timetable of the run."""
    return Timetable.of(plan, loaded.config.epochs, loaded.config.max_steps)


def trainable_transformer(loaded: LoadedConfig, files: ModelFiles) -> MiniTrainDIT:
    """The transformer with what is trained attached, on the meta device: names, shapes and dtypes, no memory."""
    rates = loaded.config.learning_rates()
    with torch.device("meta"):
        transformer = MiniTrainDIT(TransformerShape.of(files.transformer_header.entries))
        if rates.by_component["llm_adapter"] != 0:
            transformer.llm_adapter = LLMAdapter(LLMAdapterShape.of(files.adapter_header.entries))
    transformer.to(DTYPES[loaded.config.model.transformer_dtype or loaded.config.model.dtype])
    loaded.config.adapter.attach(transformer, rates, loaded.config.seed)
    return transformer


def load_trained(
    loaded: LoadedConfig, files: ModelFiles, device: torch.device
) -> tuple[MiniTrainDIT, list[dict[str, Any]]]:
    """The transformer on a device with what is trained attached, ready for steps, and its parameter groups.

    Raises:
        ConfigError: nothing is trained.
    """
    config = loaded.config
    rates = config.learning_rates()
    weights_dtype = DTYPES[config.model.transformer_dtype or config.model.dtype]
    transformer = load_transformer(files, rates.by_component["llm_adapter"] != 0, weights_dtype, device)
    config.adapter.attach(transformer, rates, config.seed)
    transformer.checkpoint_blocks = config.activation_checkpointing
    transformer.train()
    groups = optimizer_groups(transformer.named_parameters(), rates, config.optimizer.weight_decay)
    if not groups:
        raise ConfigError("nothing is trained: every component that this model has is frozen")
    return transformer, groups


def group_rows(transformer: MiniTrainDIT, rates: LearningRates) -> list[GroupRow]:
    """The table of what is trained, a frozen LLM adapter that is not in memory included."""
    parameters = list(transformer.named_parameters())
    trained = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    return group_table(trained, [*(name for name, _ in parameters), "llm_adapter."], rates)


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
    planned = planned_writings(loaded, files, plan, timetable, transformer)
    lines.append(f"files: {planned.described()}: {readable(planned.num_bytes)} in all")
    if warning := space_warning(planned, loaded.config):
        lines.append(f"warning: {warning}")
    return Report(lines)


def first_files(loaded: LoadedConfig, files: ModelFiles) -> list[Need]:
    """What a run has to have room for before it begins, at the least."""
    sizes = file_sizes(loaded.config, trainable_transformer(loaded, files), files)
    return first_needs(run_path(loaded), loaded.config, sizes)


def planned_writings(
    loaded: LoadedConfig, files: ModelFiles, plan: Plan, timetable: Timetable, transformer: MiniTrainDIT,
    start: int = 0, num_states: int = 0,
) -> Writings:  # fmt: skip
    """What a run will write after its first `start` steps, of which `num_states` training states are there."""
    images_per_epoch = float(sum(sample.repeats for sample in plan.samples))
    sizes = file_sizes(loaded.config, transformer, files)
    return writings(run_path(loaded), loaded.config, sizes, timetable, images_per_epoch, start, num_states)


def run_path(loaded: LoadedConfig) -> Path:
    """The run's folder."""
    return Path(loaded.config.output_dir) / loaded.run_name


def dataset_report(
    title: str, loaded: LoadedConfig, files: ModelFiles, scans: dict[str, Scan], max_thumbnails: int,
    measured: Sequence[Measured] = (),
) -> DatasetReport:  # fmt: skip
    """All of that and more, for a page with pictures; at most `max_thumbnails` of them.

    What was measured replaces the estimates of its buckets.

    Raises:
        ModelFileError: a tokenizer cannot be loaded.
    """
    config = loaded.config
    plan = make_plan(loaded, scans["train"].samples, num_processes=1)
    transformer = trainable_transformer(loaded, files)
    groups = group_rows(transformer, config.learning_rates())
    num_trained = sum(row.num_parameters for row in groups)
    num_all = sum(parameter.numel() for parameter in transformer.parameters())
    adapter = LLMAdapterShape.of(files.adapter_header.entries)
    is_live = config.model.text_encoder_device == "training" and has_live_texts(config, plan.samples)
    model = ModelStats(
        TransformerShape.of(files.transformer_header.entries),
        num_weights=num_all if isinstance(config.adapter, Full) else num_all - num_trained,
        num_trained=num_trained,
        source_width=adapter.source_width,
        context_width=adapter.target_width,
        num_text_weights=files.num_text_weights(config.learning_rates().by_component["llm_adapter"]) if is_live else 0,
    )
    return collect(
        title, config, loaded.notes, scans, plan, make_timetable(loaded, plan), groups,
        load_tokenizers(files.tokenizer, files.t5_tokenizer), model, max_thumbnails, measured,
    )  # fmt: skip


def summary(found: DatasetReport) -> Report:
    """What the page knows and `report` does not, in a few lines."""
    lines = []
    for item in found.sets:
        facts = item.captions
        lines.append(
            f"captions of {item.name}: {len(facts.lengths):,} different, {len(facts.truncated):,} cut off, "
            f"{len(facts.unknown):,} characters T5 cannot read, {len(facts.typos):,} tags that look mistyped"
        )
        lines.extend(missing_text(item))
    kinds = ", ".join(f"{cost.number:,} {cost.kind}" for cost in found.cache if cost.number)
    lines.append(f"cache: {kinds}, {readable(total_bytes(found.cache))} in all")
    lines.extend(costs_text(found))
    return Report(lines)


def missing_text(found: SetReport) -> list[str]:
    """A line about trigger words, if images lack one."""
    lacking = [
        f"{count(len(item.images), 'image')} of directory[{item.directory}] without {item.described}"
        for item in found.missing
    ]
    return [printable(f"trigger words of {found.name}: {'; '.join(lacking)}")] if lacking else []


def costs_text(found: DatasetReport) -> list[str]:
    """Memory and time of the training set's buckets: measured, or the estimate for the largest."""
    buckets = found.sets[0].buckets
    lines = []
    for bucket in buckets:
        if (measured := bucket.measured) is None:
            continue
        title = f"measured {bucket.size}, batch {bucket.batch_size:,}:"
        if measured.seconds_per_step is None:
            lines.append(f"{title} {measured.described}; what to change, in order of cost: {'; '.join(bucket.savings)}")
        else:
            lines.append(f"{title} {measured.described} a step, {readable(measured.peak_bytes)} of memory at most")
    if not lines:
        memory = max(bucket.memory.total for bucket in buckets if bucket.memory is not None)
        lines.append(f"memory: about {readable(memory)} on the device for the largest bucket (an estimate)")
    if found.run_seconds is not None:
        lines.append(f"the whole run: {duration_text(found.run_seconds)}")
    return lines
