"""The settings that are right but change nothing with this data, or in a run of this length: noted with the plan."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

import torch

from anima_train.config.combinations import EVAL_INTERVALS
from anima_train.config.config import Config
from anima_train.config.data_notes import without_effect_on_data
from anima_train.core.format import count
from anima_train.core.settings import quoted
from anima_train.data.plan import BatchSizes, EpochSchedule, Plan, batch_entry_for, times_seen
from anima_train.data.samples import Sample, exact
from anima_train.data.settings import DatasetSettings
from anima_train.model.loading import ModelSpec
from anima_train.objective.losses import MULTISCALE_SIDE
from anima_train.optim.lr_schedules import CosineWithRestarts, WarmupStableDecay, WithFloor

INTERVAL = re.compile(r".*every_n_(steps|epochs|examples)")

Notes = Iterator[tuple[str, str]]  # a key, and why it has no effect


def plan_notes(
    config: Config, spec: ModelSpec, plan: Plan, schedule: EpochSchedule, evals: Mapping[str, Sequence[Sample]]
) -> list[str]:
    """Return "key: has no effect, as ...", a line for each key that changes nothing in this run.

    Args:
        config: of the run.
        spec: of its model.
        plan: of its batches.
        schedule: of its epochs.
        evals: the samples of each evaluation set, by its name.
    """
    learned = [sample for sample in plan.samples if not sample.is_preserved]
    notes = [
        *without_effect_in_time(config, plan, schedule),
        *without_effect_on_schedule(config, schedule.num_steps),
        *without_effect_on_loss(config, plan.samples, list(chain.from_iterable(evals.values()))),
        *without_effect_here(config, spec),
        *unmeasured_kinds(learned, chain.from_iterable(evals.values())),
        *unused_sizes("micro_batch_size_per_gpu", plan.batch_sizes, plan.samples),
        *unused_sizes("eval_micro_batch_size_per_gpu", config.eval_micro_batch_size_per_gpu, chain(*evals.values())),
    ]
    if isinstance(config.dataset, DatasetSettings):
        notes += without_effect_on_data(config.dataset, learned)
    for each in config.eval_datasets:
        # The training set's own keys are meant for training.
        if isinstance(each.config, DatasetSettings) and each.config != config.dataset and each.name in evals:
            of_set = without_effect_on_data(each.config, evals[each.name], evaluates=True)
            notes += ((f"evaluation set {each.name}: {key}", why) for key, why in of_set)
    return list(dict.fromkeys(f"{key}: has no effect, as {why}" for key, why in notes))


def plan_warnings(config: Config, trained: Iterable[Sample], num_steps: int) -> Iterator[str]:
    """Yield "key: what is wrong" for what makes a run of this length, on these samples, another than is meant."""
    trained = list(trained)
    yield from trained_captions(config, trained)
    learned = [sample for sample in trained if not sample.is_preserved]
    if learned and all(sample.role == "regularization" for sample in learned):
        yield (
            'dataset: every image has role = "regularization": there is nothing new to learn; remove role from the '
            "images of your subject"
        )
    if config.warmup_steps > num_steps > 0:
        yield (
            f"warmup_steps: {config.warmup_steps:,} is longer than the run of {count(num_steps, 'step')}: the learning "
            f"rate rises to {num_steps / config.warmup_steps:.0%} of lr, and no more; write "
            f"warmup_steps = {max(1, num_steps // 20)}"
        )


def trained_captions(config: Config, trained: Iterable[Sample]) -> Iterator[str]:
    """Yield a warning for captions that are to show what is forgotten, or to keep the base, and are trained."""
    texts = {text for sample in trained if sample.role == "train" for text in sample.plain_captions() if text}
    kept = {f"eval_datasets {each.name}: captions": each.captions for each in config.eval_datasets}
    if (preservation := config.preservation) is not None:
        kept["preservation.captions"] = preservation.captions
        kept["preservation.class_caption"] = {"class": [preservation.class_caption or ""]}
    for key, captions in kept.items():
        # Of those shipped none is a caption that anyone trains.
        of_key = chain.from_iterable(captions.values()) if isinstance(captions, dict) else ()
        if shared := [text for text in of_key if text in texts]:
            noun = "captions of training images are" if len(shared) > 1 else "caption of a training image is"
            yield (
                f"{key}: {len(shared):,} {noun} among what is not to change, such as {quoted(shared[0])}; remove "
                "what is trained from there"
            )


def without_effect_in_time(config: Config, plan: Plan, schedule: EpochSchedule) -> Notes:
    """Yield the intervals that are longer than the run."""
    num_steps = schedule.num_steps
    lengths = {
        "steps": num_steps,
        "epochs": schedule.locate(num_steps)[0],
        "examples": sum(times_seen(plan, schedule, num_steps)),
    }
    yield from undecided(config, schedule, lengths["examples"])
    tables = {"": config} if config.sampling is None else {"": config, "sampling.": config.sampling}
    for prefix, table in tables.items():
        for name in type(table).model_fields:
            value, unit = getattr(table, name), INTERVAL.fullmatch(name)
            if name in EVAL_INTERVALS and not config.eval_datasets:
                continue  # told already
            if unit is not None and value is not None and value > lengths[unit[1]]:
                run = count(lengths[unit[1]], {"examples": "image"}.get(unit[1], unit[1].removesuffix("s")))
                yield f"{prefix}{name}", f"the run ends before, after {run}"


def undecided(config: Config, schedule: EpochSchedule, num_examples: int) -> Notes:
    """Yield the keys that decide by evaluations of which the run has too few."""
    rule = config.early_stopping
    watched = {"keep_best": config.keep_best, "early_stopping": None if rule is None else rule.metric}
    keys = [key for key, metric in watched.items() if metric is not None and "/" in metric]
    keys += [] if config.forgetting_budget is None else ["forgetting_budget"]
    steps, epochs, examples = config.eval_every_n_steps, config.eval_every_n_epochs, config.eval_every_n_examples
    after = set() if steps is None else set(range(steps, schedule.num_steps + 1, steps))
    ends = [] if epochs is None else schedule.epoch_starts[epochs::epochs]
    after.update(step for step in ends if 0 < step <= schedule.num_steps)
    most = len(after) + (0 if examples is None else num_examples // examples)
    if most == 0:
        yield from ((key, "the run ends before the first evaluation of what it has trained") for key in keys)
    elif rule is not None and "early_stopping" in keys:
        looks = most + config.eval_before_first_step
        if looks <= rule.patience:
            has = f"{'' if examples is None else 'at most '}{count(looks, 'evaluation')}"
            yield "early_stopping", f"the run has {has}, and patience waits for {rule.patience} after the best one"


def without_effect_on_schedule(config: Config, num_steps: int) -> Notes:
    """Yield the keys of the learning rate's schedule that no step reaches."""
    schedule, num_falling = config.lr_scheduler, max(0, num_steps - config.warmup_steps)
    steps = f"{count(num_falling, 'step')} after the warmup" if config.warmup_steps else count(num_falling, "step")
    if config.warmup_steps >= num_steps > 0:
        yield "lr_scheduler", f"warmup_steps = {config.warmup_steps} takes all of the {count(num_steps, 'step')}"
    elif not isinstance(schedule, WithFloor):
        return
    elif num_falling == 1 or schedule.min_factor == 1:
        yield "lr_scheduler", "min_factor is 1" if schedule.min_factor == 1 else f"there is only {steps}"
    elif isinstance(schedule, CosineWithRestarts) and schedule.num_cycles >= num_falling:
        yield "lr_scheduler.num_cycles", f"{schedule.num_cycles} cycles in {steps}: none has a second step"
    elif isinstance(schedule, WarmupStableDecay) and exact(schedule.decay_fraction) * num_falling <= 1:
        yield "lr_scheduler.decay_fraction", f"of {steps} the decay takes no more than one, which begins at the peak"


def without_effect_on_loss(config: Config, trained: Sequence[Sample], measured: Sequence[Sample]) -> Notes:
    """Yield the keys of the loss that need images or captions that are not there."""
    everything = (*trained, *measured)
    if config.model.multiscale_loss_weight is not None and all(
        (sample.size.width * sample.size.height) ** 0.5 < MULTISCALE_SIDE for sample in everything
    ):
        why = f"all images have fewer pixels than {MULTISCALE_SIDE:.0f} x {MULTISCALE_SIDE:.0f}"
        yield "model.multiscale_loss_weight", why
    if config.normalize_masked_loss and not any(sample.has_mask for sample in everything):
        yield "normalize_masked_loss", "no image has a mask"
    if config.uncond_fraction and not any(any(sample.plain_captions()) for sample in trained):
        yield "uncond_fraction", "every caption is empty"


def without_effect_here(config: Config, spec: ModelSpec) -> Notes:
    """Yield the keys that change nothing with these files, or on this device."""
    model = config.model
    stored = {entry.dtype for entry in spec.files.transformer_header.entries.values()}
    if config.adapter.leaves_base and model.uses_autocast and stored == {torch.bfloat16}:
        why = (
            "the file holds bfloat16, an adapter leaves the base weights as they are, and they compute in bfloat16: "
            "float32 only doubles their memory"
        )
        yield "model.transformer_dtype", why
    if spec.device.type != "cpu":
        return
    if model.text_encoder_device == "cpu":
        yield "model.text_encoder_device", "training is on the CPU, too"
    if getattr(config.optimizer, "moments_device", "") == "cpu":
        yield "optimizer.moments_device", "training is on the CPU, too"


def unmeasured_kinds(trained: Iterable[Sample], measured: Iterable[Sample]) -> Notes:
    """Yield the kinds of directories of the training set that no evaluation set has."""
    kinds = {sample.options.kind for sample in measured} | {""}
    for index in sorted({sample.directory for sample in trained if sample.options.kind not in kinds}):
        yield f"directory[{index}].kind", "only evaluation sets are told apart by it"


def unused_sizes(key: str, sizes: BatchSizes | None, samples: Iterable[Sample]) -> Notes:
    """Yield the key once for each of its [resolution, number] that no sample gets."""
    if sizes is None or isinstance(sizes, int):
        return
    used = {batch_entry_for(sizes, sample.resolution) for sample in samples}
    for entry in sizes if used else ():
        if tuple(entry) not in used:
            yield key, f"no resolution is nearest to that of {list(entry)}"
