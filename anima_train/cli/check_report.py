"""The work of `anima check`: what a run would do, as lines and as a page."""

import contextlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

from anima_train.caching.entries import needed_entries
from anima_train.caching.sizes import TextFormat, cache_costs
from anima_train.caching.text_encoding import encodes_online, truncated
from anima_train.checkpoint.disk_space import DiskPlan
from anima_train.cli.output import Facts
from anima_train.config.config import Config
from anima_train.config.ladder import rungs
from anima_train.config.loaded import LoadedConfig
from anima_train.config.memory_advice import memory_suggestions
from anima_train.config.model_files import build_model_spec
from anima_train.config.plan_notes import plan_notes, plan_warnings
from anima_train.config.resolved import plain
from anima_train.core.determinism import deterministic_kernels
from anima_train.core.device import choose_device, describe_device, memory_bytes
from anima_train.core.errors import ConfigError, UserError
from anima_train.core.files import write_text
from anima_train.core.format import format_bytes, printable
from anima_train.data.loader import TextIdentity
from anima_train.data.plan import EpochSchedule, Plan, times_seen
from anima_train.data.samples import Sample
from anima_train.data.scan import Scan
from anima_train.evaluation.base_drawn import split_undrawn
from anima_train.evaluation.strengths import strengths_to_try
from anima_train.model.attention_choice import AttentionShape, choose_attention
from anima_train.model.loading import ModelSpec
from anima_train.model.text import TokenCounts
from anima_train.optim.groups import group_rows
from anima_train.reports.captions import Tokenized, tokenized
from anima_train.reports.check import summary
from anima_train.reports.dataset import (
    MAX_THUMBNAILS,
    Bucket,
    Captions,
    DatasetReport,
    RunLength,
    captions_of,
    collect_sets,
    lr_curve,
)  # fmt: skip
from anima_train.reports.dataset_page import render, render_refusal
from anima_train.reports.key_settings import key_settings
from anima_train.reports.places import places_of, shared_text
from anima_train.training.build import all_intervals, disk_plan, file_sizes, plan_run, trainable_transformer
from anima_train.training.costs import Measured, ModelStats, estimated_seconds, memory_cost, model_stats  # fmt: skip
from anima_train.training.dry_run import describe_run
from anima_train.training.ladder import Choice, choose_here, num_blocks
from anima_train.training.memory_check import extremes, measure
from anima_train.training.prepare import RefusedData, scan_all
from anima_train.training.setup import counts_zeros
from anima_train.training.summary import data_messages, evaluation_text, kept_text, sets_text

logger = logging.getLogger(__name__)

ANY_MODEL = TextIdentity("", "", "", "", "")  # the number and sizes of cache entries are those of every model


def report_check(loaded: LoadedConfig, title: str, measure_steps: int | None, page: Path | None) -> Facts:
    """Tell what a run would do, measure its steps if their number is given, and write the page if there is to be one.

    Return the same for programs.

    Raises:
        ConfigError: the page cannot be written.
        UserError: what is wrong with the model files or the images; the page has all of it.
    """
    try:
        return check_all(loaded, title, measure_steps, page)
    except UserError as error:
        if page is not None:
            scans = error.scans if isinstance(error, RefusedData) else {}
            found = [message for name, scan in scans.items() for message in data_messages(name, scan)]
            shared = partial(shared_text, places=places(loaded))
            with contextlib.suppress(ConfigError):  # the error itself says more than that
                write_page(page, "the reason", render_refusal(title, map(shared, error.problems), map(shared, found)))
                error.where = f"on {page}"
        raise


def check_all(loaded: LoadedConfig, title: str, measure_steps: int | None, page: Path | None) -> Facts:
    """Do what `report_check` does, where nothing is wrong."""
    config, device = loaded.config, choose_device()
    spec = build_model_spec(config, device)
    ready, undrawn = split_undrawn(loaded.datasets)
    scans = scan_all(ready, config.seed, write=True)
    lines = describe_run(loaded, spec, scans, num_processes=1)
    show([describe_device(device, spec.dtype), *undrawn, *lines])
    plan, schedule = plan_run(config, scans["train"].samples, num_processes=1)
    memory = choose_here(rungs(config, num_blocks(spec)), spec, plan, schedule)
    config, loaded = memory.rung.config, replace(loaded, config=memory.rung.config)  # as a run on this device has it
    spec = replace(spec, quantization=config.model.quantization)
    measured = []
    if measure_steps is not None:  # before any picture is decoded: the CPU's peak is that of the process
        is_online = encodes_online(config.model.cache_text_embeddings, plan.samples)
        buckets = extremes(plan)
        size, batch_size = buckets[-1]
        with deterministic_kernels(config.deterministic):
            shape = AttentionShape.of(spec.files, batch_size, size.num_tokens)
            choice = choose_attention(config.attention, device, spec.dtype, shape)
            show([str(choice)])
            with choice.in_use(device):
                zeros = counts_zeros(config.attention, spec)
                measured = measure(config, spec, buckets, measure_steps, is_online, zeros)
    checked = Checked.of(loaded, spec, scans, memory)
    found = make_report(title, checked, 0 if page is None else MAX_THUMBNAILS, measured)
    show(summary(found))
    if page is not None:
        write_page(page, "pictures", render(found))
    return {
        "run_name": loaded.run_name,
        "device": describe_device(device, spec.dtype),
        "warnings": list(dict.fromkeys([*scan_warnings(checked.scans), *checked.warnings, *memory.warnings])),
        "notes": checked.notes,
        "datasets": {
            name: {"images": len({each.picture.path for each in scan.samples if not each.is_preserved}),
                   "found": scan.num_images, "unusable": scan.bad, "skipped": scan.skipped}
            for name, scan in scans.items()
        },
        "buckets": [
            {"size": str(bucket.size), "images": bucket.num_images, "batch_size": bucket.batch_size,
             "memory_bytes": None if bucket.memory is None else bucket.memory.total}
            for bucket in found.sets[0].buckets
        ],
        "steps": schedule.num_steps,
        "steps_in_first_epoch": plan.steps_in(0),
        "trained": found.groups,
        "evaluation_passes": sum(number for _, number in loaded.passes(evaluated(scans))),
        "preservation": loaded.preservation,
        "cache": found.cache,
        "measured": measured,
        "page": page,
    }  # fmt: skip


def scan_warnings(scans: Mapping[str, Scan]) -> list[str]:
    """Return what is wrong with images and captions, of all datasets."""
    return [
        f"dataset {name}: {line}"
        for name, scan in scans.items()
        for line in (*(f"cannot be used: {bad}" for bad in scan.bad), *scan.warnings)
    ]


@dataclass(frozen=True)
class Checked:
    """A run as it would be, and what is to be told about it, with its paths."""

    loaded: LoadedConfig
    spec: ModelSpec
    scans: Mapping[str, Scan]  # with the warnings about captions that lose their end
    captions: Mapping[str, Captions]
    known: Tokenized  # the tokens of all captions
    plan: Plan
    schedule: EpochSchedule
    files: DiskPlan
    memory: Choice | None  # the settings that were chosen
    warnings: Sequence[str]  # beside those of the datasets and of the memory
    notes: Sequence[str]

    @classmethod
    def of(
        cls, loaded: LoadedConfig, spec: ModelSpec, scans: Mapping[str, Scan], memory: Choice | None = None
    ) -> "Checked":
        """Return what is known of a run whose images were looked at.

        Raises:
            ModelFileError: a tokenizer cannot be loaded.
        """
        config = loaded.config
        captions = captions_of(scans, config.seed)
        texts = (text for of_set in captions.values() for of_picture in of_set.values() for text in of_picture)
        known = tokenized(spec.files.load_tokenizers(), ["", *texts], spec.max_tokens)
        plan, schedule = plan_run(config, scans["train"].samples, num_processes=1)
        sizes, kept = file_sizes(config, spec, plan.samples), loaded.base_velocity_bytes(evaluated(scans))
        files = disk_plan(config, Path(config.output_dir), sizes, plan, schedule, base_velocities=kept)
        full = files.warning(config.keep_last)
        warnings = [*loaded.warnings, *plan_warnings(config, plan.samples, schedule.num_steps), *filter(None, [full])]
        notes = [*loaded.notes, *plan_notes(config, spec, plan, schedule, evaluated(scans))]
        scans = with_truncated(scans, captions, known.lengths)
        return cls(loaded, spec, scans, captions, known, plan, schedule, files, memory, warnings, notes)


def evaluated(scans: Mapping[str, Scan]) -> dict[str, list[Sample]]:
    """Return the samples of the evaluation sets, by their names."""
    return {name: scan.samples for name, scan in scans.items() if name != "train"}


def make_report(title: str, checked: Checked, max_thumbnails: int, measured: Sequence[Measured] = ()) -> DatasetReport:
    """Return the report for the page, with at most `max_thumbnails` pictures.

    Measured costs replace the estimates of their buckets.
    """
    config, spec, scans, known = checked.loaded.config, checked.spec, checked.scans, checked.known
    plan, schedule, captions = checked.plan, checked.schedule, checked.captions
    num_steps = schedule.num_steps
    transformer = trainable_transformer(spec, config.adapter, config.learning_rates(), config.seed)
    # The page may be shown to others, so it names no folder of this machine.
    shared = partial(shared_text, places=places(checked.loaded))
    train, *evals = collect_sets(scans, plan, config.eval_batch_sizes(), captions, known, max_thumbnails, shared)
    is_online = encodes_online(config.model.cache_text_embeddings, plan.samples)
    has_text_encoder = is_online and config.model.text_encoder_device == "training"
    stats = model_stats(config.adapter, spec, transformer, has_text_encoder)
    entries = needed_entries(
        plan.samples, chain.from_iterable(evaluated(scans).values()), "", ANY_MODEL, config.seed,
        config.uncond_fraction > 0, config.model.cache_text_embeddings, checked.loaded.preservation,
    )  # fmt: skip
    seen = times_seen(plan, schedule, num_steps)
    num_tokens = sum(times * sample.size.num_tokens for times, sample in zip(seen, plan.samples, strict=True))
    return DatasetReport(
        title,
        warnings=list(map(shared, checked.warnings)),
        notes=list(map(shared, checked.notes)),
        settings=[("model", spec.files.transformer.name), *key_settings(plain(config))],
        sets=[replace(train, buckets=with_costs(train.buckets, config, stats, measured)), *evals],
        exposures=sorted(Counter(seen).items()),
        length=RunLength.of(plan, schedule, config.epochs),
        curve=lr_curve(config.lr_scheduler, config.warmup_steps, num_steps),
        groups=group_rows(transformer, config.learning_rates()),
        cache=cache_costs(entries, known.lengths, TextFormat.of(spec)),
        against_forgetting=list(map(shared, against_forgetting(checked))),
        files=f"{checked.files.described()}: {format_bytes(checked.files.num_bytes)} in all",
        memory=checked.memory,
        device_bytes=memory_bytes(spec.device),
        max_tokens=spec.max_tokens,
        run_seconds=estimated_seconds(measured, plan.micro_batches_per_step, num_steps, num_tokens),
    )


def against_forgetting(checked: Checked) -> list[str]:
    """Return lines about what keeps the base, and about what is measured, with its cost."""
    loaded, plan, schedule = checked.loaded, checked.plan, checked.schedule
    config, passes = loaded.config, loaded.passes(evaluated(checked.scans))
    others = config.eval_before_first_step + len(strengths_to_try(config.strengths_after_training))
    return [
        *kept_text(plan, schedule, loaded.preservation),
        *sets_text(config.eval_datasets, config.measures_drift, config.sampling),
        *evaluation_text(all_intervals(config)["evaluation"], others, passes, plan, schedule),
    ]


def with_truncated(
    scans: Mapping[str, Scan], captions: Mapping[str, Captions], lengths: Mapping[str, TokenCounts]
) -> dict[str, Scan]:
    """Return the scans with warnings about captions that lose their end."""
    found = {}
    for name, scan in scans.items():
        owners: dict[str, list[Sample]] = defaultdict(list)
        for sample in scan.samples:
            for caption in captions[name][sample.picture.path]:
                owners[caption].append(sample)
        found[name] = replace(scan, warnings=[*scan.warnings, *truncated(lengths, owners)])
    return found


def with_costs(
    buckets: Iterable[Bucket], config: Config, stats: ModelStats, measured: Iterable[Measured]
) -> list[Bucket]:
    """Return the buckets with the memory that each takes in training, and what to change where it ran out."""
    by_bucket = {(each.size, each.batch_size): each for each in measured}
    found = []
    for bucket in buckets:
        resolution, size, width = bucket.resolution, bucket.size, bucket.batch_size
        cost = by_bucket.get((size, width))
        ran_out = cost is not None and cost.seconds_per_step is None
        savings = memory_suggestions(config, resolution, width, stats.text_bytes > 0) if ran_out else ()
        memory = memory_cost(config, stats, size, width)
        found.append(replace(bucket, memory=memory, measured=cost, savings=savings))
    return found


def places(loaded: LoadedConfig) -> list[str]:
    """Return the paths that the page leaves out."""
    return [str(Path.home() / "x"), *places_of(loaded.config.model_dump())]


def write_page(page: Path, shows: str, text: str) -> None:
    """Write the page of a check, and print where it is.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        write_text(page, text)
    except OSError as error:  # a file where its folder should be, or a name that is none
        raise ConfigError(f"{page} cannot be written ({error.strerror}); choose another place with --html") from error
    show([f"page with {shows}: {page}"])


def show(lines: Iterable[str]) -> None:
    """Tell lines, one by one."""
    for line in lines:
        logger.info("%s", printable(line))
