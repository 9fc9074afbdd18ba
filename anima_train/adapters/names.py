"""The key names in files that users load elsewhere; beside `model/file_kinds.py` the only place that knows a prefix."""

import re
from collections.abc import Iterable

from anima_train.model.file_kinds import LLM_ADAPTER_PREFIX

LORA_PREFIX = "diffusion_model."  # loads in ComfyUI and in diffusers
CHECKPOINT_PREFIX = "net."

# Parts of a transformer's keys -> the same in diffusers' `CosmosTransformer3DModel`.
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

# What a transformer's modules with weights are called: of one block, outside of the blocks, and in the LLM adapter.
BLOCK_MODULES: tuple[str, ...] = (
    *(f"adaln_modulation_{part}.{layer}" for part in ("self_attn", "cross_attn", "mlp") for layer in (1, 2)),
    *(
        f"{part}.{name}"
        for part in ("self_attn", "cross_attn")
        for name in ("q_proj", "k_proj", "v_proj", "output_proj", "q_norm", "k_norm")
    ),
    "mlp.layer1", "mlp.layer2",
)  # fmt: skip
OUTER_MODULES = (
    "x_embedder.proj.1", "t_embedder.1.linear_1", "t_embedder.1.linear_2", "t_embedding_norm", "final_layer.linear",
    "final_layer.adaln_modulation.1", "final_layer.adaln_modulation.2",
)  # fmt: skip
LLM_ADAPTER_BLOCK_MODULES: tuple[str, ...] = (
    *(
        f"{part}.{name}"
        for part in ("self_attn", "cross_attn")
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    ),
    "norm_self_attn", "norm_cross_attn", "norm_mlp", "mlp.0", "mlp.2",
)  # fmt: skip
LLM_ADAPTER_MODULES = ("embed", "in_proj", "out_proj", "norm")
BIAS = re.compile(r"llm_adapter\.(in_proj|out_proj|blocks\.\d+\.mlp\.[02])\.bias")  # all that there are


def anima_modules(blocks: Iterable[int], llm_adapter_blocks: Iterable[int]) -> list[str]:
    """Return the full names of all modules with weights in a transformer with these blocks, LLM adapter included."""
    return [
        *OUTER_MODULES,
        *(f"blocks.{number}.{name}" for number in blocks for name in BLOCK_MODULES),
        *(LLM_ADAPTER_PREFIX + name for name in LLM_ADAPTER_MODULES),
        *(
            f"{LLM_ADAPTER_PREFIX}blocks.{number}.{name}"
            for number in llm_adapter_blocks
            for name in LLM_ADAPTER_BLOCK_MODULES
        ),
    ]


def lora_key(module: str, part: str) -> str:
    """Return the key of `lora_A` or `lora_B` of a module, by its full name in the transformer."""
    return f"{LORA_PREFIX}{module}.{part}.weight"


def module_key(module: str, part: str) -> str:
    """Return the key of a part of another adapter than a LoRA, such as `lokr_w1`, of a module by its full name."""
    return f"{LORA_PREFIX}{module}.{part}"


def checkpoint_key(parameter: str) -> str:
    """Return the key of a parameter in a full checkpoint."""
    return CHECKPOINT_PREFIX + parameter


def cosmos_key(key: str) -> str:
    """Return the name in diffusers' `CosmosTransformer3DModel` of a transformer's key (without prefix)."""
    for pattern, replacement in COSMOS_RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def diffusers_name(module: str) -> str:
    """Return diffusers' name of a module, with the name of the pipeline's component in front."""
    if module.startswith(LLM_ADAPTER_PREFIX):
        return "text_conditioner." + module.removeprefix(LLM_ADAPTER_PREFIX)
    return "transformer." + cosmos_key(f"{module}.").removesuffix(".")


def kohya_name(module: str) -> str:
    """Return kohya's name of a module."""
    return "lora_unet_" + module.replace(".", "_")


# Whose names these are, in the order of `lora_stems`.
STEM_FORMS = (
    "ComfyUI", "kohya", "diffusers", "PEFT", "PEFT", "bare", "bare", "bare", "bare", "LyCORIS", "LyCORIS", "OneTrainer",
)  # fmt: skip


def lora_stems(module: str) -> tuple[str, ...]:
    """Return the names that LoRA files have for a module, by its full name in the transformer."""
    of_diffusers = diffusers_name(module).replace(".", "_")
    return (
        LORA_PREFIX + module,  # ours, and ComfyUI's
        kohya_name(module),
        diffusers_name(module),
        "base_model.model." + module,  # PEFT
        "base_model.model." + LORA_PREFIX + module,
        "transformer." + module,
        CHECKPOINT_PREFIX + module,
        "model." + LORA_PREFIX + module,
        module,
        "lycoris_" + module.replace(".", "_"),
        "lycoris_" + of_diffusers.removeprefix("transformer_"),  # of a trainer with diffusers' model
        "lora_" + of_diffusers,
    )
