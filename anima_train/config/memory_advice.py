"""The settings that make a run need less memory, in the order of what they cost: for messages."""

from anima_train.adapters.full import Full
from anima_train.config.config import Config
from anima_train.model.recompute import POLICIES


def memory_suggestions(
    config: Config, resolution: int, batch_size: int, has_text_encoder: bool, is_evaluation: bool = False
) -> list[str]:
    """Return what makes the micro-batches of a bucket need less memory and is not done yet, that of least cost first.

    Args:
        config: of the run.
        resolution: of the bucket.
        batch_size: of the micro-batch.
        has_text_encoder: True if captions are encoded on the device while it trains.
        is_evaluation: True if the bucket is that of an evaluation set: nothing is kept for a backward pass.
    """
    trains_all = isinstance(config.adapter, Full)
    has_float32_weights = config.model.dtype == "bfloat16" and config.model.transformer_dtype == "float32"
    has_float32_moments = config.optimizer.type == "adamw_optimi" and config.optimizer.moments_dtype == "float32"
    kept_now = POLICIES[-1] if is_evaluation else config.recompute  # in evaluation there is no backward pass
    keeps_less = {policy: POLICIES.index(policy) > POLICIES.index(kept_now) for policy in POLICIES}
    trains_llm_adapter = config.learning_rates().by_component["llm_adapter"] != 0
    fewer = f"micro_batch_size_per_gpu below {batch_size} at resolution {resolution}"
    instead = ", without checkpointed_blocks" if config.checkpointed_blocks else ""  # they exclude each other
    suggestions = {
        # Without any effect on what is learned.
        'model.dtype = "bfloat16" (faster, too)': config.model.dtype == "float32",
        "no model.transformer_dtype (the frozen weights need not be float32)": has_float32_weights and not trains_all,
        'model.text_encoder_device = "cpu" (captions are encoded more slowly)': has_text_encoder,
        f"eval_{fewer}": batch_size > 1 and is_evaluation,
        f"{fewer}, with more gradient_accumulation_steps": batch_size > 1 and not is_evaluation,
        'activation_checkpointing = "selective" (half of the activations, at most 8 % more work)': (
            keeps_less["selective"]
        ),
        'checkpointed_blocks = 8 or more, with "selective" (these keep far less, for about 40 % more work in them)': (
            keeps_less["blocks"] and not config.checkpointed_blocks
        ),
        f"activation_checkpointing = true{instead} (far fewer, about 40 % more work)": keeps_less["blocks"],
        f'activation_checkpointing = "offload"{instead} (fewer again, and copies to the host and back)': (
            keeps_less["offload"]
        ),
        # With an effect, from here on.
        'no model.transformer_dtype, and optimizer.type = "adamw_optimi" (weights in bfloat16)': (
            trains_all and has_float32_weights
        ),
        'optimizer.moments_dtype = "bfloat16" (some updates get too large)': trains_all and has_float32_moments,
        'model.transformer_dtype = "int8" (results change a little)': not (
            trains_all or has_float32_weights or config.model.quantization or config.model.dtype == "float32"
        ),
        "model.llm_adapter_lr = 0 (it is not trained)": trains_llm_adapter,
        f"a resolution below {resolution}": True,
        'adapter.type = "lora" (instead of the whole model)': trains_all,
    }
    return [suggestion for suggestion, helps in suggestions.items() if helps]


def cache_suggestions(batch_size: int | None, text_encoder_device: str) -> list[str]:
    """Return what makes filling the cache need less memory and is not done yet, that of least cost first."""
    found = []
    if batch_size is not None and batch_size > 1:  # what is chosen gets smaller by itself
        found.append(f"caching_batch_size below {batch_size}")
    if text_encoder_device != "cpu":
        found.append('model.text_encoder_device = "cpu"')
    return [*found, "lower resolutions"]
