"""Key names in the files users load elsewhere; with `model/weights.py` the only place that knows a prefix."""

import re

LORA_PREFIX = "diffusion_model."  # loads in ComfyUI and in diffusers
CHECKPOINT_PREFIX = "net."
ADAPTER = "llm_adapter."

# Parts of a transformer's keys -> what diffusers' `CosmosTransformer3DModel` calls them.
COSMOS_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^x_embedder\.proj\.1\.", "patch_embed.proj."),
    (r"^t_embedder\.1\.", "time_embed.t_embedder."),
    (r"^t_embedding_norm\.", "time_embed.norm."),
    (r"^final_layer\.adaln_modulation\.", "norm_out.linear_"),
    (r"^final_layer\.linear\.", "proj_out."),
    (r"^blocks\.", "transformer_blocks."),
    (r"\.adaln_modulation_self_attn\.", ".norm1.linear_"),
    (r"\.adaln_modulation_cross_attn\.", ".norm2.linear_"),
    (r"\.adaln_modulation_mlp\.", ".norm3.linear_"),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.([qkv])_proj\.", r".to_\1."),
    (r"\.output_proj\.", ".to_out.0."),
    (r"\.([qk])_norm\.", r".norm_\1."),
    (r"\.mlp\.layer1\.", ".ff.net.0.proj."),
    (r"\.mlp\.layer2\.", ".ff.net.2."),
)


def lora_key(module: str, part: str) -> str:
    """The key of `lora_A` or `lora_B` of a module, by its full name in the transformer."""
    return f"{LORA_PREFIX}{module}.{part}.weight"


def checkpoint_key(parameter: str) -> str:
    """The key of a parameter in a full checkpoint."""
    return CHECKPOINT_PREFIX + parameter


def cosmos_key(key: str) -> str:
    """The name in diffusers' `CosmosTransformer3DModel` of a transformer's key (without prefix)."""
    for pattern, replacement in COSMOS_RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def diffusers_name(module: str) -> str:
    """What diffusers calls a module, with the name of the pipeline's component in front."""
    if module.startswith(ADAPTER):
        return "text_conditioner." + module.removeprefix(ADAPTER)
    return "transformer." + cosmos_key(f"{module}.").removesuffix(".")


def lora_stems(module: str) -> tuple[str, ...]:
    """What LoRA files call a module, by its full name in the transformer."""
    return (
        LORA_PREFIX + module,  # ours, and ComfyUI's
        "lora_unet_" + module.replace(".", "_"),  # kohya
        diffusers_name(module),
        "base_model.model." + module,  # PEFT
        "base_model.model." + LORA_PREFIX + module,
        "transformer." + module,
        module,
    )
