"""The cache of latents, masks and text: one file per value, named by a hash of everything the value depends on.

A changed image, crop, VAE, encoder or tokenizer changes the name, so an entry is never stale, only unused. Entries
appear whole or not at all, so two processes that write the same one do no harm, and a killed one loses only the entries
it was making. Whoever fills a cache holds its lock, so that nothing is made twice.
"""

import contextlib
import hashlib
import json
import logging
import re
import time
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from anima_train.core.errors import SpaceError
from anima_train.core.files import atomic_files
from anima_train.core.format import printable

logger = logging.getLogger(__name__)

SCHEMA = 1  # raise when the meaning of an entry changes
SCHEMA_FILE = "schema.json"
FOR_NOW = "for now: "  # begins the reasons that only count for the run that found them
CACHE_FOLDER = ".anima_cache"  # beside the data
Kind = Literal["latent", "mask", "text"]

LOCK_FILE = ".lock"
LOCK_POLL = 0.5  # seconds between attempts to take the lock
MESSAGE_EVERY = 60.0  # seconds, while another process has it
TEMPORARY_LIFE = 3600.0  # seconds after which a temporary file is taken for left behind
ENTRY_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
REJECTED_NAME = re.compile(r"[0-9a-f]{64}\.txt")
CLAIM_NAME = re.compile(r"[0-9a-f]{64}")  # of earlier versions, which told each other what they were making
TEMPORARY_NAME = re.compile(r"\.([0-9a-f]{40}|(images|masks)_\w+|schema\.json)\.\w+\.tmp")  # see `atomic_path`


def entry_key(kind: Kind, **depends_on: str | int | float) -> str:
    """Return the name of an entry: SHA-256 of its kind, the schema and everything it depends on."""
    text = json.dumps({"kind": kind, "schema": SCHEMA, **depends_on}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class DamagedEntry(Exception):
    """An entry whose file cannot be read, or does not hold what was written."""


class Cache:
    """The entries below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: Kind, key: str) -> Path:
        """Return the file of an entry."""
        return self.folder / kind / key[:2] / f"{key}.safetensors"

    def keys(self, kind: Kind) -> set[str]:
        """Return the keys of all entries of a kind: one listing instead of a question per entry."""
        return {path.stem for path in (self.folder / kind).glob("??/*.safetensors")}

    def entry_file(self, kind: Kind, key: str, tensors: Mapping[str, Tensor]) -> "CacheFile":
        """Return the file of an entry, to be written."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        # Not safetensors' own writer, which hides the reason of a failure.
        return CacheFile(self, self.path(kind, key), save(tensors, metadata={"crc32": str(checksum(tensors))}))

    def write(self, path: Path, content: bytes) -> None:
        """Write a file of the cache, whole or not at all.

        Raises:
            SpaceError: as `write_files`.
        """
        write_files([CacheFile(self, path, content)])

    def unwritable(self, error: Exception, consequence: str) -> SpaceError:
        """Return the error for a folder that cannot be written."""
        return SpaceError(
            f"cache folder {self.folder}: {error}; {consequence}. Free some space, or set cache_dir to a folder that "
            "can be written"
        )

    def is_whole(self, kind: Kind, key: str) -> bool:
        """Return True if an entry is there and as long as its own header says; its content is not read."""
        try:
            with safe_open(self.path(kind, key), framework="np"):
                return True
        except (OSError, SafetensorError):
            return False

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
        """Remove an entry."""
        self.path(kind, key).unlink(missing_ok=True)

    def rejection_file(self, key: str, reason: str, for_now: bool = False) -> "CacheFile":
        """Return the file that says that the latent or mask of this key cannot be made, so that no run tries again.

        Args:
            key: of the latent or mask.
            reason: why not.
            for_now: True if the next run shall try again, because the file could not be read, say.
        """
        text = FOR_NOW + reason if for_now else reason
        # A reason may name a file, and a file's name may hold bytes that are no UTF-8.
        return CacheFile(self, self.rejection(key), text.encode("utf-8", errors="backslashreplace"))

    def retry(self) -> None:
        """Forget what earlier runs could not make for the time being.

        Raises:
            SpaceError: a file cannot be removed.
        """
        for path in (self.folder / "rejected").glob("*.txt"):
            try:
                if path.read_text(encoding="utf-8", errors="replace").startswith(FOR_NOW):
                    path.unlink(missing_ok=True)
            except FileNotFoundError:
                continue  # another process was faster
            except OSError as error:
                raise SpaceError(f"cache folder {self.folder}: {path} could not be removed: {error}") from error

    def is_done(self, kind: Kind, key: str) -> bool:
        """Return True if there is nothing to do for an entry: it is whole, or cannot be made."""
        return self.is_whole(kind, key) or self.rejection(key).exists()

    def rejection(self, key: str) -> Path:
        """Return the file that holds the reason why an entry cannot be made."""
        return self.folder / "rejected" / f"{key}.txt"

    def rejected(self) -> dict[str, str]:
        """Return the keys of latents and masks that cannot be made, with the reasons."""
        return {
            path.stem: path.read_text(encoding="utf-8", errors="replace").removeprefix(FOR_NOW)
            for path in (self.folder / "rejected").glob("*.txt")
        }

    # Versions

    def newest_schema(self) -> int:
        """Return the newest schema that entries were written in; 0 if none is known."""
        try:
            return int(json.loads((self.folder / SCHEMA_FILE).read_bytes())["schema"])
        except (OSError, ValueError, LookupError, TypeError):
            return 0

    def note_schema(self) -> None:
        """Write into the folder which schema its entries have, for versions to come, or for older ones.

        Raises:
            SpaceError: as `write_files`.
        """
        if self.newest_schema() < SCHEMA:
            self.write(self.folder / SCHEMA_FILE, json.dumps({"schema": SCHEMA}).encode())

    # Several processes

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock that a process takes while it fills the folder, and wait for it as long as another one has it.

        The system gives it back when its holder ends, however that was.

        Raises:
            SpaceError: the folder cannot be written.
        """
        lock = FileLock(self.folder / LOCK_FILE)
        timeout = 0.0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while not lock.is_locked:
                try:
                    lock.acquire(timeout, LOCK_POLL)
                except Timeout:
                    logger.info(f"waiting for another process that is filling the cache {printable(str(self.folder))}")
                    timeout = MESSAGE_EVERY
        except OSError as error:
            raise self.unwritable(error, "it cannot be locked to be filled") from error
        try:
            yield
        finally:
            lock.release()

    # What is not needed

    def listed(self) -> Iterator[tuple[Path, re.Pattern[str]]]:
        """Yield the folders that belong to the cache, and the pattern of the names in them; links are not followed."""
        yield self.folder, TEMPORARY_NAME
        yield self.folder / "rejected", REJECTED_NAME
        yield self.folder / "claims", CLAIM_NAME
        for kind in get_args(Kind):
            for folder in sorted((self.folder / kind).glob("??")):
                if folder.is_dir() and not folder.is_symlink() and not folder.parent.is_symlink():
                    yield folder, ENTRY_NAME

    def remove_unfinished(self) -> None:
        """Remove temporary files of entries that a killed process has left; none while another one fills the folder."""
        if not self.folder.is_dir():
            return
        with contextlib.suppress(OSError), FileLock(self.folder / LOCK_FILE).acquire(timeout=0):
            for folder, _ in self.listed():
                if folder == self.folder or folder.is_symlink():
                    continue  # what is written there is written without the lock
                for path in folder.glob(".*.tmp"):
                    if TEMPORARY_NAME.fullmatch(path.name):
                        path.unlink(missing_ok=True)

    def prune(self, needed: Collection[str]) -> tuple[int, int]:
        """Remove entries and rejections whose key is not needed, temporary files left behind, and old versions' claims.

        Files with other names, and whatever lies in other folders, stay.

        Returns:
            the number of files, and of bytes.

        Raises:
            SpaceError: one cannot be removed.
        """
        num_files = num_bytes = 0
        oldest = time.time() - TEMPORARY_LIFE
        for folder, names in self.listed():
            if not folder.is_dir() or (folder.is_symlink() and folder != self.folder):
                continue
            for path in sorted(folder.iterdir()):
                try:
                    status = path.lstat()
                    if TEMPORARY_NAME.fullmatch(path.name):
                        unused = status.st_mtime < oldest
                    else:
                        is_needed = names is not CLAIM_NAME and path.stem in needed
                        unused = names.fullmatch(path.name) is not None and not is_needed
                    if unused:
                        path.unlink()
                        num_files, num_bytes = num_files + 1, num_bytes + status.st_size
                except FileNotFoundError:
                    continue  # another process was faster
                except OSError as error:
                    raise SpaceError(f"cache folder {self.folder}: {path} could not be removed: {error}") from error
        return num_files, num_bytes


@dataclass(frozen=True)
class CacheFile:
    """A file of a cache that is to be written."""

    cache: Cache
    path: Path
    content: bytes


def write_files(files: Sequence[CacheFile]) -> None:
    """Write files of any caches, each whole or not at all, with one wait for the disk (`atomic_files`).

    Raises:
        SpaceError: one cannot be written, and names the bytes it needs; those before it are written. Or they cannot be
            flushed, and none is written.
    """
    if not files:
        return
    refused = None
    try:
        with atomic_files() as write:
            for file in files:
                try:
                    write(file.path, file.content)
                except (SpaceError, OSError) as error:
                    refused = file.cache.unwritable(error, f"this file needs {len(file.content):,} bytes")
                    refused.__cause__ = error
                    break
    except (SpaceError, OSError) as error:
        num_bytes = sum(len(file.content) for file in files)
        raise files[0].cache.unwritable(error, f"these files need {num_bytes:,} bytes") from error
    if refused is not None:
        raise refused


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """Return the CRC-32 over names, dtypes, shapes and bytes."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode(), value)
        value = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, value)
    return value
