"""The weights that users load elsewhere: a LoRA or a model, safetensors only."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from anima_train.core.errors import ModelFileError, NumericError, count
from anima_train.core.files import atomic_path
from anima_train.model.weights import file_bytes, match_keys, open_header, read_tensors, write_tensors


def save_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a LoRA or a checkpoint atomically, after reading back every key, shape and value of it.

    Raises:
        NumericError: a weight is not finite; nothing is written.
        SpaceError: the disk is full; earlier files are intact.
        ModelFileError: the disk does not give back what was written; earlier files are intact.
    """
    check_finite(path, tensors)
    metadata = {"format": "pt", **metadata}
    with atomic_path(path, file_bytes(tensors, metadata)) as temporary:
        write_tensors(temporary, tensors, metadata)
        found = open_header(temporary)
        match_keys(found.entries, tensors, f"{path}: reads back with other keys than were written; check the disk")
        for name, tensor in read_tensors(found):
            if not torch.equal(tensor, tensors[name].detach().cpu()):
                raise ModelFileError(f"{path}: {name} reads back with other values than were written; check the disk")


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise NumericError if any tensor that is about to be saved holds NaN or infinity."""
    if broken := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise NumericError(
            f"{path.name}: not saved, because {count(len(broken), 'tensor')} of {len(tensors):,} hold NaN or infinity, "
            f"such as {broken[0]}; earlier files are intact"
        )
