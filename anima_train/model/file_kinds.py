"""The kinds of model files, told apart by the names and shapes in their headers."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from anima_train.core.errors import ModelFileError
from anima_train.core.format import count
from anima_train.model.comfy_quantized import dequantized
from anima_train.model.safetensors_io import FLOATS, Entry, TensorFile, first_five, open_header
from anima_train.model.variants import ANIMA, COSMOS, FAMILIES, told_family

TRANSFORMER_PREFIXES = ("net.", "model.diffusion_model.", "diffusion_model.", "")
LLM_ADAPTER_PREFIX = "llm_adapter."
COMPILED = re.compile(r"_orig_mod[._]")  # what torch.compile puts into names
# A bundle, ComfyUI's "save checkpoint", has all parts in one file: the key by which it is known, and prefixes of parts.
BUNDLE_KEY = "model.diffusion_model.x_embedder.proj.1.weight"
BUNDLE_PARTS = {"vae": r"vae\.", "text_encoder": r"text_encoders\.\w*qwen3\w*\.transformer\."}
INDEX = ".safetensors.index.json"
SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
is_buffer = re.compile(r"(^|\.)pos_embedder\.|\.inv_freq$").search  # in some files; computed here, never read
SLOTS = {
    "transformer": "an Anima transformer",
    "cosmos": "a Cosmos-Predict2 transformer (no LLM adapter)",
    "llm_adapter": "an Anima LLM adapter",
    "text_encoder": "a Qwen3 text encoder",
    "t5": "the T5-XXL encoder of Cosmos-Predict2",
    "vae": "the Qwen-Image VAE in Wan names",
}
SLOT_KEYS = {
    "transformer": "model.transformer_path",
    "cosmos": "model.transformer_path",
    "llm_adapter": "model.llm_adapter_path",
    "text_encoder": "model.llm_path",
    "t5": "model.t5_path",
    "vae": "model.vae_path",
}
TYPES = {  # the `type` of [model] that reads the kind, where only one does
    "transformer": "anima",
    "llm_adapter": "anima",
    "text_encoder": "anima",
    "cosmos": "cosmos_predict2",
    "t5": "cosmos_predict2",
}
A_LORA, AN_ADAPTER = "a LoRA", "an adapter that is no plain LoRA"
OTHER_ADAPTER = "an adapter of a kind that is not read"
ADAPTERS = (A_LORA, AN_ADAPTER, OTHER_ADAPTER)
RENAMED_TRANSFORMER = "a transformer in diffusers names, not in ComfyUI's"
RENAMED_VAE = "a VAE in diffusers names, not in Wan's"
# Key pattern -> a key of `SLOTS`, or a description. The first pattern found in any name counts.
SIGNATURES = (
    (r"\.(oft|boft|glora)_|\.lora_(magnitude|mid)|^lllite_", OTHER_ADAPTER),
    (r"\.(lokr|hada)_|\.(dora_scale|diff|diff_b|set_weight|[wb]_norm)$", AN_ADAPTER),
    (r"(^|[._])lora[._]", A_LORA),
    (r"(^|\.)blocks\.block0\.", "a Cosmos-Predict1 transformer"),
    (rf"^({'|'.join(map(re.escape, TRANSFORMER_PREFIXES))})x_embedder\.proj\.1\.weight$", "transformer"),
    (r"(^|\.)x_embedder\.proj\.1\.weight$", "a transformer like Anima's, but with another prefix to its keys"),
    (r"^conditioner\.embedders\.", "a Stable Diffusion XL checkpoint"),
    (r"^cond_stage_model\.", "a Stable Diffusion 1 or 2 checkpoint"),
    (r"(^|\.)input_blocks\.0\.0\.", "a Stable Diffusion U-Net"),
    (r"(^|\.)joint_blocks\.\d+\.", "a Stable Diffusion 3 transformer"),
    (r"(^|\.)double_blocks\.\d+\.img_attn", "a Flux transformer"),
    (r"(^|\.)blocks\.\d+\.cross_attn\.norm_q\.weight$", "a Wan video transformer"),
    (r"(^|\.)transformer_blocks\.\d+\.attn1?\.to_q\.", RENAMED_TRANSFORMER),
    (r"(^|\.)blocks\.0\.norm_cross_attn\.weight$", "llm_adapter"),
    (r"(^|\.)text_model\.(encoder|embeddings)\.", "a CLIP text encoder"),
    (r"(^|\.)layers\.\d+\.(pre_feedforward_layernorm|post_ffw_norm)\.", "a Gemma text encoder"),
    (r"(^|\.)layers\.\d+\.mlp\.experts\.", "a mixture-of-experts language model"),
    (r"^(model\.)?layers\.0\.self_attn\.q_norm\.weight$", "text_encoder"),
    (r"(^|\.)layers\.\d+\.self_attn\.q_proj\.bias$", "a Qwen2 text encoder"),
    (r"(^|\.)layers\.\d+\.self_attn\.q_proj\.weight$", "a language model that is not Qwen3"),
    (r"(^|\.)encoder\.block\.\d+\.layer\.1\.DenseReluDense\.wi_0\.", "a T5 v1.1 text encoder"),
    (r"^encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight$", "t5"),
    (r"^encoder\.downsamples\.0\.residual\.0\.gamma$", "vae"),
    (r"^encoder\.downsamples\.0\.downsamples\.", "the VAE of Wan 2.2"),
    (r"^(first_stage_model\.|vae\.)?encoder\.down\.\d+\.block\.", "an SD or Flux VAE"),
    (r"^(encoder|decoder)\.(mid_block|down_blocks|up_blocks)\.", RENAMED_VAE),
)
SIGNATURE_KEYS = {  # those that every file of the kind has, without prefix
    "transformer": "x_embedder.proj.1.weight",
    "cosmos": "x_embedder.proj.1.weight",
    "llm_adapter": "blocks.0.norm_cross_attn.weight",
    "text_encoder": "layers.0.self_attn.q_norm.weight",
    "t5": "encoder.block.0.layer.0.SelfAttention.q.weight",
    "vae": "encoder.downsamples.0.residual.0.gamma",
}
# What to do with a file of this kind (second) in this slot (first; None: in any), where it is not just another key that
# it is for.
REMEDIES: Mapping[tuple[str | None, str], str] = {
    ("transformer", "cosmos"): (
        'give the LLM adapter as model.llm_adapter_path, or a file with it inside; or write type = "cosmos_predict2"'
    ),
    ("cosmos", "transformer"): 'write type = "anima"',
    ("transformer", RENAMED_TRANSFORMER): "`anima convert FOLDER OUT --to comfyui` makes a file of its folder",
    (None, A_LORA): "a LoRA to begin with is init_from_existing, in [adapter]",
    (None, AN_ADAPTER): "`anima merge FILE --into TRANSFORMER --out OUT` makes a transformer of both",
    (None, OTHER_ADAPTER): "`anima verify` tells what it is",
    ("t5", "a T5 v1.1 text encoder"): "Cosmos-Predict2 reads the first T5, such as oldt5_xxl_fp16.safetensors",
}
# Tensors that the dimensions of each model are read from, with the number of sides: no module is built without them.
DIMENSIONS: Mapping[str, Mapping[str, int]] = {
    "transformer": {
        "x_embedder.proj.1.weight": 2,
        "blocks.0.self_attn.q_norm.weight": 1,
        "blocks.0.cross_attn.k_proj.weight": 2,
        "blocks.0.adaln_modulation_self_attn.1.weight": 2,
    },
    "llm_adapter": {"embed.weight": 2, "blocks.0.cross_attn.k_proj.weight": 2, "blocks.0.cross_attn.q_norm.weight": 1},
    "text_encoder": {
        "embed_tokens.weight": 2,
        "layers.0.self_attn.q_norm.weight": 1,
        "layers.0.self_attn.q_proj.weight": 2,
        "layers.0.self_attn.k_proj.weight": 2,
        "layers.0.mlp.gate_proj.weight": 2,
    },
    "t5": {
        "shared.weight": 2,
        "encoder.block.0.layer.0.SelfAttention.q.weight": 2,
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": 2,
        "encoder.block.0.layer.1.DenseReluDense.wi.weight": 2,
    },
    "vae": {"encoder.downsamples.0.residual.0.gamma": 4},
}


def open_slot(path: Path, slot: str) -> TensorFile:
    """Return the header of the file given for a slot; of a bundle, the part that belongs there.

    Raises:
        ModelFileError: it cannot be read, or is a folder, or the index or a part of a model in several files.
    """
    if (fault := several_files_fault(path, slot)) is not None:
        raise ModelFileError(f"{SLOT_KEYS[slot]}: {fault}")
    return bundle_part(dequantized(uncompiled(open_header(path))), slot)


def several_files_fault(path: Path, slot: str) -> str | None:
    """Return why a path does not lead to a model in a single file, and what to give instead; None if it may."""
    has_folder = slot in ("text_encoder", "t5")
    whole = "its folder, with config.json" if has_folder else "one file that holds all, as ComfyUI has it"
    if path.name.endswith(INDEX):
        return f"{path} is the list of a model in several files; give {whole}"
    if SHARD.search(path.name):
        return f"{path} is one of several files of a model; give {whole}"
    if not path.is_dir():
        return None
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1 and not SHARD.search(files[0].name):
        return f"{path} is a folder; give the file in it: {files[0]}"
    if (path / "model_index.json").exists() or (path / "modular_model_index.json").exists():
        return f"{path} is a pipeline of diffusers; give {whole}"
    return f"{path} is a folder{' of several files' if files else ' without a .safetensors file'}; give {whole}"


def uncompiled(file: TensorFile) -> TensorFile:
    """Return a file with the keys that its model had before torch.compile."""
    entries = {COMPILED.sub("", name): entry for name, entry in file.entries.items()}
    return TensorFile(file.path, entries, file.metadata) if len(entries) == len(file.entries) else file


def bundle_part(file: TensorFile, slot: str) -> TensorFile:
    """Return the part of a bundle that belongs in a slot; any other file, and a bundle without the part, as it is."""
    names = file.entries
    if BUNDLE_KEY not in names:
        return file
    if slot in BUNDLE_PARTS:
        prefixes = (re.match(BUNDLE_PARTS[slot], name) for name in names)
        prefix = next((match[0] for match in prefixes if match), None)
        return file if prefix is None else file.stripped(prefix)
    return file.without(re.compile(r"vae\.|text_encoders\.").match)


def identify(file: TensorFile) -> str:
    """Return a key of `SLOTS` for files that this trainer uses, or a description such as "a LoRA"."""
    names = file.entries
    kind = next((kind for pattern, kind in SIGNATURES if any(re.search(pattern, name) for name in names)), None)
    if kind == "transformer":
        prefix = key_prefix(file, kind) + LLM_ADAPTER_PREFIX
        return "transformer" if any(name.startswith(prefix) for name in names) else "cosmos"
    if kind is None:
        return "a file of unknown kind" + (f" (its first key is {min(names)})" if names else " (it holds no tensors)")
    return kind


def key_prefix(file: TensorFile, kind: str) -> str:
    """Return the prefix of the keys of a file of this kind (of `SLOTS`)."""
    key = SIGNATURE_KEYS[kind]
    found = [name.removesuffix(key) for name in file.entries if name.endswith(key)]
    return next((prefix for prefix in TRANSFORMER_PREFIXES if prefix in found), found[0])


def validate_kind(file: TensorFile, slot: str, *others: str) -> str:
    """Return the kind of the file given for a slot: the slot's own, or one of the others, in a dtype to train from.

    Raises:
        ModelFileError: "slot X expects Y; this looks like Z", or what keeps the model from being built.
    """
    kind, key = identify(file), SLOT_KEYS[slot]
    if kind not in (slot, *others):
        remedy = REMEDIES.get((slot, kind)) or REMEDIES.get((None, kind)) or place(kind)
        text = f"{key}: expects {SLOTS[slot]}; {file.path} looks like {SLOTS.get(kind, kind)}"
        raise ModelFileError(f"{text}; {remedy}" if remedy else text)
    kinds = Counter(entry.dtype for entry in file.without(is_buffer).entries.values())
    if quantised := {dtype: number for dtype, number in kinds.items() if dtype not in FLOATS}:
        listing = ", ".join(f"{number} {str(dtype).removeprefix('torch.')}" for dtype, number in quantised.items())
        raise ModelFileError(
            f"{key}: {file.path} is quantised ({listing} tensors); training needs the original in bf16 or fp32"
        )
    if problems := [f"{key}: {file.path}: {problem}" for problem in layout_problems(file, kind)]:
        raise ModelFileError(problems)
    return kind


def open_model(path: Path) -> tuple[TensorFile, str]:
    """Return the header of a transformer that a command is given, without buffers, and the prefix of its keys.

    Raises:
        ModelFileError: as `open_slot` and `validate_kind`.
    """
    file = open_slot(path, "transformer").without(is_buffer)
    if (kind := identify(file)) not in ("transformer", "cosmos"):  # told without the settings of a config
        raise ModelFileError(f"{path}: expected a transformer; this looks like {SLOTS.get(kind, kind)}")
    return file, key_prefix(file, validate_kind(file, "transformer", "cosmos"))


def family_of(names: Iterable[str], metadata: Mapping[str, str]) -> str:
    """Return the family of a transformer: without LLM adapter Cosmos-Predict2, unless its metadata tell Anima.

    Args:
        names: of its tensors, without prefix.
        metadata: of its file.
    """
    if any(name.startswith(LLM_ADAPTER_PREFIX) for name in names):
        return ANIMA
    return told_family(metadata) or FAMILIES[COSMOS]


def place(kind: str) -> str:
    """Return where a file of this kind belongs, in words; "" where nothing reads it."""
    of_type = f' (type = "{TYPES[kind]}")' if kind in TYPES else ""
    return f"it belongs in {SLOT_KEYS[kind]}{of_type}" if kind in SLOT_KEYS else ""


def layout_problems(file: TensorFile, kind: str) -> Iterator[str]:
    """Yield the faults in the keys of a file of this kind (of `SLOTS`) that show before a module is built."""
    prefix = key_prefix(file, kind)
    part = file.stripped(prefix)
    yield from dimension_problems(part.entries, "transformer" if kind == "cosmos" else kind)
    if kind == "transformer":
        yield from dimension_problems(part.stripped(LLM_ADAPTER_PREFIX).entries, "llm_adapter")
    outside = [name for name in file.entries if not name.startswith(prefix) and name != "lm_head.weight"]
    if outside:
        yield f"{len(outside)} keys unexpected: {first_five(outside)}"


def dimension_problems(entries: Mapping[str, Entry], kind: str) -> Iterator[str]:
    """Yield the reasons why the dimensions of a model cannot be read off its tensors (keys without prefix)."""
    for name, num_sides in DIMENSIONS[kind].items():
        shape = entries[name].shape if name in entries else None
        if shape is None:
            yield f"the tensor {name} is missing"
        elif len(shape) != num_sides or 0 in shape:
            yield f"the tensor {name} has the shape {shape}, expected {count(num_sides, 'side')}"
    numbers = {match[1] for name in entries if (match := re.match(r"(?:blocks|layers)\.(\d+)\.", name))}
    if absent := [str(number) for number in range(len(numbers)) if str(number) not in numbers]:
        yield f"{len(absent)} blocks missing among {len(numbers)}: {first_five(absent)}"
