"""The keys of adapter files of any kind: the module that each is of, and which part of its change it is."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anima_train.adapters.names import STEM_FORMS, anima_modules, lora_stems
from anima_train.adapters.read import (
    DIFFUSERS_METADATA,
    PARTS,
    STATE_OF,
    STATE_SCALE,
    foreign_fault,
    peft_config,
    peft_scale,
)
from anima_train.adapters.updates import change, change_shape, updated
from anima_train.core.errors import ModelFileError
from anima_train.core.format import count
from anima_train.model.file_kinds import uncompiled
from anima_train.model.safetensors_io import TensorFile, first_five, open_header, read_tensors

# PEFT's own state has the name of the adapter in its keys; a training state's keys end without `.weight`.
HALF = r"(?P<half>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.default)?(?:\.weight)?"
OTHERS = (
    "alpha", "dora_scale", r"lokr_w[12](?:_[ab])?", "lokr_t2", r"hada_w[12]_[ab]", r"hada_t[12]", "diff", "diff_b",
    "set_weight", "w_norm", "b_norm", "oft_blocks", "rescale", "reshape_weight", r"lora_mid\.weight",
    r"[ab][12]\.weight", r"lora_magnitude_vector(?:\.default)?(?:\.weight)?",
)  # fmt: skip
PART_KEY = re.compile(rf"(?P<stem>.+)\.(?:{HALF}|(?P<other>{'|'.join(OTHERS)}))")
LLLITE = re.compile(r"lllite_")  # what all keys of an LLLite begin with, which changes no weight
OF_BIAS = ("diff_b", "b_norm")  # differences of the module's bias
DIFFERENCES = ("diff", "w_norm", *OF_BIAS)
BLOCK_NUMBER = re.compile(r"(?<!llm_adapter[._])(?:^|[._])(?:transformer_)?blocks[._](\d+)[._]")
LLM_ADAPTER_BLOCK_NUMBER = re.compile(r"(?:llm_adapter|text_conditioner)[._]blocks[._](\d+)[._]")


@dataclass(frozen=True)
class AdapterKey:
    """One key of an adapter file."""

    key: str
    stem: str  # what comes before the part; "" where the part is unknown
    part: str  # `down`, `up`, or the name in the file
    module: str | None  # full name in the transformer; None where it is none of its modules
    form: str | None  # whose names they are, of `STEM_FORMS`

    @property
    def parameter(self) -> str:
        """The full name of the parameter that it changes."""
        return f"{self.module}.{'bias' if self.part in OF_BIAS else 'weight'}"

    @property
    def change_part(self) -> str:
        """The part as `adapters/updates.py` calls it."""
        return "diff" if self.part in DIFFERENCES else self.part


def adapter_keys(names: Iterable[str], modules: Iterable[str] | None = None) -> list[AdapterKey]:
    """Return what every key of a file is.

    Args:
        names: the keys.
        modules: full names of the model's modules. None: those of an Anima with as many blocks as the keys name.
    """
    names = list(names)
    if modules is None:
        modules = anima_modules(numbers(names, BLOCK_NUMBER), numbers(names, LLM_ADAPTER_BLOCK_NUMBER))
    stems: dict[str, tuple[str, str]] = {}
    for module in modules:
        for stem, form in zip(lora_stems(module), STEM_FORMS, strict=True):
            stems.setdefault(stem, (module, form))
    found = []
    for name in names:
        match = PART_KEY.fullmatch(name)
        stem = "" if match is None else match["stem"]
        part = "" if match is None else PARTS[match["half"]] if match["half"] else match["other"]
        found.append(AdapterKey(name, stem, part, *stems.get(stem, (None, None))))
    return found


def numbers(names: Iterable[str], pattern: re.Pattern[str]) -> list[int]:
    """Return the numbers of blocks in which there are modules of these names."""
    return sorted({int(match[1]) for name in names if (match := pattern.search(name))})


def num_blocks(names: Iterable[str], pattern: re.Pattern[str]) -> int:
    """Return how many blocks a model has at least in which there are modules of these names."""
    return 1 + max((int(match[1]) for name in names if (match := pattern.search(name))), default=-1)


def is_of_state(file: TensorFile) -> bool:
    """Return True for the weights of a training state, whose scales are not folded into them."""
    return STATE_OF in file.metadata or STATE_SCALE in file.metadata


def is_adapter(file: TensorFile) -> bool:
    """Return True if a file holds an addition to a model, whatever model, rather than a model."""
    return any(PART_KEY.fullmatch(name) or LLLITE.match(name) for name in file.entries)


@dataclass(frozen=True)
class Adapter:
    """The changes of a file."""

    path: Path
    changes: Mapping[str, Mapping[str, Tensor]]  # full name of a parameter -> part -> tensor
    metadata: Mapping[str, str]

    def updated(self, name: str, weight: Tensor, strength: float = 1.0) -> Tensor:
        """Return a weight in float32 after its change at this strength; name is the parameter's.

        Raises:
            ModelFileError: they do not fit each other.
        """
        parts = {part: tensor.to(weight.device) for part, tensor in self.changes[name].items()}
        return self.computed(name, lambda: updated(weight, parts, strength))

    def change(self, name: str, weight: Tensor) -> Tensor:
        """Return the change of a weight at strength 1, in float32.

        Raises:
            ModelFileError: they do not fit each other.
        """
        return self.computed(name, lambda: change(weight, self.changes[name]))

    def computed(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """Return what is computed, or raise ModelFileError with the file and the parameter where shapes do not fit."""
        try:
            return compute()
        except ValueError as error:
            raise ModelFileError(f"{self.path}: {name}: {error}") from error


def read_adapter(path: Path, parameters: Iterable[str] | None = None) -> Adapter:
    """Read a file of changes of the kinds that `adapters/updates.py` knows, in anybody's keys.

    Args:
        path: a safetensors file.
        parameters: full names of those of the model that it is for. None: an Anima with as many blocks as it needs.

    Raises:
        ModelFileError: it is none, or a key of it would be left out: which, and why.
    """
    file = uncompiled(open_header(path))
    if not is_adapter(file):
        raise ModelFileError(f"{path}: expected a LoRA or another adapter; it has no key of one")
    if is_of_state(file):
        raise ModelFileError(
            f"{path}: belongs to a training state; give the file in the run's folder `weights` instead"
        )
    known = None if parameters is None else set(parameters)
    keys = adapter_keys(file.entries, None if known is None else {name.rpartition(".")[0] for name in known})
    expect_all_known(file, keys, known)
    if whole := [key.key for key in keys if key.part != "alpha" and not file.entries[key.key].dtype.is_floating_point]:
        raise ModelFileError(
            f"{path}: {count(len(whole), 'key')} without floating-point numbers, such as {whole[0]}; a quantised "
            "adapter is not read, give the original"
        )
    tensors = dict(read_tensors(file))
    changes: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key in keys:
        if key.change_part in changes[key.parameter]:
            raise ModelFileError(f"{path}: {key.key} repeats another key of {key.parameter}")
        changes[key.parameter][key.change_part] = tensors[key.key]
    expect_whole(path, changes)
    give_alphas(file, keys, changes)
    return Adapter(path, changes, file.metadata)


def expect_whole(path: Path, changes: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise ModelFileError if some parts make no change that is known, or do not fit each other."""
    for name, parts in changes.items():
        shape = change_shape({part: tuple(tensor.shape) for part, tensor in parts.items()})
        found = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in sorted(parts.items()))
        if shape is None:
            raise ModelFileError(
                f"{path}: {name} has parts that make no change that is known ({found}); `anima verify` tells what the "
                "file is"
            )
        if shape == () and "diff" not in parts:
            is_flat = "dora_scale" in parts and parts["dora_scale"].dim() == 1
            fault = "dora_scale has (out, 1) or (1, in)" if is_flat else "the file is damaged"
            raise ModelFileError(f"{path}: {name} has parts that do not fit each other: {found}; {fault}")


def expect_all_known(file: TensorFile, keys: Sequence[AdapterKey], parameters: Collection[str] | None) -> None:
    """Raise ModelFileError if a key is of nothing in the model, with their number, and the first or whose they are.

    Args:
        file: the adapter.
        keys: of it.
        parameters: of the model; None: all that its modules may have.
    """
    unknown = [
        key.key for key in keys if key.module is None or (parameters is not None and key.parameter not in parameters)
    ]
    if unknown:
        listing = f"{count(len(unknown), 'key')} for nothing in the transformer: {first_five(unknown)}"
        fault = foreign_fault(unknown, len(keys) - len(unknown))
        raise ModelFileError(f"{file.path}: {fault or f'{listing}; `anima verify` tells what the file is'}")


def give_alphas(file: TensorFile, keys: Iterable[AdapterKey], changes: Mapping[str, dict[str, Tensor]]) -> None:
    """Add to the changes the alpha that the file has in its metadata, or beside it, instead of tensors."""
    if DIFFUSERS_METADATA not in file.metadata and not has_peft_keys(file):
        return
    config = peft_config(file)
    for key in keys:
        parts = changes[key.parameter]
        if key.part == "down" and "alpha" not in parts:
            rank = len(parts["down"])
            if (scale := peft_scale(config, key.key, rank)) != 1:
                parts["alpha"] = torch.tensor(scale * rank)


def has_peft_keys(file: TensorFile) -> bool:
    """Return True for the keys that PEFT itself saves."""
    return any(name.startswith("base_model.model.") for name in file.entries)


def declared_alpha(metadata: Mapping[str, str]) -> str | None:
    """Return alpha as a file's metadata tell it; None where they do not."""
    if alpha := metadata.get("ss_network_alpha"):
        return alpha
    try:
        config = json.loads(metadata.get(DIFFUSERS_METADATA, "{}"))
    except (ValueError, RecursionError):
        return None
    found = [value for key, value in config.items() if key.endswith("lora_alpha")] if isinstance(config, dict) else []
    return str(found[0]) if found else None
