"""Fields of the main file that exclude each other, or could not take effect beside each other, and the reasons.

Each check belongs to the last field it concerns, so that all faults are found at once. It takes the field's value and
the fields above it that are right by themselves, and returns the fault, with what to do, or None.
"""

from collections.abc import Callable, Mapping
from typing import Any

from anima_train.adapters.choice import AnyAdapter
from anima_train.adapters.full import Full
from anima_train.adapters.lora import Lora
from anima_train.config.sections import (
    EarlyStopping,
    EvalDataset,
    PreservationSettings,
    Sampling,
    metric_fault,
    score_fault,
)  # fmt: skip
from anima_train.core.settings import describe_value, quoted
from anima_train.optim.ema import Ema
from anima_train.optim.groups import COMPONENTS
from anima_train.optim.lr_schedules import Constant
from anima_train.optim.optimizers import SCHEDULE_FREE, AnyOptimizer
from anima_train.sampling.names import SCORE

EVAL_INTERVALS = ("eval_every_n_epochs", "eval_every_n_steps", "eval_every_n_examples")
STATE_INTERVALS = ("checkpoint_every_n_epochs", "checkpoint_every_n_steps", "checkpoint_every_n_minutes")
DEFAULT_KEEP_LAST = 2
BASE_IS_LOST = (
    "needs eval_before_first_step = true in a full fine-tune: what the base does is measured then, and never again"
)
Earlier = Mapping[str, Any]


def end_fault(value: int | None, earlier: Earlier) -> str | None:
    """Require epochs or max_steps, after which the run ends."""
    if value is None and earlier.get("epochs", 1) is None:
        return "neither epochs nor max_steps is set; set at least one"
    return None


def constant_lr_fault(value: float | None, earlier: Earlier) -> str | None:
    """Refuse a warmup or schedule, which a constant rate does not have."""
    others = [key for key in ("lr_scheduler", "warmup_steps") if earlier.get(key) not in (None, 0, Constant())]
    if value is not None and others:
        return f"excludes {' and '.join(others)}; remove {'it' if len(others) == 1 else 'them'} or this"
    return None


def checkpointed_blocks_fault(number: int, earlier: Earlier) -> str | None:
    """Refuse some checkpointed blocks where the others are not "selective"."""
    policy = earlier.get("activation_checkpointing", "selective")  # missing: it has a fault of its own
    if not number or policy == "selective":
        return None
    if policy is False:
        return 'needs activation_checkpointing = "selective", which is for the other blocks; set it, or remove this key'
    written = f"activation_checkpointing = {describe_value(policy)}"
    return (
        f'with {written} all blocks are checkpointed anyway; write "selective" there, for the others, '
        "or remove this key"
    )


def attention_fault(value: str, earlier: Earlier) -> str | None:
    """Refuse the kernel that does not give the same bits each time where that is asked for."""
    if value == "cudnn" and earlier.get("deterministic"):
        return 'found "cudnn", which torch does not allow with deterministic = true; use "auto"'
    return None


def loss_fault(value: float | None, earlier: Earlier) -> str | None:
    """Refuse a second loss."""
    others = [key for key in ("huber_delta", "smooth_l1_beta") if earlier.get(key) is not None]
    return f"chooses another loss than {' and '.join(others)}; keep one" if value is not None and others else None


def set_names_fault(value: list[EvalDataset], earlier: Earlier) -> str | None:
    """Require a name for every set that no other curves have."""
    names = [dataset.name for dataset in value]
    for name in {"train", "preservation"} & set(names):
        return f"found the name {quoted(name)}, which is that of samples that are trained"
    if "evaluation" in names:
        return 'found the name "evaluation", which is that of what all sets say together'
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        return f"two sets are called {', '.join(map(quoted, repeated))}, and would share a curve"
    return None


def never_evaluated_fault(value: bool, earlier: Earlier) -> str | None:
    """Require a time at which the evaluation sets are evaluated."""
    if not value and earlier.get("eval_datasets") and not any(map(earlier.get, EVAL_INTERVALS)):
        return f"found false, so eval_datasets are never evaluated; set {' or '.join(EVAL_INTERVALS)}"
    return None


def best_fault(value: str | None, earlier: Earlier) -> str | None:
    """Refuse a number that cannot decide."""
    return None if value is None else metric_fault(value, earlier.get("eval_datasets", ()))


def undecided_fault(value: str | float | EarlyStopping | None, earlier: Earlier) -> str | None:
    """Require the evaluations that are to decide, and that of the base where a difference from it does."""
    metric = value.metric if isinstance(value, EarlyStopping) else value
    if metric is None or (isinstance(metric, str) and "/" not in metric):  # nothing, or what no evaluation logs
        return None
    if all(earlier.get(key, 1) is None for key in EVAL_INTERVALS):
        return f"needs evaluations after some steps, which decide; set {' or '.join(EVAL_INTERVALS)}"
    compares = str(metric).startswith("evaluation/") or str(metric).endswith("/difference_from_base")
    if compares and not earlier.get("eval_before_first_step", True):
        return f"{quoted(str(metric))} needs eval_before_first_step = true: the base is measured then"
    return None


def budget_fault(value: float | None, earlier: Earlier) -> str | None:
    """Require a set on which forgetting is measured."""
    sets = earlier.get("eval_datasets", ())
    if value is not None and not any(each.role == "retention" and each.measures_drift for each in sets):
        return 'needs a set in eval_datasets with role = "retention", such as captions = "shipped"'
    return None


def at_budget_fault(value: str, earlier: Earlier) -> str | None:
    """Refuse to go on at a budget that there is not."""
    if value != "stop" and earlier.get("forgetting_budget", 1) is None:
        return "has no effect without forgetting_budget"
    return None


def strengths_fault(value: list[float], earlier: Earlier) -> str | None:
    """Require a set on which learning or forgetting is measured."""
    sets = earlier.get("eval_datasets", ())
    if value and not any(each.role in ("validation", "retention") for each in sets):
        return 'needs a set in eval_datasets with role = "validation" or "retention"'
    if value and not any(value):
        return "holds 0 alone, which is the base, and always tried beside others; add others, such as 0.5 and 1.0"
    return None


def keep_last_fault(value: int, earlier: Earlier) -> str | None:
    """Refuse it in a run that saves no training states."""
    if value != DEFAULT_KEEP_LAST and all(earlier.get(key, 1) is None for key in STATE_INTERVALS):
        return f"has no effect, as no training state is saved; set {' or '.join(STATE_INTERVALS)}"
    return None


def lost_base_fault(adapter: AnyAdapter, earlier: Earlier) -> str | None:
    """Refuse to measure drift where the base model is gone before it is measured."""
    drifts = [f"drift of eval_datasets {each.name}" for each in earlier.get("eval_datasets", ()) if each.drift]
    if "/drift" in (earlier.get("keep_best") or ""):
        drifts.append("keep_best")
    if earlier.get("forgetting_budget") is not None:
        drifts.append("forgetting_budget")
    return f"{drifts[-1]} {BASE_IS_LOST}" if drifts and base_is_lost({**earlier, "adapter": adapter}) else None


def no_strength_fault(adapter: AnyAdapter, earlier: Earlier) -> str | None:
    """Refuse to try strengths of a whole model, and of a DoRA."""
    if isinstance(adapter, Full) and earlier.get("strengths_after_training"):
        return "a full fine-tune has no strength, as an adapter has; remove strengths_after_training"
    if isinstance(adapter, Lora) and adapter.use_dora and earlier.get("strengths_after_training"):
        return (
            "use_dora: at a strength, ComfyUI draws with weights between the base's and the trained ones, which a "
            "run does not have; remove strengths_after_training, and draw strengths with anima compare"
        )
    return None


def weights_fault(adapter: AnyAdapter, earlier: Earlier) -> str | None:
    """Refuse to train weights of a byte a value, to read them, and to divide what is of whole rows."""
    model = earlier.get("model")
    quantization = None if model is None else model.quantization
    if isinstance(adapter, Full):
        if quantization is None:
            return None
        return (
            f'found "full", the whole model, with model.transformer_dtype = "{quantization}", '
            "whose steps are too coarse for updates; remove that, or train a LoRA"
        )
    if earlier.get("sharding") and isinstance(adapter, Lora) and adapter.use_dora:
        return "use_dora: excludes sharding, as its lengths are of whole rows; remove one of them"
    if quantization and (reader := adapter.reads_base):
        return (
            f'{reader} reads the base weights, which model.transformer_dtype = "{quantization}" rounds to a byte; '
            "remove one of them"
        )
    return None


def frozen_fault(optimizer: AnyOptimizer, earlier: Earlier) -> str | None:
    """Require a learning rate above 0 for something."""
    model, adapter = earlier.get("model"), earlier.get("adapter")
    # What belongs to no component has no linear for a LoRA.
    components = COMPONENTS[:-1] if adapter is not None and adapter.leaves_base else COMPONENTS
    if model is not None and all(model.learning_rate(component, optimizer.lr) == 0 for component in components):
        return "lr is 0 for every component that could be trained; nothing would be"
    return None


def optimizer_fault(optimizer: AnyOptimizer, earlier: Earlier) -> str | None:
    """Refuse an optimizer that cannot work with keys above it."""
    clipping, accumulation = earlier.get("gradient_clipping"), earlier.get("gradient_accumulation_steps", 1)
    if optimizer.releases_gradients and clipping:
        return (
            f"gradient_release excludes gradient_clipping (it is {clipping:g}): the norm is known only after the last "
            "update; set gradient_clipping = 0, or remove gradient_release"
        )
    if optimizer.releases_gradients and accumulation > 1:
        return (
            f"gradient_release excludes gradient_accumulation_steps (it is {accumulation}): a gradient is gone before "
            "the next micro-batch; set 1 and a larger micro_batch_size_per_gpu, or remove gradient_release"
        )
    if optimizer.type in SCHEDULE_FREE and swaps_what_is_trained(earlier):
        return (
            f"{optimizer.type} excludes blocks_to_swap in a full fine-tune: it has to look at all weights at once, and "
            'swapped blocks are updated one after the other; take "adamw_optimi", or remove blocks_to_swap'
        )
    return None


def preservation_fault(value: PreservationSettings | None, earlier: Earlier) -> str | None:
    """Refuse to keep a base that is not there, or that what is saved would not be held to."""
    adapter = earlier.get("adapter")
    if value is None:
        return None
    if isinstance(adapter, Full):
        return (
            "needs [adapter]: a full fine-tune has no base beside it; add a [[directory]] with "
            'role = "regularization" instead'
        )
    if isinstance(adapter, Lora) and adapter.masks_ranks:
        return (
            "excludes min_rank in [adapter]: the masked LoRA would be held to the base, and the file acts whole; "
            'remove one of them, or add a [[directory]] with role = "regularization" instead'
        )
    if earlier.get("sharding") is not None:
        return "excludes sharding: a process asks the base alone; remove one of them"
    return None


def average_fault(average: Ema | None, earlier: Earlier) -> str | None:
    """Refuse an average that cannot work with keys above it."""
    if average is None:
        return None
    if swaps_what_is_trained(earlier):
        return "follows weights on the device, where blocks_to_swap does not keep them; remove one of them"
    if getattr(earlier.get("optimizer"), "type", "") in SCHEDULE_FREE:
        return "excludes a schedule-free optimizer, which has an average of its own; remove [ema]"
    return None


def thumbnail_fault(value: Sampling | None, earlier: Earlier) -> str | None:
    """Require the pictures of which one goes into saved files."""
    metadata = earlier.get("metadata")
    if value is None and metadata is not None and metadata.thumbnail:
        return "missing, from whose previews metadata.thumbnail is taken; add it, or remove thumbnail"
    return None


def best_preview_fault(value: Sampling | None, earlier: Earlier) -> str | None:
    """Require the score that is to choose what is kept."""
    fault = score_fault(value) if earlier.get("keep_best") == SCORE else None
    return None if fault is None else f"keep_best = {quoted(SCORE)} {fault}"


def stopping_fault(value: EarlyStopping | None, earlier: Earlier) -> str | None:
    """Refuse a number that cannot decide, or that this run does not measure."""
    if value is None:
        return None
    fault = metric_fault(value.metric, earlier.get("eval_datasets", ()))
    if value.metric == SCORE and "sampling" in earlier and (lacks := score_fault(earlier["sampling"])) is not None:
        fault = f"{quoted(SCORE)} {lacks}"
    if fault is None and "/drift" in value.metric and base_is_lost(earlier):
        fault = BASE_IS_LOST
    return None if fault is None else f"metric: {fault}"


def base_is_lost(earlier: Earlier) -> bool:
    """Return True for a full fine-tune that does not look at its base before it changes."""
    return isinstance(earlier.get("adapter"), Full) and not earlier.get("eval_before_first_step", True)


def swaps_what_is_trained(earlier: Earlier) -> bool:
    """Return True for a full fine-tune that swaps blocks."""
    return bool(earlier.get("blocks_to_swap")) and isinstance(earlier.get("adapter"), Full)


CHECKS: Mapping[str, tuple[Callable[[Any, Earlier], str | None], ...]] = {
    "max_steps": (end_fault,),
    "force_constant_lr": (constant_lr_fault,),
    "checkpointed_blocks": (checkpointed_blocks_fault,),
    "attention": (attention_fault,),
    "smooth_l1_beta": (loss_fault,),
    "pseudo_huber_c": (loss_fault,),
    "eval_datasets": (set_names_fault,),
    "eval_before_first_step": (never_evaluated_fault,),
    "keep_best": (best_fault, undecided_fault),
    "forgetting_budget": (budget_fault, undecided_fault),
    "at_budget": (at_budget_fault,),
    "strengths_after_training": (strengths_fault,),
    "keep_last": (keep_last_fault,),
    "adapter": (lost_base_fault, no_strength_fault, weights_fault),
    "optimizer": (frozen_fault, optimizer_fault),
    "preservation": (preservation_fault,),
    "ema": (average_fault,),
    "sampling": (thumbnail_fault, best_preview_fault),
    "early_stopping": (stopping_fault, undecided_fault),
}
