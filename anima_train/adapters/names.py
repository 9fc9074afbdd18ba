"""Key names in the files users load elsewhere; with `model/weights.py` the only place that knows a prefix."""

LORA_PREFIX = "diffusion_model."  # loads in ComfyUI and in diffusers
CHECKPOINT_PREFIX = "net."


def lora_key(module: str, part: str) -> str:
    """The key of `lora_A` or `lora_B` of a module, by its full name in the transformer."""
    return f"{LORA_PREFIX}{module}.{part}.weight"


def checkpoint_key(parameter: str) -> str:
    """The key of a parameter in a full checkpoint."""
    return CHECKPOINT_PREFIX + parameter
