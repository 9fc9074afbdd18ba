"""The difference of two checkpoints as a LoRA: the best of a rank, or of a share of the energy, for each matrix."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from anima_train.core.errors import ModelFileError
from anima_train.model.safetensors_io import read_tensors
from anima_train.tools.diff import delta_of, open_transformer
from anima_train.tools.outputs import base_architecture, save_lora
from anima_train.tools.spectra import Limit, LowRank, truncated


@dataclass(frozen=True)
class Extracted:
    """The differences that went into a LoRA, and those that did not."""

    errors: Mapping[str, float]  # |D - L| / |D| by module
    error: float  # of all of them together
    largest_rank: int
    left_out: Mapping[str, float]  # tensors that changed and are no matrices of linears: |D| / |W|


def extract(
    base_path: Path, other_path: Path, out: Path, limit: Limit, dtype: torch.dtype = torch.float32,
    tell: Callable[[str], object] = lambda name: None,
) -> Extracted:  # fmt: skip
    """Write the LoRA that makes of one checkpoint nearly the other one.

    Args:
        base_path: a transformer.
        other_path: another one with the same tensors, or an adapter, whose change of the base is taken.
        out: the file to write.
        limit: of the rank.
        dtype: of the file.
        tell: gets the name of each weight before it is worked on.

    Raises:
        ModelFileError: a file cannot be read, does not fit, or the two are equal.
    """
    base = open_transformer(base_path)
    delta = delta_of(base, other_path)
    found: dict[str, LowRank] = {}
    left_out, rest, total = {}, 0.0, 0.0
    for name, tensor in read_tensors(base):
        tell(name)
        change, _ = delta(name, tensor.float(), tensor.dtype)
        squared = float(change.square().sum())
        if squared and is_linear(name, change.dim()):
            module = name.removesuffix(".weight")
            found[module] = truncated(change, limit, name)
            total += squared
            rest += squared * found[module].error ** 2
        elif squared:
            left_out[name] = (squared / max(float(tensor.float().square().sum()), 1e-30)) ** 0.5
    if not found:
        raise ModelFileError(f"{other_path}: no matrix differs from {base_path}; there is nothing to extract")
    origin = {"extract": other_path.name, "from": base_path.name, **vars(limit)}
    save_lora(out, found, dtype, base_architecture(base.entries, base.metadata, is_adapter=True), origin, {})
    largest = max(len(factors.down) for factors in found.values())
    return Extracted({name: each.error for name, each in found.items()}, (rest / total) ** 0.5, largest, left_out)


def is_linear(name: str, num_sides: int) -> bool:
    """Return True for the weight of a linear, which a LoRA can change everywhere; an embedding's only in ComfyUI."""
    return num_sides == 2 and name.endswith(".weight") and not name.endswith("embed.weight")
