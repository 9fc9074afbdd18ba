"""The text that tells, before the first step, what a run will do."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

from anima_train.adapters.addition import Addition, adapted_layers
from anima_train.adapters.choice import AnyAdapter
from anima_train.adapters.full import Full
from anima_train.adapters.lora import Lora
from anima_train.adapters.selection import block_linears, described
from anima_train.config.sections import EvalDataset, Sampling
from anima_train.core.format import Listing, count, prefixed
from anima_train.data.buckets import Size
from anima_train.data.plan import EpochSchedule, Plan, batch_size_for, short_by, times_seen
from anima_train.data.preservation import Preservation
from anima_train.data.scan import Scan
from anima_train.model.comfy_quantized import quantization_text
from anima_train.model.dit import MiniTrainDIT
from anima_train.model.file_kinds import LLM_ADAPTER_PREFIX
from anima_train.model.loading import ModelSpec
from anima_train.optim.ema import Ema
from anima_train.optim.groups import GroupRow, LearningRates
from anima_train.run.intervals import Interval


def lr_text(row: GroupRow) -> str:
    """Return a component's learning rate, as tables show it."""
    if row.lr == 0 or not row.num_parameters:
        return "frozen" if row.lr == 0 else "-"
    if row.lowest is None or row.lowest == row.highest:
        return f"{row.lr if row.lowest is None else row.lowest:g}"
    return f"{row.lowest:g} to {row.highest:g}"


def trained_text(adapter: AnyAdapter, rates: LearningRates, spec: ModelSpec) -> list[str]:
    """Return lines about what is trained that may be a surprise: the base's file, and that there is no adapter."""
    header = spec.files.transformer_header
    lines = [] if (text := quantization_text(header)) is None else [text]
    lines.extend(f"warning: {text}" for text in spec.files.warnings())
    if adapter.leaves_base:
        return lines
    entries = [*header.entries.items()]
    entries += [(LLM_ADAPTER_PREFIX + name, entry) for name, entry in spec.files.llm_adapter_header.entries.items()]
    trained = sum(math.prod(entry.shape) for name, entry in entries if not rates.is_frozen(name))
    of_all = "" if any(rates.is_frozen(name) for name, _ in entries) else "all "
    number = f"{trained / 1e9:.2f} B" if trained >= 1e7 else f"{trained:,}"
    return [*lines, f'no [adapter]: {of_all}{number} weights are trained; a LoRA would be [adapter] with type = "lora"']


def selection_text(adapter: AnyAdapter, transformer: MiniTrainDIT) -> list[str]:
    """Return lines about the linears that the adapter's expressions choose, what differs among them, and T-LoRA.

    Args:
        adapter: that is trained.
        transformer: with it.
    """
    if isinstance(adapter, Full):
        return []
    lines = unscaled_text(adapter, transformer)
    chosen = [name for name, _ in adapted_layers(transformer)]
    if isinstance(adapter, Lora) and adapter.min_rank is not None:
        falling = [adapter.rank_of(name) for name in chosen if not name.startswith(LLM_ADAPTER_PREFIX)]
        lines.append(
            f"adapter: a T-LoRA, whose ranks fall to {adapter.min_rank} with noise in training alone: evaluations and "
            "previews show its file, a plain LoRA; loss_as_trained is the loss as it is trained"
            if max(falling, default=0) > adapter.min_rank
            else f"note: adapter: min_rank has no effect, as no linear of the transformer has a rank above "
            f"{adapter.min_rank}"
        )
    if not adapter.is_partial:
        return lines
    lines.append(f"adapter: {len(chosen)} of {count(len(block_linears(transformer)), 'linear')}: {described(chosen)}")
    ranks = Counter(adapter.rank_of(name) for name in chosen)
    if len(ranks) > 1:
        shown = ", ".join(f"{rank} ({number})" for rank, number in sorted(ranks.items()))
        lines.append(f"adapter: ranks (and the number of linears): {shown}")
    if hasattr(transformer, "llm_adapter") and not any(name.startswith(LLM_ADAPTER_PREFIX) for name in chosen):
        lines.append(
            "note: adapter: leaves out the LLM adapter, whose learning rate is not 0; with llm_adapter_lr = 0, in "
            "[model], its output is cached, and steps are shorter"
        )
    return lines


def unscaled_text(adapter: Addition, transformer: MiniTrainDIT) -> list[str]:
    """Return a line about the linears on which alpha has no effect: LoKrs whose factors are whole at their rank."""
    layers = dict(adapted_layers(transformer))
    if not (unscaled := [name for name, layer in layers.items() if layer.scale != adapter.scale_of(name)]):
        return []
    return [
        f"note: adapter: alpha has no effect on {len(unscaled)} of {count(len(layers), 'linear')}, whose factors are "
        "whole at this rank: their scale is 1, as ComfyUI has it"
    ]


def groups_text(rows: Sequence[GroupRow]) -> list[str]:
    """Return the groups as a table."""
    width = max([10, *(len(lr_text(row)) for row in rows)])
    lines = [f"{'component':<12} {'lr':>{width}} {'modules':>8} {'parameters':>14}"]
    for row in rows:
        lines.append(f"{row.component:<12} {lr_text(row):>{width}} {row.num_modules:>8,} {row.num_parameters:>14,}")
    modules, parameters = sum(row.num_modules for row in rows), sum(row.num_parameters for row in rows)
    lines.append(f"{'total':<12} {'':>{width}} {modules:>8,} {parameters:>14,}")
    return lines


def data_messages(name: str, found: Scan) -> list[str]:
    """Return what a scan found."""
    pictures = {sample.picture.path for sample in found.samples if not sample.is_preserved}
    messages = [f"dataset {name}: {count(len(pictures), 'image')} of {found.num_images:,} found"]
    for title, files in (("cannot be used", found.bad), ("skipped", found.skipped)):
        if files:
            messages.append(Listing(f"dataset {name}: {title}: {len(files):,}", files))
    return [*messages, *(prefixed(f"warning: dataset {name}: ", warning) for warning in found.warnings)]


def evaluation_text(
    due: Interval, others: int, passes: Sequence[tuple[Size, int]], plan: Plan, schedule: EpochSchedule
) -> list[str]:
    """Return a line about the evaluations: how many, of how many passes, and their share of the run's work.

    A pass forward counts 1, one forward and backward 3, each times its image tokens.

    Args:
        due: when they are made.
        others: those before the first step and after the last one.
        passes: (size, number of passes) of each image.
        plan: of the batches.
        schedule: of the epochs.
    """
    end = schedule.num_steps
    seen = times_seen(plan, schedule, end)
    times = due.count(range(end), range(schedule.locate(end)[0]), range(sum(seen))) + others
    work = times * sum(number * size.num_tokens for size, number in passes)
    trained = 3 * sum(number * sample.size.num_tokens for number, sample in zip(seen, plan.samples, strict=True))
    if not work:
        return []
    return [
        f"evaluations: {times:,} with {sum(number for _, number in passes):,} passes of an image each, about "
        f"{work / (work + trained):.0%} of the work of the run; fewer quantiles or images make them shorter"
    ]


def sets_text(
    entries: Sequence[EvalDataset], measures_drift: Callable[[EvalDataset], bool], sampling: Sampling | None
) -> list[str]:
    """Return lines about what is measured: the evaluation sets with their roles, and who scores the previews."""
    named = [f"{each.name} ({each.role}{', drift' if measures_drift(each) else ''})" for each in entries]
    lines = [f"evaluation sets: {', '.join(named)}"] if named else []
    if sampling is not None and sampling.judge is not None:
        lines.append(f"previews are scored by {sampling.judge}, each time that they are drawn")
    return lines


def regularization_text(plan: Plan, schedule: EpochSchedule) -> list[str]:
    """Return a line about the share of the images for regularization; none without any."""
    seen = times_seen(plan, schedule, schedule.num_steps)
    kept = sum(times for times, sample in zip(seen, plan.samples, strict=True) if sample.role == "regularization")
    has_some = any(sample.role == "regularization" for sample in plan.samples)
    return [f"regularization: {kept / max(1, sum(seen)):.0%} of the samples"] if has_some else []


def preservation_text(plan: Plan, schedule: EpochSchedule, preservation: Preservation | None) -> list[str]:
    """Return lines about the samples that keep the base, and what they cost."""
    if preservation is None:
        return []
    pictures = {sample.picture.path for sample in plan.samples if sample.is_preserved}
    seen = times_seen(plan, schedule, schedule.num_steps)
    kept = sum(preservation.times(sample, plan.seed, number) for sample, number in zip(plan.samples, seen, strict=True))
    what = f"{count(len(pictures), 'picture')} that it draws" if pictures else "training images with other captions"
    share = kept / max(1, sum(seen))
    lines = [
        f"preservation: for {share:.0%} of the samples the target is the base's velocity, on {what}; they teach "
        "nothing new, and each takes a second pass without gradients, about a third of its step"
    ]
    if not kept:
        lines.append("warning: preservation: no sample of this run keeps the base, as it is so short; raise share")
    return lines


def plan_text(
    plan: Plan, timetable: EpochSchedule, epochs: int | None, ema: Ema | None, preservation: Preservation | None = None
) -> list[str]:
    """Return lines about buckets, batches and steps, and about what keeps the base."""
    lines = [f"{'bucket':<12} {'images':>8} {'batch':>6} {'short by':>9}"]
    buckets = Counter((sample.resolution, sample.size) for sample in plan.samples)
    refs = plan.refs_by_bucket(0)
    for (resolution, size), number in sorted(buckets.items()):
        batch = batch_size_for(plan.batch_sizes, resolution)
        lines.append(f"{size!s:<12} {number:>8,} {batch:>6} {short_by(len(refs[resolution, size]), batch):>9}")
    steps = plan.steps_in(0)
    ending = (
        "max_steps" if epochs is None or timetable.num_steps < timetable.epoch_starts[-1] else count(epochs, "epoch")
    )
    lines.append(f"{count(steps, 'step')} in the first epoch; {count(timetable.num_steps, 'step')} in all ({ending})")
    if ema is not None and ema.decay_after(timetable.num_steps) < ema.decay:
        lines.append(
            f"note: ema.decay: {ema.decay} is not reached in {count(timetable.num_steps, 'step')}: the average "
            "covers about the last ninth of the steps, and a larger one would change nothing"
        )
    return [*lines, *kept_text(plan, timetable, preservation)]


def kept_text(plan: Plan, schedule: EpochSchedule, preservation: Preservation | None) -> list[str]:
    """Return lines about the samples against forgetting: images for regularization, and what keeps the base."""
    return [*regularization_text(plan, schedule), *preservation_text(plan, schedule, preservation)]
