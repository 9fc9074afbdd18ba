"""The kind of an adapter file, and which of its keys ComfyUI and diffusers would use."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from anima_train.adapters.names import BIAS, LORA_PREFIX
from anima_train.adapters.parts import (
    BLOCK_NUMBER,
    LLLITE,
    AdapterKey,
    adapter_keys,
    declared_alpha,
    is_of_state,
    num_blocks,
)
from anima_train.adapters.read import OTHER_LORAS
from anima_train.adapters.updates import MIDDLES, change_shape, kind_of
from anima_train.core.format import count
from anima_train.model.file_kinds import family_of
from anima_train.model.safetensors_io import TensorFile, read_tensors
from anima_train.model.variants import ARCHITECTURE, VARIANTS, family_warning, is_of_cosmos
from anima_train.optim.groups import COMPONENTS, component_of
from anima_train.tools.verdict import Reading, Verdict

# Stems of text-encoder changes that ComfyUI loads for Anima since May 2026.
COMFY_TEXT_ENCODER = re.compile(r"lora_te_layers_\d+_|text_encoders\.qwen3_06b\.transformer\.model\.layers\.\d+\.")
TEXT_ENCODER = re.compile(r"lora_te\d?_|text_encoders?\.|te\d?\.")
# Of up and down, by ComfyUI's code. Here others are read, too.
COMFY_HALF = re.compile(r".+\.(lora_(down|up)\.weight|lora\.(down|up)\.weight|lora_[AB]((\.default)?\.weight)?)")
FORM_NAMES = {
    "ComfyUI": f"ComfyUI's ({LORA_PREFIX}MODULE)",
    "kohya": "kohya's (lora_unet_MODULE)",
    "diffusers": "diffusers' (transformer.MODULE, text_conditioner.MODULE)",
    "PEFT": "PEFT's (base_model.model.MODULE)",
    "bare": "the model's own (MODULE)",
    "LyCORIS": "LyCORIS' (lycoris_MODULE)",
    "OneTrainer": "OneTrainer's (lora_transformer_MODULE)",
}
KIND_NAMES = {"difference": "whole differences of weights", "replacement": "whole weights"}
# Kinds that ComfyUI reads, and nothing here computes.
BY_NAME = {"oft_blocks": "OFT", "a1.weight": "GLoRA"}
MAGNITUDE = "lora_magnitude_vector"
TRAINED_ON = ("ss_sd_model_name", "ss_base_model_version", ARCHITECTURE)
TRAINED_WITH = ("modelspec.implementation", "ss_network_module")

Groups = Mapping[str, Sequence[AdapterKey]]  # stem -> its keys; those of a bias apart


def adapter_verdict(file: TensorFile, base: TensorFile | None) -> Verdict:
    """Return what an adapter file is; with a base, its names and shapes are those that count."""
    modules = None if base is None else {name.rpartition(".")[0] for name in base.entries}
    keys = adapter_keys(file.entries, modules)
    groups: dict[str, list[AdapterKey]] = defaultdict(list)
    for key in keys:
        groups[key.parameter if key.module else key.stem].append(key)
    misfits = shape_faults(file, groups, base)
    kinds = Counter(group_kind(parts) or "" for parts in groups.values() if parts[0].stem)
    whose = family(file) if base is None else base.path.name
    comfy = Reading.of((key.key, comfy_reason(key, groups, misfits, whose)) for key in keys)
    refusal = diffusers_refusal(file.entries)
    diffusers = Reading.of(((key.key, diffusers_reason(key, groups, misfits)) for key in keys), refusal)
    problems = [*dict.fromkeys(misfits.values()), *halves(groups), *repetitions(groups)]
    return Verdict(
        file.path.name, kind_text(file, keys, kinds), facts(file, keys, groups, kinds),
        {"ComfyUI": comfy, "diffusers": diffusers}, problems, [*misalignment(file, keys, base), *notes(file, keys)],
    )  # fmt: skip


def group_kind(parts: Sequence[AdapterKey]) -> str | None:
    """Return the kind of change that the keys of one weight make; None if some of it is missing."""
    names = {key.change_part for key in parts}
    known = next((kind for part, kind in BY_NAME.items() if part in names), None)
    magnitude = {name for name in names if name.startswith(MAGNITUDE)}
    kind = known or kind_of(names - magnitude - MIDDLES)
    if kind and names & MIDDLES:
        return f"{kind} with a middle factor"
    return "DoRA in PEFT's keys" if magnitude and kind else kind


def kind_text(file: TensorFile, keys: Sequence[AdapterKey], kinds: Counter[str]) -> str:
    """Return the kind of a file in words."""
    names = list(file.entries)
    if any(LLLITE.match(name) for name in names):
        return "an LLLite, which steers with a control image"
    text = " and ".join(sorted(KIND_NAMES.get(kind, kind) for kind in kinds if kind)) or "parts of an adapter"
    if is_of_state(file):
        return f"{text} of a training state"
    if not any(key.module for key in keys):
        if any(COMFY_TEXT_ENCODER.match(name) for name in names):
            return f"{text} of Anima's text encoder"
        others = (model for pattern, model in OTHER_LORAS if any(re.search(pattern, name) for name in names))
        unknown = "of a text encoder" if any(map(TEXT_ENCODER.match, names)) else "of another model, not of Anima"
        return f"{text} {next((f'{model}, not of Anima' for model in others), unknown)}"
    return f"{text} of {family(file)}"


def family(file: TensorFile) -> str:
    """Return the model family that an adapter of Anima's modules was made for, as its metadata tell it."""
    return "Cosmos-Predict2" if is_of_cosmos(file.metadata) else "Anima"


def facts(file: TensorFile, keys: Sequence[AdapterKey], groups: Groups, kinds: Counter[str]) -> dict[str, str]:
    """Return what the header tells, and the numbers called alpha."""
    modules = {key.module for key in keys if key.module}
    by_component = Counter(component_of(f"{name}.") for name in modules)
    numbers = ", ".join(f"{key} {by_component[key]}" for key in COMPONENTS if by_component[key])
    forms = sorted({key.form for key in keys if key.form})
    ranks = Counter(rank for parts in groups.values() if (rank := rank_of(file, parts)) is not None)
    dtypes = Counter(str(entry.dtype).removeprefix("torch.") for entry in file.entries.values() if entry.shape)
    found = {
        "kinds": ", ".join(f"{kind} {number:,}" for kind, number in sorted(kinds.items()) if kind),
        "rank": ", ".join(str(rank) for rank in sorted(ranks)),
        "alpha": alpha_text(file),
        "modules": f"{len(modules):,} ({numbers})" if modules else "",
        "blocks": blocks_text(modules, {} if is_of_cosmos(file.metadata) else VARIANTS),
        "keys": " and ".join(FORM_NAMES[form] for form in forms),
        "dtype": ", ".join(dtypes),
        "trained on": first_of(file.metadata, TRAINED_ON),
        "trained with": first_of(file.metadata, TRAINED_WITH),
    }
    return {name: text for name, text in found.items() if text}


def alpha_text(file: TensorFile) -> str:
    """Return the values of alpha, and from where they are."""
    names = [name for name, entry in file.entries.items() if name.endswith(".alpha") and math.prod(entry.shape) == 1]
    if names:
        return ", ".join(f"{value:g}" for value in sorted({float(value) for _, value in read_tensors(file, names)}))
    if is_of_state(file):
        return "in the metadata of the state"
    declared = declared_alpha(file.metadata)
    return "none in tensors: scale 1" + (f" (metadata: {declared})" if declared else "")


def rank_of(file: TensorFile, parts: Iterable[AdapterKey]) -> int | None:
    """Return the rank of the change of one weight; None where it has none."""
    shapes = {key.part: file.entries[key.key].shape for key in parts}
    for part in ("down", "lokr_w2_b", "lokr_w1_b", "hada_w1_b"):
        if shapes.get(part):
            return shapes[part][0]
    return None


def blocks_text(modules: Collection[str | None], variants: Mapping[int, str]) -> str:
    """Return how many blocks are changed, and which variant has so many."""
    numbers = {int(match[1]) for name in modules if name and (match := re.match(r"blocks\.(\d+)\.", name))}
    if not numbers:
        return ""
    least = next((f"; {name} has {number}" for number, name in variants.items() if max(numbers) < number), "")
    return f"{len(numbers)}, up to number {max(numbers)}{least}"


def first_of(metadata: Mapping[str, str], names: Iterable[str]) -> str:
    """Return the metadata under these names that are there."""
    return ", ".join(dict.fromkeys(metadata[name] for name in names if metadata.get(name)))


def comfy_reason(key: AdapterKey, groups: Groups, misfits: Mapping[str, str], whose: str) -> str | None:
    """Return why ComfyUI would ignore a key; None if it uses it."""
    if LLLITE.match(key.key) or (key.stem and COMFY_TEXT_ENCODER.match(f"{key.stem}.")):
        return None
    if not key.stem:
        return "they are no part of an adapter that it knows"
    if key.module is None and TEXT_ENCODER.match(key.key):
        return "of a text encoder it looks for lora_te_layers_ and text_encoders.qwen3_06b.transformer.model.layers."
    if key.module is None:
        return f"{whose} has no such module"
    if key.form not in ("ComfyUI", "kohya"):
        is_read = kind_of({each.change_part for each in groups[key.parameter]}) is not None
        remedy = ", which `anima convert --to comfyui` writes" if is_read else ""
        return (
            f"their names are {FORM_NAMES[key.form or 'bare']}, and it looks for {LORA_PREFIX} and lora_unet_{remedy}"
        )
    if key.part in ("down", "up") and not COMFY_HALF.fullmatch(key.key):
        return "it looks for lora_A.weight and lora_B.weight, or lora_down.weight and lora_up.weight"
    if key.part.startswith(MAGNITUDE):
        return "it does not read PEFT's DoRA; it wants dora_scale"
    return incompleteness(key, groups, misfits)


def diffusers_reason(key: AdapterKey, groups: Groups, misfits: Mapping[str, str]) -> str | None:
    """Return why diffusers would ignore a key; None if it uses it."""
    if key.form not in ("ComfyUI", "diffusers"):
        return f"it looks for {LORA_PREFIX}, transformer. and text_conditioner. in its own names, and ignores others"
    if key.part == "dora_scale":
        return "it leaves DoRA's scales out"
    if key.part.startswith(MAGNITUDE):
        return None
    if not key.key.endswith(("lora_A.weight", "lora_B.weight")):
        return "it reads lora_A.weight and lora_B.weight alone"
    return incompleteness(key, groups, misfits)


def diffusers_refusal(names: Iterable[str]) -> str | None:
    """Return why diffusers would refuse a file with these keys; None if it would not."""
    if strangers := [name for name in names if "lora" not in name and "dora_scale" not in name]:
        return f"it takes no key without `lora` in it, such as {strangers[0]}"
    return None


def incompleteness(key: AdapterKey, groups: Groups, misfits: Mapping[str, str]) -> str | None:
    """Return why nothing can be made of a key with those beside it; None if something can."""
    if key.parameter in misfits:
        return "they do not fit the weight"
    return None if group_kind(groups[key.parameter]) else "what belongs to them is missing"


def halves(groups: Groups) -> list[str]:
    """Return what is missing of changes that are not whole."""
    lonely = [parts[0] for parts in groups.values() if parts[0].stem and group_kind(parts) is None]
    lonely = [key for key in lonely if not LLLITE.match(key.key)]
    if not lonely:
        return []
    return [f"{count(len(lonely), 'weight')} with some parts missing, such as those beside {lonely[0].key}"]


def repetitions(groups: Groups) -> list[str]:
    """Return the weights that have a part twice, under names of several programs."""
    whole = (parts for parts in groups.values() if parts[0].module)
    twice = [parts[0] for parts in whole if len({key.change_part for key in parts}) < len(parts)]
    if not twice:
        return []
    listing = f"{count(len(twice), 'weight')} changed twice, such as {twice[0].parameter}"
    return [f"{listing}: a program takes one of the two, or none"]


def shape_faults(file: TensorFile, groups: Groups, base: TensorFile | None) -> dict[str, str]:
    """Return what does not fit each other, or the base, by the full names of parameters."""
    found = {}
    for name, parts in groups.items():
        shapes = {key.change_part: file.entries[key.key].shape for key in parts}
        if parts[0].module is None or (shape := change_shape(shapes)) is None:
            continue
        if shape == () and "diff" not in shapes:
            listing = ", ".join(f"{part} {own}" for part, own in sorted(shapes.items()))
            found[name] = f"{name}: parts that do not fit each other: {listing}"
        elif name.endswith(".bias") and not BIAS.fullmatch(name):
            found[name] = f"{name}: {family(file)} has no such tensor"
        elif base is None:
            continue
        elif name not in base.entries:
            found[name] = f"{name}: {base.path.name} has no such tensor"
        elif base.entries[name].shape != shape:
            found[name] = f"{name}: the change has the shape {shape}, and {base.path.name} {base.entries[name].shape}"
    if whole := [
        key.key
        for parts in groups.values()
        for key in parts
        if key.part not in ("alpha", "reshape_weight") and not file.entries[key.key].dtype.is_floating_point
    ]:
        found[""] = f"{count(len(whole), 'key')} without floating-point numbers, such as {whole[0]}"
    return found


def misalignment(file: TensorFile, keys: Sequence[AdapterKey], base: TensorFile | None) -> Iterable[str]:
    """Yield a warning if an adapter has just as many blocks as a variant other than its base, or is for other models.

    The variants have copies of blocks inserted between those of the first, which shift the numbers of all behind them.
    """
    if base is not None:
        family = family_of(base.entries, base.metadata)
        yield from filter(None, [family_warning(file.path.name, file.metadata, family)])
    made_for = num_blocks((key.key for key in keys), BLOCK_NUMBER)  # those that the base lacks have no module
    found = 0 if base is None else num_blocks(base.entries, BLOCK_NUMBER)
    if base is None or made_for not in VARIANTS or found not in VARIANTS or made_for == found:
        return
    how = "loads without a word and" if made_for < found else "loses those for blocks that are not there, and the rest"
    yield (
        f"it has changes for {made_for} blocks, as {VARIANTS[made_for]} has, and {base.path.name} {found}: if it was "
        f"made for the former, it {how} changes blocks that it was not trained on; "
        f"`anima remap --to {found}` moves them"
    )


def notes(file: TensorFile, keys: Sequence[AdapterKey]) -> Iterable[str]:
    """Yield what users run into later."""
    numbers = [int(match[1]) for key in keys if key.module and (match := re.match(r"blocks\.(\d+)\.", key.module))]
    first = min(VARIANTS)
    if numbers and max(numbers) >= first and not is_of_cosmos(file.metadata):
        beyond = sum(number >= first for number in numbers)
        yield (
            f"made for a model with more than {first} blocks: with {VARIANTS[first]} {count(beyond, 'key')} would be "
            "left out, and the others would change other blocks than they were trained for"
        )
    if is_of_state(file):
        yield "it is for resuming; the run's folder `weights` has the file to load elsewhere"
    if any(COMFY_TEXT_ENCODER.match(key.key) for key in keys):
        yield "ComfyUI loads changes of Anima's text encoder since May 2026; diffusers and anima-train do not"
    alpha = declared_alpha(file.metadata)
    if alpha and "ss_network_alpha" not in file.metadata and not any(key.part == "alpha" for key in keys):
        yield f"alpha ({alpha}) is in diffusers' metadata alone: ComfyUI applies the file at scale 1"
    if any(key.part.startswith("dora_scale") for key in keys):
        yield "ComfyUI computes DoRA from the weights of the model it is loaded on: it is right on its own base only"
