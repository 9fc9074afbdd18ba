"""The settings that are right but change nothing with this data, or in a run of this length: noted with the plan."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from anima_train.config.config import Config
from anima_train.core.format import count
from anima_train.data.caption_parts import caption_parts, tags_in
from anima_train.data.captions import plain_tag
from anima_train.data.plan import EpochSchedule, Plan, batch_entry_for, times_seen
from anima_train.data.samples import Sample
from anima_train.objective.losses import MULTISCALE_SIDE
from anima_train.optim.lr_schedules import CosineWithRestarts, WarmupStableDecay

INTERVAL = re.compile(r".*every_n_(steps|epochs|examples)")


def plan_notes(config: Config, plan: Plan, schedule: EpochSchedule, evaluated: Iterable[Sample]) -> list[str]:
    """Return "key: has no effect, as ...", a line for each key that changes nothing in this run.

    Args:
        config: of the run.
        plan: of its batches.
        schedule: of its epochs.
        evaluated: the samples of all evaluation sets.
    """
    parts = (without_effect_in_time(config, plan, schedule), without_effect_on_samples(config, plan, evaluated))
    found = dict.fromkeys(f"{key}: has no effect, as {why}" for part in parts for key, why in part)
    return list(found)


def plan_warnings(config: Config, num_steps: int) -> Iterator[str]:
    """Yield "key: what is wrong" for what makes a run of this length another than is meant."""
    if config.warmup_steps > num_steps > 0:
        yield (
            f"warmup_steps: {config.warmup_steps:,} is longer than the run of {count(num_steps, 'step')}: the learning "
            f"rate rises to {num_steps / config.warmup_steps:.0%} of lr, and no more; write a twentieth of the steps"
        )


def without_effect_in_time(config: Config, plan: Plan, schedule: EpochSchedule) -> Iterator[tuple[str, str]]:
    """Yield (key, why it has no effect) for what comes after the end of the run."""
    num_steps = schedule.num_steps
    lengths = {
        "steps": num_steps,
        "epochs": schedule.locate(num_steps)[0],
        "examples": sum(times_seen(plan, schedule, num_steps)),
    }
    tables = {"": config} if config.sampling is None else {"": config, "sampling.": config.sampling}
    for prefix, table in tables.items():
        for name in type(table).model_fields:
            value, unit = getattr(table, name), INTERVAL.fullmatch(name)
            if unit is not None and value is not None and value > lengths[unit[1]]:
                run = count(lengths[unit[1]], {"examples": "image"}.get(unit[1], unit[1].removesuffix("s")))
                yield f"{prefix}{name}", f"the run ends before, after {run}"
    decay = config.lr_scheduler
    if config.warmup_steps >= num_steps > 0:
        yield "lr_scheduler", f"warmup_steps = {config.warmup_steps} takes all of the {count(num_steps, 'step')}"
    after_warmup = max(0, num_steps - config.warmup_steps)
    if isinstance(decay, CosineWithRestarts) and decay.num_cycles > after_warmup:
        text = f"{decay.num_cycles} cycles in {count(after_warmup, 'step')} after the warmup: none has a second step"
        yield "lr_scheduler.num_cycles", text
    if isinstance(decay, WarmupStableDecay) and decay.decay_fraction * after_warmup < 1:
        yield "lr_scheduler.decay_fraction", "the decay is shorter than a step"


def without_effect_on_samples(
    config: Config, plan: Plan, evaluated: Iterable[Sample]
) -> Iterator[tuple[str, str]]:  # fmt: skip
    """Yield (key, why it has no effect) for what no image of the training set has, or for the loss none at all."""
    samples, evaluated = plan.samples, list(evaluated)
    sizes = {sample.size for sample in samples}
    if config.model.multiscale_loss_weight is not None and all(
        (size.width * size.height) ** 0.5 < MULTISCALE_SIDE for size in sizes
    ):
        yield (
            "model.multiscale_loss_weight",
            f"all images have fewer pixels than {MULTISCALE_SIDE:.0f} x {MULTISCALE_SIDE:.0f}",
        )
    if config.normalize_masked_loss and not any(sample.has_mask for sample in chain(samples, evaluated)):
        yield "normalize_masked_loss", "no image has a mask"
    if not isinstance(plan.batch_sizes, int):
        used = {batch_entry_for(plan.batch_sizes, sample.resolution) for sample in samples}
        for entry in plan.batch_sizes:
            if tuple(entry) not in used:
                yield "micro_batch_size_per_gpu", f"no resolution is nearest to that of {list(entry)}"
    directories: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        directories[sample.directory].append(sample)
    kinds = {sample.options.kind for sample in evaluated}
    for index, own in sorted(directories.items()):
        if own[0].options.kind not in kinds | {""}:
            yield f"directory[{index}].kind", "only evaluation sets are told apart by it"
        for key, why in without_effect_on_directory(own):
            yield f"directory[{index}].{key}", why


def without_effect_on_directory(samples: Sequence[Sample]) -> Iterator[tuple[str, str]]:
    """Yield (key, why it has no effect) for what no image or caption of a directory has."""
    options = samples[0].options
    if options.alpha_as_mask and not any(sample.picture.has_alpha for sample in samples):
        yield "alpha_as_mask", "no image has an alpha channel"
    if not (options.varies_tags and (options.protected_tags or options.keep_first_n_tags)):
        return
    captions = {text for sample in samples for text in sample.picture.tags if text}
    tags = [tags_of(caption, options.cache_shuffle_delimiter) for caption in captions]
    known = {plain_tag(tag) for of_caption in tags for tag in of_caption}
    if missing := [tag for tag in options.protected_tags if plain_tag(tag) not in known]:
        yield "protected_tags", f"no caption has {' or '.join(missing)}"
    most = max(map(len, tags), default=0)
    if 0 < most <= options.keep_first_n_tags:
        yield (
            "tag_dropout" if options.tag_dropout else "shuffle_tags",
            (f"keep_first_n_tags is {options.keep_first_n_tags}, and no caption has more than {count(most, 'tag')}"),
        )


def tags_of(caption: str, delimiter: str) -> list[str]:
    """Return the tags of a caption, without its sentences."""
    return [
        tag for part in caption_parts(caption, delimiter) if not part.is_prose for tag in tags_in(part.text, delimiter)
    ]
