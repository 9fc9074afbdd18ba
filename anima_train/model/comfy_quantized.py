"""Weights that ComfyUI has quantised, read as what they stand for.

A weight `x.weight` in int8 or float8 has its scale in `x.weight_scale`: one number, or one for each row. JSON in
`x.comfy_quant` names the format; older files have `x.scale_weight` and no format, and some have neither. In "convrot"
the rows of the weight were multiplied, group by group, by a regular Hadamard matrix, which is its own inverse
(ConvRot; facts from Comfy-Org/comfy-kitchen, Apache-2.0).
"""

import functools
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from anima_train.core.errors import ModelFileError
from anima_train.model.safetensors_io import Entry, TensorFile, opened

WEIGHT, FORMAT = ".weight", ".comfy_quant"
SCALES = (".weight_scale", ".scale_weight")
BESIDE = (FORMAT, *SCALES, ".weight_scale_2", ".input_scale", ".scale_input")  # what a quantised weight has beside it
MARK = "scaled_fp8"  # a tensor that older files have, behind the prefix of the others
TABLE = "_quantization_metadata"  # the key of the metadata with the formats of all layers, in some files
FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "int8_tensorwise": torch.int8}
NAMES = {dtype: name for name, dtype in FORMATS.items()}
READ_AS = torch.bfloat16
GROUP = 256  # values that are rotated together, where the file does not say


@dataclass(frozen=True)
class QuantizedEntry(Entry):
    """A weight that is stored in a byte a value; its dtype is that of what is read."""

    stored: Entry
    scale: Entry | None
    group: int  # values of a row that were rotated together; 0: none were

    @property
    def kind(self) -> str:
        """The format, as ComfyUI calls it."""
        return NAMES[self.stored.dtype] + (" with rotation" if self.group else "")

    def read(self, stream: BufferedReader, what: str) -> Tensor:
        """Return the weight that the stored values stand for."""
        values = self.stored.read(stream, what).float()
        if self.scale is not None:
            scale = self.scale.read(stream, what).float()
            values *= scale.reshape(-1, *[1] * (values.ndim - 1)) if scale.numel() > 1 else scale.reshape(())
        if self.group:
            values = (values.unflatten(-1, (-1, self.group)) @ hadamard(self.group)).flatten(-2)
        return values.to(READ_AS)


@functools.cache
def hadamard(size: int) -> Float[Tensor, "size size"]:
    """Return the regular Hadamard matrix of a power of 4, normalised: symmetric, and its own inverse."""
    four = torch.ones(4, 4, device="cpu") - 2 * torch.eye(4, device="cpu").flip(0)
    matrix = torch.ones(1, 1, device="cpu")
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix / math.sqrt(size)


def dequantized(file: TensorFile) -> TensorFile:
    """Return a file whose quantised weights are read as what they stand for; any other file as it is.

    Raises:
        ModelFileError: a format is not known.
    """
    names = [
        name.removesuffix(WEIGHT)
        for name, entry in file.entries.items()
        if name.endswith(WEIGHT) and (entry.dtype in NAMES or name.removesuffix(WEIGHT) + FORMAT in file.entries)
    ]
    if not names:
        return file
    formats = format_table(file)
    kept = {name: entry for name, entry in file.entries.items() if not is_beside(name)}
    with opened(file.path) as stream:
        for name in names:
            described = formats.get(name, {})
            if (text := file.entries.get(name + FORMAT)) is not None:
                if text.dtype != torch.uint8:
                    raise ModelFileError(f"{file.path}: the quantisation of {name} is not described in bytes")
                described = parsed(bytes(text.read(stream, f"{file.path}: {name}{FORMAT}").tolist()), file, name)
            entry = quantized_entry(file, name, described)
            if entry is not None:
                kept[name + WEIGHT] = entry
    return TensorFile(file.path, kept, file.metadata)


def is_beside(name: str) -> bool:
    """Return True for what a quantised file of ComfyUI has beside weights."""
    return name.endswith(BESIDE) or name.rpartition(".")[2] == MARK


def quantized_entry(file: TensorFile, name: str, described: Mapping[str, Any]) -> QuantizedEntry | None:
    """Return the entry of one weight; None where it is in int8 without a scale, which no format has.

    Raises:
        ModelFileError: its format is not known.
    """
    stored = file.entries[name + WEIGHT]
    scale = next((file.entries[name + suffix] for suffix in SCALES if name + suffix in file.entries), None)
    kind = described.get("format", NAMES.get(stored.dtype))
    if not isinstance(kind, str) or FORMATS.get(kind) != stored.dtype:
        raise ModelFileError(
            f"{file.path}: {name} is quantised as {str(kind)[:40]!a}, which is not read; give the file in bf16, in fp8 "
            "(float8_e4m3fn) or in int8 (int8_tensorwise)"
        )
    if stored.dtype == torch.int8 and scale is None:
        return None
    if scale is not None and math.prod(scale.shape) not in (1, stored.shape[0] if stored.shape else 1):
        raise ModelFileError(f"{file.path}: {name} has {math.prod(scale.shape):,} scales, which do not fit its rows")
    group = described.get("convrot_groupsize", GROUP) if described.get("convrot") else 0
    if (
        type(group) is not int
        or not stored.shape
        or (group and (group < 4 or group & (group - 1) or group.bit_length() % 2 == 0 or stored.shape[-1] % group))
    ):
        raise ModelFileError(
            f"{file.path}: {name} is rotated in groups of {str(group)[:20]}, which do not fit its rows"
        )
    return QuantizedEntry(READ_AS, stored.shape, stored.start, stored.end, stored, scale, group)


def format_table(file: TensorFile) -> Mapping[str, Mapping[str, Any]]:
    """Return the formats that the file's metadata name, by layer."""
    if TABLE not in file.metadata:
        return {}
    layers = parsed(file.metadata[TABLE].encode(), file, TABLE).get("layers")
    return {name: each for name, each in layers.items() if isinstance(each, dict)} if isinstance(layers, dict) else {}


def parsed(text: bytes, file: TensorFile, name: str) -> Mapping[str, Any]:
    """Return the JSON that describes a weight.

    Raises:
        ModelFileError: it is none.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{file.path}: the quantisation of {name} is not described in JSON") from error
    return found if isinstance(found, dict) else {}


def quantization_text(file: TensorFile) -> str | None:
    """Return a line about the quantised weights of a file; None if it has none."""
    kinds = Counter(entry.kind for entry in file.entries.values() if isinstance(entry, QuantizedEntry))
    if not kinds:
        return None
    listing = ", ".join(f"{number:,} in {kind}" for kind, number in kinds.most_common())
    return (
        f"{file.path.name}: of {len(file.entries):,} weights {listing}; they are read as bfloat16, with the rounding "
        "that they have; the file in bf16 is without it"
    )
