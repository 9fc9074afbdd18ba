"""Settings that exclude each other, and the reasons."""

from collections.abc import Mapping
from typing import Any

from anima_train.adapters.choice import AnyAdapter
from anima_train.adapters.full import Full
from anima_train.adapters.lora import Lora
from anima_train.core.settings import describe_value
from anima_train.optim.ema import Ema
from anima_train.optim.optimizers import SCHEDULE_FREE, AnyOptimizer

BASE_IS_LOST = (
    "needs eval_before_first_step = true in a full fine-tune: what the base does is measured then, and never again"
)


def optimizer_fault(optimizer: AnyOptimizer, earlier: Mapping[str, Any]) -> str | None:
    """Return what an optimizer cannot work with, and what to do; None if it can with all of it.

    Args:
        optimizer: the table.
        earlier: the keys above it in the main file that are valid.
    """
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


def checkpointed_blocks_fault(number: int, earlier: Mapping[str, Any]) -> str | None:
    """Return the reason why some blocks cannot be checkpointed, and what to do; None if they can."""
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


def weights_fault(adapter: AnyAdapter, earlier: Mapping[str, Any]) -> str | None:
    """Return why an adapter cannot train, read or divide the weights as they are, and what to do; None if it can."""
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


def preservation_fault(earlier: Mapping[str, Any]) -> str | None:
    """Return why the base cannot be kept, and what to do; None if it can. The argument is as of `optimizer_fault`."""
    adapter = earlier.get("adapter")
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


def average_fault(average: Ema | None, earlier: Mapping[str, Any]) -> str | None:
    """Return what an average of the weights cannot work with, and what to do; None if it can with all of it."""
    if average is None:
        return None
    if swaps_what_is_trained(earlier):
        return "follows weights on the device, where blocks_to_swap does not keep them; remove one of them"
    if getattr(earlier.get("optimizer"), "type", "") in SCHEDULE_FREE:
        return "excludes a schedule-free optimizer, which has an average of its own; remove [ema]"
    return None


def base_is_lost(earlier: Mapping[str, Any]) -> bool:
    """Return True for a full fine-tune that does not look at its base before it changes."""
    return isinstance(earlier.get("adapter"), Full) and not earlier.get("eval_before_first_step", True)


def swaps_what_is_trained(earlier: Mapping[str, Any]) -> bool:
    """Return True for a full fine-tune that swaps blocks."""
    return bool(earlier.get("blocks_to_swap")) and isinstance(earlier.get("adapter"), Full)
