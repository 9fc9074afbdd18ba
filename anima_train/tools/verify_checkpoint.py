"""The kind of a checkpoint, and which of its keys ComfyUI and diffusers would use."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

import torch

from anima_train.adapters.names import anima_modules, cosmos_key
from anima_train.adapters.parts import BLOCK_NUMBER, numbers
from anima_train.core.errors import ModelFileError
from anima_train.core.format import count
from anima_train.model.comfy_quantized import FORMAT, TABLE, WEIGHT, dequantized, is_beside
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.file_kinds import (
    BUNDLE_KEY,
    LLM_ADAPTER_PREFIX,
    SLOTS,
    bundle_part,
    family_of,
    is_buffer,
    key_prefix,
    layout_problems,
)
from anima_train.model.llm_adapter import LLMAdapter, LLMAdapterShape
from anima_train.model.safetensors_io import FLOATS, TensorFile, first_five
from anima_train.model.variants import ANIMA, COSMOS, COSMOS_SIZES, FAMILIES, VARIANTS, told_family
from anima_train.tools.verdict import Reading, Verdict
from anima_train.tools.verify_adapter import TRAINED_ON, TRAINED_WITH, first_of

COMFY_PREFIXES = ("net.", "model.diffusion_model.", "")
COMFY_BLOCKS = {2048: 28, 5120: 36}  # by the width, up to ComfyUI 0.33.0; other widths
COMFY_OTHER_BLOCKS = 10
NEEDS_FOLDER = "it takes a model as a folder, which `anima convert CONFIG OUT --to diffusers` writes"
NEEDS_OTHER_FOLDER = "it takes a model as a folder, which its own scripts/convert_cosmos_to_diffusers.py writes"
BUNDLED = re.compile(r"vae\.|text_encoders\.")


def checkpoint_verdict(file: TensorFile, kind: str, base: TensorFile | None) -> Verdict:
    """Return what a transformer file is.

    Args:
        file: its header, with the prefix.
        kind: "transformer" or "cosmos".
        base: another transformer's, without prefix, whose names and shapes are compared.
    """
    part = bundle_part(file, "transformer")
    prefix = key_prefix(part, kind)
    own = part.without(lambda name: is_buffer(name) or is_beside(name) or not name.startswith(prefix))
    tensors = own.stripped(prefix)
    is_anima = family_of(tensors.entries, file.metadata) == ANIMA
    faults = list(layout_problems(own, kind))
    wanted = base_shapes(base) if base is not None else {} if faults else expected_shapes(tensors, kind)
    missing = [name for name in wanted if name not in tensors.entries]
    whose = f"of {base.path.name} " if base is not None else ""
    problems = faults + ([f"{count(len(missing), 'tensor')} {whose}missing: {first_five(missing)}"] if missing else [])
    reasons = [
        (name, comfy_reason(name, prefix, file, wanted)) for name in file.entries if not is_buffer(name) and wanted
    ]
    facts = shape_facts(tensors, is_anima, prefix) if not faults else {}
    dtypes = Counter(str(entry.dtype).removeprefix("torch.") for entry in own.entries.values())
    facts |= {
        "dtype": ", ".join(f"{name} ({number:,})" for name, number in dtypes.most_common()),
        "trained on": first_of(file.metadata, TRAINED_ON),
        "trained with": first_of(file.metadata, TRAINED_WITH),
    }
    unreadable = "the dimensions of the model cannot be read off its tensors" if faults else None
    apart = NEEDS_FOLDER if is_anima else NEEDS_OTHER_FOLDER
    programs = {"ComfyUI": Reading.of(reasons, unreadable), "diffusers": Reading(refusal=apart)}
    bundled = "a bundle with " if BUNDLE_KEY in file.entries and any(map(BUNDLED.match, file.entries)) else ""
    told = {name: text for name, text in facts.items() if text}
    notes = [] if faults else list(checkpoint_notes(tensors, kind, file))
    text = "an Anima transformer that lacks its LLM adapter" if kind == "cosmos" and is_anima else SLOTS[kind]
    return Verdict(file.path.name, bundled + text, told, programs, problems, notes)


def comfy_reason(name: str, prefix: str, file: TensorFile, wanted: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return why ComfyUI would ignore a key of a checkpoint; None if it uses it."""
    if prefix == "model.diffusion_model." and BUNDLED.match(name):
        return None
    if prefix not in COMFY_PREFIXES:
        return f"their prefix is {prefix}, and it knows {', '.join(filter(None, COMFY_PREFIXES))} or none"
    if not name.startswith(prefix):
        return f"they lack the prefix {prefix} of the others"
    bare = name.removeprefix(prefix)
    if is_beside(bare):
        return None
    if bare not in wanted:
        return "the model has no such tensor"
    entry = file.entries[name]
    is_described = TABLE in file.metadata or name.removesuffix(WEIGHT) + FORMAT in file.entries
    is_packed = entry.dtype == torch.uint8 and is_described  # several values in a byte
    return None if is_packed or entry.shape == wanted[bare] else "the model's have another shape"


def base_shapes(base: TensorFile) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a base."""
    return {name: entry.shape for name, entry in base.entries.items()}


def expected_shapes(tensors: TensorFile, kind: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the model whose dimensions these tensors (without prefix) have."""
    adapter = tensors.stripped(LLM_ADAPTER_PREFIX)
    with torch.device("meta"):
        wanted = dict(MiniTrainDIT(TransformerShape.of(tensors.entries)).state_dict())
        if kind == "transformer":
            parts = LLMAdapter(LLMAdapterShape.of(adapter.entries)).state_dict()
            wanted |= {LLM_ADAPTER_PREFIX + name: tensor for name, tensor in parts.items()}
    return {name: tuple(tensor.shape) for name, tensor in wanted.items()}


def shape_facts(tensors: TensorFile, is_anima: bool, prefix: str) -> dict[str, str]:
    """Return the dimensions of a transformer in words."""
    shape = TransformerShape.of(tensors.entries)
    variant = VARIANTS.get(shape.num_blocks) if shape.width == 2048 else None
    if not is_anima:
        is_whole = COMFY_BLOCKS.get(shape.width) == shape.num_blocks
        variant = f"{FAMILIES[COSMOS]} {COSMOS_SIZES[shape.width]}" if is_whole else None
    return {
        "variant": f"{variant or 'none of those known'} ({shape.num_blocks} blocks, width {shape.width})",
        "parameters": f"{tensors.num_values:,} in {count(len(tensors.entries), 'tensor')}",
        "channels": "17, one of them a mask" if shape.in_channels == 17 else "",
        "keys": f"prefix {prefix}" if prefix else "no prefix",
    }


def checkpoint_notes(tensors: TensorFile, kind: str, file: TensorFile) -> Iterable[str]:
    """Yield what users run into later."""
    shape = TransformerShape.of(tensors.entries)
    built = COMFY_BLOCKS.get(shape.width, COMFY_OTHER_BLOCKS)
    if built != shape.num_blocks:
        yield (
            f"ComfyUI up to 0.33.0 makes {built} blocks of this width, and the file has {shape.num_blocks}; later ones "
            "count them"
        )
    if kind == "cosmos" and told_family(file.metadata) == ANIMA:
        yield "ComfyUI takes it for Cosmos-Predict2, as it has no LLM adapter; anima-train needs model.llm_adapter_path"
    elif kind == "cosmos" and told_family(file.metadata) is None:
        yield (
            "it counts as Cosmos-Predict2, as it has no LLM adapter and its metadata do not tell Anima; in ComfyUI an "
            "Anima without it does, too. If it is one, give the LLM adapter as model.llm_adapter_path"
        )
    if any(map(is_beside, file.entries)) or any(entry.dtype not in FLOATS for entry in tensors.entries.values()):
        yield quantization_note(file)


def quantization_note(file: TensorFile) -> str:
    """Return how the weights of a quantised file are read here, or why they are not."""
    try:
        kinds = {entry.dtype for entry in dequantized(file).entries.values()} - set(FLOATS)
    except ModelFileError as error:
        return f"it is quantised, and anima-train does not read it: {error}"
    if kinds:
        listing = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        return f"it is quantised, and anima-train does not read it: {listing} without a format that is known"
    return "it is quantised: anima-train reads it as bfloat16, with the rounding that it has"


def renamed_verdict(file: TensorFile, kind: str) -> Verdict:
    """Return what a part of a diffusers model is: the transformer, or the LLM adapter."""
    if kind == "llm_adapter":
        text, wanted = "an Anima LLM adapter, as diffusers' AnimaTextConditioner has it", set(file.entries)
    else:
        text = "a transformer in the names of diffusers' CosmosTransformer3DModel"
        modules = anima_modules(numbers(file.entries, BLOCK_NUMBER), ())
        wanted = {cosmos_key(f"{name}.weight") for name in modules if not name.startswith(LLM_ADAPTER_PREFIX)}
    reasons = ((name, None if name in wanted else "the model has no such tensor") for name in file.entries)
    missing = sorted(wanted - file.entries.keys())
    problems = [f"{count(len(missing), 'tensor')} missing: {first_five(missing)}"] if missing else []
    comfy = Reading(refusal="it knows the names of the official file, not diffusers'")
    facts = {"tensors": f"{len(file.entries):,}", "parameters": f"{file.num_values:,}"}
    return Verdict(file.path.name, text, facts, {"ComfyUI": comfy, "diffusers": Reading.of(reasons)}, problems)
