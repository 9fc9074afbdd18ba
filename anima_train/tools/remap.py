"""A LoRA of one variant of Anima on the blocks that another one has of it: deeper variants have copies between them."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anima_train.adapters.parts import BLOCK_NUMBER, num_blocks, read_adapter
from anima_train.core.errors import ConfigError, ModelFileError
from anima_train.model.file_kinds import open_model
from anima_train.model.safetensors_io import TensorFile
from anima_train.model.variants import VARIANTS
from anima_train.tools.convert_adapter import key_of
from anima_train.tools.outputs import adapter_architecture, adapter_depth, metadata_of, save_streamed

# By the number of blocks: the places, in its own numbers, of those that were added to the next smaller variant.
INSERTED: Mapping[int, Sequence[int]] = {
    40: (2, 5, 8, 11, 14, 17, 21, 24, 27, 30, 33, 36),
    52: (3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47),
}
DEPTHS = tuple(VARIANTS)
POSITIONS = "insertion_positions"  # the key of the metadata of a base that tells the same
OF_BASE = ("ss_sd_model_name", "ss_new_sd_model_hash")  # metadata of the base that it was of
BLOCK = re.compile(r"blocks\.(\d+)\.(.*)")


@dataclass(frozen=True)
class Remapped:
    """A LoRA on other blocks."""

    depths: tuple[int, int]  # numbers of blocks, before and now
    num_changed: int  # weights that it changes now
    left_out: dict[str, float]  # the norm of the tensors of each change whose block is not there, by its name


@dataclass(frozen=True)
class Variant:
    """A model by its depth, and how it came from one of less depth."""

    num_blocks: int
    inserted: Sequence[int] = ()

    @classmethod
    def of(cls, text: str) -> "Variant":
        """Return the variant that is meant by a number of blocks or by the path of a base.

        Raises:
            ConfigError: the number is of none that is known, or the file does not tell.
            ModelFileError: it is no transformer.
        """
        if not text.isdecimal():
            return cls.of_file(Path(text))
        if (number := int(text)) not in DEPTHS:
            known = ", ".join(map(str, DEPTHS))
            raise ConfigError(f"{number}: no variant of so many blocks is known ({known}); give its file instead")
        return cls(number, INSERTED.get(number, ()))

    @classmethod
    def of_file(cls, path: Path) -> "Variant":
        """Return the variant in a file; raises as `of`."""
        file, prefix = open_model(path)
        depth = num_blocks(file.stripped(prefix).entries, re.compile(r"^blocks\.(\d+)\."))
        if POSITIONS in file.metadata:
            return cls(depth, positions(file, depth))
        if depth not in DEPTHS:
            raise ConfigError(
                f"{path} has {depth} blocks and no {POSITIONS} in its metadata, which would tell those that were added"
            )
        return cls(depth, INSERTED.get(depth, ()))


def positions(file: TensorFile, depth: int) -> Sequence[int]:
    """Return the places of added blocks that a file's metadata tell.

    Raises:
        ModelFileError: they are none.
    """
    try:
        found = json.loads(file.metadata[POSITIONS])
    except (ValueError, RecursionError):
        found = None
    if (
        not isinstance(found, list)
        or not all(type(each) is int and 0 <= each < depth for each in found)
        or len(set(found)) < len(found)
        or len(found) >= depth
    ):
        raise ModelFileError(f"{file.path}: {POSITIONS} in its metadata is no list of blocks of {depth}")
    return sorted(found)


def kept(variant: Variant) -> list[int]:
    """Return the place of each block of the smaller variant in this one."""
    return [place for place in range(variant.num_blocks) if place not in variant.inserted]


def block_map(source: int, target: Variant) -> dict[int, int]:
    """Return the place in another variant of each block that both have.

    Args:
        source: the depth that numbers are of.
        target: the variant that they shall be of.

    Raises:
        ConfigError: no way from one to the other is known.
    """
    if source == target.num_blocks:
        raise ConfigError(
            f"both have {source} blocks, and there is nothing to change; if the LoRA is of more, say so with --from"
        )
    if source > target.num_blocks:
        larger = Variant(source, INSERTED.get(source, ()))
        return {new: old for old, new in block_map(target.num_blocks, larger).items()}
    places, below = kept(target), target.num_blocks - len(target.inserted)
    if source == below:
        return dict(enumerate(places))
    if source > below or not target.inserted:
        raise ConfigError(f"no way from {source} blocks to {target.num_blocks} is known")
    return {old: places[new] for old, new in block_map(source, Variant(below, INSERTED.get(below, ()))).items()}


def number_of(name: str) -> int:
    """Return the number of the block that a parameter is in; -1 outside of all."""
    match = BLOCK.fullmatch(name)
    return -1 if match is None else int(match[1])


def remap(path: Path, out: Path, target: Variant, source: int | None = None) -> Remapped:
    """Write a LoRA for another variant, in ComfyUI's keys; tensors stay as they are.

    Args:
        path: an adapter of any kind, in anybody's keys.
        out: the file to write.
        target: the variant that it shall be for.
        source: the number of blocks that it is of; None: the least known that has all blocks in it.

    Raises:
        ConfigError: no way from one to the other is known, or nothing would be left.
        ModelFileError: it cannot be read.
    """
    adapter = read_adapter(path)
    least = num_blocks((f".{name}" for name in adapter.changes), BLOCK_NUMBER)
    depth = source or adapter_depth(adapter.changes, adapter.metadata)
    if least > depth:
        raise ConfigError(f"{path} changes block {least - 1}, and is not of a model of {depth} blocks")
    places = block_map(depth, target)
    tensors: dict[str, Tensor] = {}
    left_out: dict[str, float] = {}
    for name, parts in sorted(adapter.changes.items(), key=lambda item: number_of(item[0])):
        match = BLOCK.fullmatch(name)
        if match is not None and int(match[1]) not in places:
            left_out[name] = float(torch.stack([part.float().norm() for part in parts.values()]).norm())
            continue
        moved = name if match is None else f"blocks.{places[int(match[1])]}.{match[2]}"
        tensors |= {key_of(moved, part, "comfyui"): tensor for part, tensor in parts.items()}
    if not tensors:
        raise ConfigError(f"{path}: none of the blocks that it changes is in a model of {target.num_blocks} blocks")
    origin = {"remap": path.name, "from": depth, "to": target.num_blocks}
    made = adapter_architecture(target.num_blocks, adapter.metadata)
    others = {name: text for name, text in adapter.metadata.items() if name not in OF_BASE}
    save_streamed(out, tensors, metadata_of(made, out, origin, others), tensors.__getitem__)
    return Remapped((depth, target.num_blocks), len(adapter.changes) - len(left_out), left_out)
