"""The files that tools write: whole or not at all, with metadata that say how they came about."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anima_train import __version__
from anima_train.adapters.names import lora_key
from anima_train.adapters.parts import BLOCK_NUMBER, num_blocks
from anima_train.adapters.read import DIFFUSERS_METADATA, STATE_SCALE
from anima_train.core.errors import ConfigError, NumericError
from anima_train.core.files import atomic_path, written_to
from anima_train.model.comfy_quantized import TABLE
from anima_train.model.dit import TransformerShape
from anima_train.model.file_kinds import family_of
from anima_train.model.safetensors_io import FLOATS, PLACEHOLDER, Entry, file_bytes, write_tensors
from anima_train.model.variants import (
    ANIMA,
    ARCHITECTURE,
    COSMOS,
    COSMOS_LICENSE,
    KOHYA_MODULE,
    LICENSE,
    VARIANTS,
    architecture,
    cosmos_architecture,
    is_of_cosmos,
    told_family,
)
from anima_train.tools.spectra import LowRank

logger = logging.getLogger(__name__)

# Metadata of a file that do not hold for one that is made of it: hashes, and scales and formats of its tensors.
NO_LONGER_TRUE = ("sshs_", "modelspec.hash", DIFFUSERS_METADATA, STATE_SCALE, TABLE)
ORIGIN = "anima_train.origin"  # the key of how a file came about, in JSON


def expect_new_file(path: Path) -> None:
    """Raise ConfigError if a file that is to be written is there, or is no safetensors file by its name."""
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path}: the name of a file to write ends with .safetensors; write {path}.safetensors")
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path} already exists; give a name that does not, or remove it")


def adapter_depth(names: Iterable[str], metadata: Mapping[str, str]) -> int:
    """Return the number of blocks of the model that an adapter is for, as far as it tells.

    It is the least known that has all blocks it changes, or a larger one that its metadata name.

    Args:
        names: of the parameters that it changes.
        metadata: of its file.
    """
    least = num_blocks((f".{name}" for name in names), BLOCK_NUMBER)
    fitting = [depth for depth in VARIANTS if depth >= least]
    told = [depth for depth in fitting if metadata.get(ARCHITECTURE) == architecture(depth, is_adapter=True)]
    return next(iter([*told, *fitting]), least)


def adapter_architecture(depth: int, metadata: Mapping[str, str]) -> str:
    """Return the architecture of an adapter that is made of one with these metadata: Cosmos-Predict2's stays."""
    return metadata[ARCHITECTURE] if is_of_cosmos(metadata) else architecture(depth, is_adapter=True)


def base_architecture(entries: Mapping[str, Entry], metadata: Mapping[str, str], is_adapter: bool = False) -> str:
    """Return the architecture of a checkpoint, or of an adapter for it; log where it is taken for Cosmos-Predict2.

    Args:
        entries: its tensors, without prefix.
        metadata: of its file.
        is_adapter: for that of an adapter.
    """
    if family_of(entries, metadata) == ANIMA:
        return architecture(num_blocks(entries, BLOCK_NUMBER), is_adapter)
    if told_family(metadata) is None:
        logger.warning(
            "a checkpoint without LLM adapter, whose metadata do not tell Anima, counts as Cosmos-Predict2: the "
            "new file has that name and its licence"
        )
    return cosmos_architecture(TransformerShape.of(entries).width, is_adapter)


def metadata_of(made: str, path: Path, origin: Mapping[str, Any], others: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a file.

    Args:
        made: its architecture, of `variants`.
        path: of the file.
        origin: how it came about; kept as JSON.
        others: of a file that it was made from, which are kept where they still hold.
    """
    kept = {name: text for name, text in others.items() if not name.startswith(NO_LONGER_TRUE)}
    version, licences = (COSMOS, COSMOS_LICENSE) if made.startswith(COSMOS) else ("anima", LICENSE)
    return kept | {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        ARCHITECTURE: made,
        "modelspec.implementation": "anima-train",
        "modelspec.title": path.stem,
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.prediction_type": "rectified_flow",
        "ss_base_model_version": version,
        "modelspec.license": kept.get("modelspec.license", licences),
        "modelspec.hash_sha256": f"0x{PLACEHOLDER}",
        "sshs_model_hash": PLACEHOLDER,
        "anima_train.version": __version__,
        ORIGIN: json.dumps(origin, ensure_ascii=False),
    }


def save_streamed(
    path: Path, shapes: Mapping[str, Tensor], metadata: Mapping[str, str], make: Callable[[str], Tensor]
) -> None:
    """Write a file whose tensors are made one after the other.

    Args:
        path: of the file.
        shapes: by name, on the meta device.
        metadata: of the file.
        make: returns the tensor of a name.

    Raises:
        ConfigError: no file can be there.
        NumericError: a tensor is not finite; nothing is left.
        SpaceError: the disk is full; nothing is left.
    """

    def check_finite(name: str, tensor: Tensor) -> None:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise NumericError(f"{path}: not written, because {name} is not finite in {kind}; choose another dtype")

    with written_to(path), atomic_path(path, file_bytes(shapes, metadata)) as temporary:
        write_tensors(temporary, shapes, metadata, check_finite, make)


def save_lora(
    path: Path, found: Mapping[str, LowRank], dtype: torch.dtype, made: str, origin: Mapping[str, Any],
    others: Mapping[str, str],
) -> None:  # fmt: skip
    """Write a LoRA of scale 1, under keys that ComfyUI and diffusers load.

    Args:
        path: of the file.
        found: factors by the full names of modules.
        dtype: of the file.
        made: its architecture, of `variants`.
        origin: as of `metadata_of`.
        others: as of `metadata_of`.

    Raises:
        NumericError: a tensor is not finite; nothing is left.
        SpaceError: the disk is full; nothing is left.
    """
    tensors = {}
    dtype = dtype if dtype in FLOATS else torch.bfloat16  # of a source in a byte a value
    for module, factors in found.items():
        tensors[lora_key(module, "lora_A")] = factors.down.to(dtype)
        tensors[lora_key(module, "lora_B")] = factors.up.to(dtype)
    ranks = {factors.down.shape[0] for factors in found.values()}
    rank = str(*ranks) if len(ranks) == 1 else "Dynamic"  # kohya's word where modules differ
    facts = {"ss_network_dim": rank, "ss_network_alpha": rank}
    if not made.startswith(COSMOS):
        facts["ss_network_module"] = KOHYA_MODULE
    told = ("ss_network_args", "ss_network_module")
    kept = {name: text for name, text in others.items() if name not in told} | facts
    save_streamed(path, tensors, metadata_of(made, path, origin, kept), tensors.__getitem__)
