"""The weights that users load elsewhere: an adapter or a model, safetensors only."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from anima_train.adapters.choice import AnyAdapter
from anima_train.adapters.full import Full
from anima_train.adapters.updates import NEVER_ROUNDED
from anima_train.core.divided import is_divided
from anima_train.core.errors import ModelFileError, NumericError
from anima_train.core.files import atomic_path
from anima_train.core.format import count
from anima_train.model.dit import MiniTrainDIT
from anima_train.model.loading import ModelFiles
from anima_train.model.safetensors_io import byte_view, file_bytes, match_keys, open_header, read_tensors, write_tensors
from anima_train.tools.verify import verify

logger = logging.getLogger(__name__)

EXACT = tuple(f".{part}" for part in NEVER_ROUNDED)


def save_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write an adapter or a checkpoint atomically, after reading back every key, shape and value of it.

    Tensors of which each process holds a part are gathered, checked, written and dropped one by one.

    Raises:
        NumericError: a weight is not finite; nothing is written.
        SpaceError: the disk is full; earlier files are intact.
        ModelFileError: the disk does not give back what was written; earlier files are intact.
    """
    at_hand = {name: tensor for name, tensor in tensors.items() if not is_divided(tensor)}
    check_finite(path, at_hand)
    digests: dict[str, bytes] = {}  # of those that are gathered once

    def look(name: str, tensor: Tensor) -> None:
        if name not in at_hand:
            check_finite(path, {name: tensor})
            digests[name] = digest(tensor)

    metadata = {"format": "pt", **metadata}
    with atomic_path(path, file_bytes(tensors, metadata)) as temporary:
        write_tensors(temporary, tensors, metadata, look)
        found = open_header(temporary)
        match_keys(found.entries, tensors, f"{path}: reads back with other keys than were written; check the disk")
        for name, tensor in read_tensors(found):
            gathered = name in digests
            if digests[name] != digest(tensor) if gathered else not torch.equal(tensor, tensors[name].detach().cpu()):
                raise ModelFileError(f"{path}: {name} reads back with other values than were written; check the disk")


def warn_of_unused(path: Path, step: int) -> None:
    """Warn if something is missing in a file that a run has saved, or ComfyUI would leave some of it out."""
    for complaint in verify(path).complaints("ComfyUI"):
        logger.warning("%s is saved, but %s", path.name, complaint, extra={"step": step})


def digest(tensor: Tensor) -> bytes:
    """Return the SHA-256 of a CPU tensor's bytes."""
    return hashlib.sha256(byte_view(tensor)).digest()


def weights_to_save(
    adapter: AnyAdapter, transformer: MiniTrainDIT, files: ModelFiles, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Return the adapter or the model under the names of its file; of a transformer on the meta device, the shapes.

    Args:
        adapter: what is trained.
        transformer: with it.
        files: of the model; the frozen LLM adapter of a whole model, which is not in memory, comes from there.
        dtype: of the file; None: as trained.
    """
    tensors = adapter.tensors(transformer)
    if isinstance(adapter, Full) and not hasattr(transformer, "llm_adapter"):
        on_meta = any(tensor.is_meta for tensor in tensors.values())
        tensors |= adapter.outside(files.llm_adapter_tensors(on_meta))
    if dtype is None:
        return tensors
    return {name: tensor if name.endswith(EXACT) else tensor.to(dtype) for name, tensor in tensors.items()}


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise NumericError if any tensor that is about to be saved holds NaN or infinity."""
    if broken := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise NumericError(
            f"{path.name}: not saved, because {count(len(broken), 'tensor')} of {len(tensors):,} hold NaN or infinity, "
            f"such as {broken[0]}; earlier files are intact"
        )
