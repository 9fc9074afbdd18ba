"""Plain LoRA files of any trainer: read, and checked against the model."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from anima_train.adapters.names import lora_stems
from anima_train.core.errors import ModelFileError
from anima_train.core.format import count
from anima_train.model.file_kinds import ADAPTERS, LLM_ADAPTER_PREFIX, SLOTS, identify, uncompiled
from anima_train.model.loading import ModelFiles
from anima_train.model.safetensors_io import Entry, TensorFile, open_header, read_tensors

# PEFT's own state has the name of the adapter in its keys.
KEY = re.compile(r"(.+)\.(?:(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.default)?\.weight|(alpha))")
BLOCK = re.compile(r"(blocks[._])\d+")
STATE_KEY = re.compile(r"(.+)\.(lora_A|lora_B)")  # the parameters of a training state, beside which is
STATE_OF = "anima_train.state_of"  # the type of the adapter, in the metadata of a training state's weights
STATE_SCALE = "anima_train.scale"  # alpha / rank of all of them, or a table by module, in the file's metadata
PARTS = {"lora_A": "down", "lora_down": "down", "lora.down": "down", "lora_B": "up", "lora_up": "up", "lora.up": "up"}
DIFFUSERS_METADATA = "lora_adapter_metadata"
PEFT_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Update:
    """The addition of a LoRA to one weight: `scale * up @ down`."""

    down: Tensor  # (rank, in)
    up: Tensor  # (out, rank)
    scale: float  # alpha / rank


# Key pattern -> the model of a LoRA that is not of Anima. The first pattern found in any unknown key counts.
OTHER_LORAS = (
    (r"lora_unet_(down|up|input|output|mid|middle)_block|(down|up|mid)_blocks?\.|lora_te\d?_text_", "of SDXL or SD 1"),
    (r"double_blocks|single_blocks|single_transformer_blocks", "of Flux or HunyuanVideo"),
    (r"joint_blocks|(add_[qkv]_proj|to_add_out)", "of Stable Diffusion 3 or Qwen-Image"),
    (r"cross_attn[._][qkvo][._]lora|cross_attn[._][qkv]_img", "of Wan"),
    (r"(^|[._])layers[._]\d+[._](attention|feed_forward)[._]", "of Lumina or Z-Image"),
)
BY_RESIZE = "; `anima resize` makes one of it"
BY_EXTRACT = "; `anima extract BASE FILE` makes one of it"
# Key pattern -> what has it, and how it becomes a plain LoRA.
OTHER_FORMS = (
    (r"\.lokr_", "a LoKr", BY_RESIZE),
    (r"\.hada_", "a LoHa", BY_RESIZE),
    (r"dora_scale", "a DoRA", BY_EXTRACT),
    (r"lora_magnitude", "a DoRA", ""),
    (r"\.(oft|boft)_", "an OFT", ""),
    (r"^lllite_", "an LLLite, for control images", ""),
    (r"\.(glora|[ab][12])\.weight$", "a GLoRA", ""),
    (r"lora_mid", "a LoCon with a middle matrix", ""),
    (r"\.(diff|diff_b|set_weight|w_norm|b_norm)$", "a file of whole differences of weights", BY_EXTRACT),
)
TEXT_ENCODER = re.compile(r"^(lora_te\d?_|text_encoders?\.|te\d?\.)|(^|[._])text_model[._]")


Updates = Mapping[str, Update]  # by the full names of modules in the transformer
Shapes = Mapping[str, tuple[int, ...]]  # of the weights, by the full names of modules in the transformer
Keys = Mapping[str, Mapping[str, str]]  # module -> "down", "up" or "alpha" -> key in the file


def read_lora(path: Path, shapes: Shapes) -> dict[str, Update]:
    """Read a LoRA in the keys of ComfyUI (as ours are), kohya, diffusers or PEFT, or the weights of a training state.

    Args:
        path: a safetensors file.
        shapes: of every linear's weight; names in the LLM adapter begin with `llm_adapter.`

    Raises:
        ModelFileError: no LoRA, damaged, or of another model: how many keys do not fit, and the first.
    """
    file = uncompiled(open_header(path))
    if (kind := identify(file)) not in ADAPTERS:
        raise ModelFileError(f"{path}: expected a LoRA; this looks like {SLOTS.get(kind, kind)}")
    keys = keys_by_module(file, shapes)
    config = peft_config(file)
    tensors = dict(read_tensors(file))
    updates = {}
    for module, parts in keys.items():
        down, up = tensors[parts["down"]], tensors[parts["up"]]
        rank = len(down)
        if "alpha" in parts:
            scale = float(tensors[parts["alpha"]]) / rank
        elif STATE_SCALE in file.metadata:
            scale = state_scale(file, module)
        else:
            scale = peft_scale(config, parts["down"], rank)
        updates[module] = Update(down, up, scale)
    return updates


def keys_by_module(file: TensorFile, shapes: Shapes) -> Keys:
    """Return the keys of each module that the LoRA changes, all of them with tensors that fit.

    Raises:
        ModelFileError: how many do not fit, and the first, of each kind.
    """
    modules = {stem: module for module in shapes for stem in lora_stems(module)}
    pattern = STATE_KEY if STATE_SCALE in file.metadata else KEY
    found: dict[str, dict[str, str]] = defaultdict(dict)
    unknown, repeated = [], []
    for key in file.entries:
        match = pattern.fullmatch(key)
        module = None if match is None else modules.get(match[1])
        if match is None or module is None:
            unknown.append(key)
        elif (part := PARTS.get(match[2], "alpha")) in found[module]:
            repeated.append(key)
        else:
            found[module][part] = key
    halves = [name for parts in found.values() if not {"down", "up"} <= parts.keys() for name in parts.values()]
    misshapen = [
        f"{key} {file.entries[key].shape}"
        for module, parts in found.items()
        if {"down", "up"} <= parts.keys() and not fits(file, parts, shapes[module])
        for key in parts.values()
    ]
    # Not alpha, which may be an integer.
    matrices = {key: entry for key, entry in file.entries.items() if not key.endswith(".alpha")}
    quantised = [key for key, entry in matrices.items() if not entry.dtype.is_floating_point]
    if (fault := kind_fault(unknown, len(found))) is not None:
        raise ModelFileError(f"{file.path}: {fault}")
    deeper = [key for key in unknown if (match := pattern.fullmatch(key)) and BLOCK.sub(r"\g<1>0", match[1]) in modules]
    problems = [
        f"{file.path}: {count(len(keys), 'key')} {what}, such as {keys[0]}{remedy}"
        for keys, what, remedy in (
            (deeper, "for blocks that this model lacks", "; it was made for a model with more blocks"),
            ([key for key in unknown if key not in deeper], "unknown to this model", ""),
            (repeated, "repeating another", ""),
            (halves, "without a counterpart", "; half of it is missing: save or download it again"),
            (misshapen, "of another shape than the model's", ""),
            (quantised, "without floating-point numbers", ""),
        )
        if keys
    ]
    if problems:
        raise ModelFileError(problems)
    return found


def kind_fault(unknown: list[str], num_known: int) -> str | None:
    """Return what kind of LoRA has these unknown keys, and what to do; None if it is not known.

    Args:
        unknown: keys.
        num_known: the number of modules of this model that the file changes.
    """
    for pattern, form, remedy in OTHER_FORMS:
        if keys := [key for key in unknown if re.search(pattern, key)]:
            return (
                f"is {form} ({count(len(keys), 'key')} such as {keys[0]}); a plain LoRA is wanted, which has an up "
                f"and a down matrix and no others{remedy}"
            )
    return foreign_fault(unknown, num_known)


def foreign_fault(unknown: Sequence[str], num_known: int) -> str | None:
    """Return the other model, or the text encoder, that these unknown keys are of; arguments as of `kind_fault`."""
    if num_known == 0:
        for pattern, model in OTHER_LORAS:
            if any(re.search(pattern, key) for key in unknown):
                return f"is a LoRA {model}, not of Anima (it has {unknown[0]})"
    if keys := [key for key in unknown if TEXT_ENCODER.search(key)]:
        what = "only the text encoder" if num_known == 0 and len(keys) == len(unknown) else "the text encoder, too"
        return (
            f"changes {what} ({count(len(keys), 'key')} such as {keys[0]}), which anima-train cannot "
            "apply; draw with it in ComfyUI, or train the LoRA again with network_train_unet_only"
        )
    return None


def fits(file: TensorFile, parts: Mapping[str, str], shape: tuple[int, ...]) -> bool:
    """Return True if up times down has the shape of the weight, and alpha is one number."""
    down, up = file.entries[parts["down"]].shape, file.entries[parts["up"]].shape
    has_number = "alpha" not in parts or math.prod(file.entries[parts["alpha"]].shape) == 1
    return has_number and len(down) == len(up) == 2 and down[0] == up[1] > 0 and (up[0], down[1]) == shape


def peft_config(file: TensorFile) -> dict[str, Any]:
    """Return PEFT's settings, which hold alpha where the tensors do not: of diffusers' metadata, or PEFT's own file.

    Raises:
        ModelFileError: they cannot be read, or ask for something else than a plain LoRA.
    """
    beside = file.path.with_name(PEFT_CONFIG)
    if (text := file.metadata.get(DIFFUSERS_METADATA)) is None:
        if not any(key.startswith("base_model.model.") for key in file.entries) or not beside.is_file():
            return {}
        text = beside.read_text(encoding="utf-8", errors="replace")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{file.path}: the LoRA's settings for PEFT are damaged ({error})") from error
    if not isinstance(config, dict):
        raise ModelFileError(f"{file.path}: the LoRA's settings for PEFT are not a table")
    for key, value in config.items():
        if value and key.rpartition(".")[2] in ("use_dora", "alpha_pattern"):
            raise ModelFileError(f"{file.path}: the LoRA uses {key}, which is not read")
    return config


def state_scale(file: TensorFile, module: str) -> float:
    """Return the factor on a module's up times down that a training state keeps in its file.

    Raises:
        ModelFileError: it is damaged.
    """
    try:
        found = json.loads(file.metadata[STATE_SCALE])
        return float(found[module] if isinstance(found, dict) else found)
    except (ValueError, KeyError, TypeError, RecursionError):
        text = f"the metadata {STATE_SCALE} is no number, and no table of them; the file is damaged"
        raise ModelFileError(f"{file.path}: {text}") from None


def linear_shapes(files: ModelFiles) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight that a LoRA can change, by the full name of its module."""
    entries = {
        **files.transformer_header.entries,
        **{LLM_ADAPTER_PREFIX + name: entry for name, entry in files.llm_adapter_header.entries.items()},
    }
    return weight_shapes(entries)


def weight_shapes(entries: Mapping[str, Entry]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every matrix in a whole transformer, by the full name of its module."""
    return {
        name.removesuffix(".weight"): entry.shape
        for name, entry in entries.items()
        if name.endswith(".weight") and len(entry.shape) == 2
    }


def peft_scale(peft: Mapping[str, Any], key: str, rank: int) -> float:
    """Return the factor on up times down by PEFT's settings; 1 without them."""
    component = key.partition(".")[0]  # diffusers has settings for each
    settings = {name: peft.get(f"{component}.{name}", peft.get(name)) for name in ("lora_alpha", "use_rslora")}
    alpha = settings["lora_alpha"]
    if not isinstance(alpha, int | float):
        return 1.0
    return alpha / (math.sqrt(rank) if settings["use_rslora"] else rank)
