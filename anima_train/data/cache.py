"""The cache of latents, masks and text: one file per value, named by a hash of everything the value depends on.

A changed image, crop, VAE, encoder or tokenizer changes the name, so an entry is never stale, only unused. Entries
appear whole or not at all, so any number of processes can fill one cache, and a killed one loses only the entry it was
writing.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from anima_train.core.errors import DataError, SpaceError
from anima_train.core.files import atomic_path

SCHEMA = 1  # raise when the meaning of an entry changes
Kind = Literal["latent", "mask", "text"]


def entry_key(kind: Kind, **depends_on: str | int | float) -> str:
    """The name of an entry: SHA-256 of its kind, the schema and everything it depends on."""
    text = json.dumps({"kind": kind, "schema": SCHEMA, **depends_on}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class DamagedEntry(Exception):
    """An entry's file cannot be read, or its content is not what was written."""


class Cache:
    """Entries below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: Kind, key: str) -> Path:
        """Where an entry lies."""
        return self.folder / kind / key[:2] / f"{key}.safetensors"

    def keys(self, kind: Kind) -> set[str]:
        """The keys of all entries of a kind; one listing instead of a question per entry."""
        return {path.stem for path in (self.folder / kind).glob("??/*.safetensors")}

    def save(self, kind: Kind, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write an entry.

        Raises:
            SpaceError: as `write`.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self.write(self.path(kind, key), save(tensors, metadata={"crc32": str(checksum(tensors))}))

    def write(self, path: Path, content: bytes) -> None:
        """Write a file of the cache, whole or not at all.

        Raises:
            SpaceError: it cannot be written; names the bytes it needs.
        """
        try:
            with atomic_path(path) as temporary:
                temporary.write_bytes(content)  # not safetensors' own writer, which hides the reason of a failure
        except (SpaceError, OSError) as error:
            raise SpaceError(
                f"cache folder {self.folder}: {error}; this file needs {len(content):,} bytes. Free some space, or set "
                "cache_dir to a folder that can be written"
            ) from error

    def load(self, kind: Kind, key: str) -> dict[str, Tensor]:
        """Read an entry on the CPU.

        Raises:
            DamagedEntry: missing, truncated, or its checksum differs.
        """
        path = self.path(kind, key)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                expected = (file.metadata() or {}).get("crc32")
        except (OSError, SafetensorError) as error:
            raise DamagedEntry(f"{path}: {error}") from error
        if str(checksum(tensors)) != expected:
            raise DamagedEntry(f"{path}: its content is not what was written")
        return tensors

    def remove(self, kind: Kind, key: str) -> None:
        """Forget an entry."""
        self.path(kind, key).unlink(missing_ok=True)

    def read(self, kind: Kind, key: str) -> dict[str, Tensor]:
        """`load`, for entries that a run relies on: a damaged one is removed, so that the next run rebuilds it.

        Raises:
            DataError: the entry is damaged.
        """
        try:
            return self.load(kind, key)
        except DamagedEntry as error:
            try:
                self.remove(kind, key)
            except OSError as failure:
                remedy = f"it could not be removed ({failure.strerror}): remove it and start again to rebuild it"
            else:
                remedy = "removed. Start again to rebuild it"
            raise DataError(f"cache entry damaged: {error}; {remedy}") from error

    def reject(self, key: str, reason: str) -> None:
        """Remember that the latent or mask of this key cannot be made, so that no run tries again.

        Raises:
            SpaceError: as `write`.
        """
        # A reason may name a file, and a file's name may hold bytes that are no UTF-8.
        self.write(self.folder / "rejected" / f"{key}.txt", reason.encode("utf-8", errors="backslashreplace"))

    def rejected(self) -> dict[str, str]:
        """Keys of latents and masks that cannot be made, with the reasons."""
        return {
            path.stem: path.read_text(encoding="utf-8", errors="replace")
            for path in (self.folder / "rejected").glob("*.txt")
        }


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 over names, dtypes, shapes and bytes."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode(), value)
        value = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, value)
    return value
