"""The description of a run, made without running it."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

from anima_train.caching.entries import (
    missing_entries,
    model_text_identity,
    needed_entries,
    vae_identity,
    without_rejected,
)
from anima_train.caching.fill import require_room
from anima_train.checkpoint.disk_space import DiskPlan, first_requirements
from anima_train.checkpoint.resume import ResumePoint, check_same_run, is_locked
from anima_train.checkpoint.samples import check_same_samples
from anima_train.config.ladder import rungs
from anima_train.config.loaded import LoadedConfig
from anima_train.config.plan_notes import plan_notes, plan_warnings
from anima_train.core.errors import ConfigError
from anima_train.core.files import check_writable
from anima_train.core.format import format_bytes, message_lines
from anima_train.data.loader import CachedData
from anima_train.data.plan import Plan
from anima_train.data.samples import Sample
from anima_train.data.scan import Scan
from anima_train.evaluation.strengths import strengths_to_try
from anima_train.model.attention_choice import AttentionShape, choose_attention
from anima_train.model.loading import ModelSpec
from anima_train.optim.groups import group_rows
from anima_train.run.folder import RunFolder
from anima_train.run.manifest import manifest
from anima_train.run.trackers import check_trackers
from anima_train.sampling.pipeline import texts_of
from anima_train.sampling.prompts import tokenize_prompt
from anima_train.training.build import (
    all_intervals,
    check_blocks,
    check_compiler,
    check_judge,
    disk_plan,
    file_sizes,
    initial_lora,
    plan_run,
    trainable_transformer,
)  # fmt: skip
from anima_train.training.divided import check_can_divide
from anima_train.training.ladder import choose_here, model_ladder, num_blocks
from anima_train.training.memory_check import extremes
from anima_train.training.summary import (
    data_messages,
    evaluation_text,
    groups_text,
    plan_text,
    selection_text,
    sets_text,
    trained_text,
)  # fmt: skip


def describe_run(
    loaded: LoadedConfig, spec: ModelSpec, scans: Mapping[str, Scan], num_processes: int, divides: bool = False,
    starts: bool = False, point: ResumePoint | None = None,
) -> list[str]:  # fmt: skip
    """Return lines about the data, the memory, the plan, what is trained, and the files that the run would write.

    Args:
        loaded: the configuration.
        spec: the model.
        scans: by the set's name; "train" is trained.
        num_processes: that train.
        divides: True if they divide the transformer among them.
        starts: True to refuse what the start of the run would refuse, too.
        point: where the run would begin.

    Raises:
        DataError, ModelFileError: the dataset, the files or the components are not those of the state.
        UserError: `starts`, as `check_start`.
        ConfigError: no step would be made, or what is asked for cannot be: compiling, swapping, dividing, fitting.
    """
    config, saved = loaded.config, None if point is None else point.saved
    if loaded.missing and saved is None:
        raise ConfigError(loaded.missing)
    check_compiler(config.compile, spec.device)
    check_blocks(config.blocks_to_swap, config.checkpointed_blocks, config.adapter, spec, num_processes)
    if divides:
        check_can_divide(config.optimizer, config.blocks_to_swap, config.model.quantization, bool(config.preservation))
    lines = [*trained_text(config.adapter, config.learning_rates(), spec), *told(loaded.warnings, loaded.notes)]
    lines.extend(line for each in scans.items() for message in data_messages(*each) for line in message_lines(message))
    plan, schedule = plan_run(config, scans["train"].samples, num_processes)
    transformer = trainable_transformer(spec, config.adapter, config.learning_rates(), config.seed)
    rows = group_rows(transformer, config.learning_rates())
    if point is not None and saved is not None:
        known, _ = without_rejected(plan.samples, vae_id := vae_identity(spec.files))
        check_same_samples(saved, known, config.adapter, spec.files)
        point.check_length("epochs", schedule.num_steps)
        data = CachedData(known, vae_id, model_text_identity(spec), config.seed, config.model.cache_text_embeddings)
        check_same_run(saved, manifest(
            loaded.run_name, spec.files, data, rows, config.seed, schedule.num_steps, num_processes,
            config.gradient_accumulation_steps, attention="",
        ))  # fmt: skip
    ladder = model_ladder(rungs(config, num_blocks(spec), num_processes, divides), saved)
    choice = choose_here(ladder, spec, plan, schedule)
    lines.extend((*choice.lines, *choice.card_lines))
    evals = {name: scan.samples for name, scan in scans.items() if name != "train"}
    lines.extend(plan_text(plan, schedule, config.epochs, config.ema, loaded.preservation))
    lines.extend(sets_text(config.eval_datasets, config.measures_drift, config.sampling))
    others = config.eval_before_first_step + len(strengths_to_try(config.strengths_after_training))
    lines.extend(evaluation_text(all_intervals(config)["evaluation"], others, loaded.passes(evals), plan, schedule))
    warnings = plan_warnings(config, plan.samples, schedule.num_steps)
    lines.extend(told(warnings, plan_notes(config, spec, plan, schedule, evals)))
    lines.extend((*groups_text(rows), *selection_text(config.adapter, transformer)))
    if saved is None and (initial := initial_lora(config.adapter, spec, config.learning_rates())) is not None:
        lines.extend(initial.described)
    folder, sizes = Path(config.output_dir) / loaded.run_name, file_sizes(config, spec, scans["train"].samples)
    planned = disk_plan(config, folder, sizes, plan, schedule, base_velocities=loaded.base_velocity_bytes(evals))
    lines.extend(files_lines(planned, config.keep_last))
    if starts:
        check_start(loaded, spec, plan, chain.from_iterable(evals.values()))
    return lines


def told(warnings: Iterable[str], notes: Iterable[str]) -> Iterator[str]:
    """Yield warnings and notes as lines that say which of both they are."""
    yield from (f"warning: {text}" for text in warnings)
    yield from (f"note: {text}" for text in notes)


def files_lines(planned: DiskPlan, keep_last: int) -> list[str]:
    """Return lines about the files that the run would write, and of what its disk has no room for."""
    lines = [f"files: {planned.described()}: {format_bytes(planned.num_bytes)} in all"]
    warning = planned.warning(keep_last)
    return lines if warning is None else [*lines, f"warning: {warning}"]


def check_start(loaded: LoadedConfig, spec: ModelSpec, plan: Plan, evaluated: Iterable[Sample]) -> None:
    """Refuse what the start of a run would refuse, without making anything.

    Args:
        loaded: the configuration.
        spec: the model.
        plan: of its batches.
        evaluated: the samples of all evaluation sets.

    Raises:
        ConfigError: the folder cannot be one, or another process trains in it; a tracker is not installed; the judge
            cannot be loaded; the kernel of attention does not work here; a prompt cannot be read.
        ModelFileError: a file lacks weights, or has others.
        SpaceError: the folder cannot be written, or the disk has no room for the cache and the first files.
    """
    config, folder = loaded.config, RunFolder(Path(loaded.config.output_dir), loaded.run_name)
    check_trackers(config.monitoring)
    check_judge(config.sampling, config.offline)
    check_writable(folder.path, "output_dir")
    if folder.lock_path.exists() and is_locked(folder):
        raise ConfigError(f"{folder.path}: another process is training in this folder")
    tokenizers = spec.files.load_tokenizers()
    spec.files.check_keys(tokenizers)
    for text in texts_of([] if config.sampling is None else config.sampling.prompts):
        tokenize_prompt(tokenizers, text)
    size, batch_size = extremes(plan)[-1]
    choose_attention(
        config.attention, spec.device, spec.dtype, AttentionShape.of(spec.files, batch_size, size.num_tokens)
    )
    needed = needed_entries(
        plan.samples, evaluated, vae_identity(spec.files), model_text_identity(spec), config.seed,
        config.uncond_fraction > 0, config.model.cache_text_embeddings, loaded.preservation,
    )  # fmt: skip
    first_files = first_requirements(folder.path, file_sizes(config, spec, plan.samples), config.saves_states)
    require_room(missing_entries(needed), spec, tokenizers, first_files)
