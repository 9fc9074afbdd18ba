"""The cache of latents, masks and text: one file per value, named by a hash of everything the value depends on.

A changed image, crop, VAE, encoder or tokenizer changes the name, so an entry is never stale, only unused. Entries
appear whole or not at all, so any number of processes can fill one cache, and a killed one loses only the entries it
was making. Claims, small files that live processes renew, keep two of them from making the same entry.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from anima_train.core.errors import DataError, SpaceError
from anima_train.core.files import atomic_path

SCHEMA = 1  # raise when the meaning of an entry changes
SCHEMA_FILE = "schema.json"
FOR_NOW = "for now: "  # begins the reasons that only count for the run that found them
CACHE_FOLDER = ".anima_cache"  # beside the data
Kind = Literal["latent", "mask", "text"]

HEADER_READ = 4096  # bytes: length and header of every entry there is, in one read
MAX_HEADER = 1 << 20  # bytes; more than any entry has
CLAIM_RENEWAL = 30.0  # seconds
CLAIM_LIFE = 300.0  # seconds without renewal after which a claim is void, whoever's it is
UNWRITTEN_CLAIM_LIFE = 10.0  # seconds for which a claim may be empty: it is written as soon as it is there
TEMPORARY_LIFE = 3600.0  # seconds after which a temporary file is taken for left behind
ENTRY_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
REJECTED_NAME = re.compile(r"[0-9a-f]{64}\.txt")
CLAIM_NAME = re.compile(r"[0-9a-f]{64}")
TEMPORARY_NAME = re.compile(r"\.([0-9a-f]{40}|(images|masks)_\w+|schema\.json)\.\w+\.tmp")  # see `atomic_path`


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
            with atomic_path(path, len(content)) as temporary:
                temporary.write_bytes(content)  # not safetensors' own writer, which hides the reason of a failure
        except (SpaceError, OSError) as error:
            raise self.unwritable(error, len(content)) from error

    def unwritable(self, error: Exception, num_bytes: int) -> SpaceError:
        """What to tell the user when a file of this many bytes cannot be written."""
        return SpaceError(
            f"cache folder {self.folder}: {error}; this file needs {num_bytes:,} bytes. Free some space, or set "
            "cache_dir to a folder that can be written"
        )

    def is_whole(self, kind: Kind, key: str) -> bool:
        """Whether an entry is there and as long as its own header says; its content is not read."""
        try:
            with open(self.path(kind, key), "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                start = file.read(HEADER_READ)
                (length,) = struct.unpack_from("<Q", start)
                if length > min(size, MAX_HEADER):
                    return False
                header = json.loads((start + file.read(max(0, 8 + length - len(start))))[8 : 8 + length])
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (OSError, struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return False
        return bool(size == 8 + length + max(ends, default=0))

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

    def reject(self, key: str, reason: str, for_now: bool = False) -> None:
        """Remember that the latent or mask of this key cannot be made, so that no run tries again.

        Args:
            key: of the latent or mask.
            reason: why not.
            for_now: whether the next run shall try again: the file could not be read, say.

        Raises:
            SpaceError: as `write`.
        """
        text = FOR_NOW + reason if for_now else reason
        # A reason may name a file, and a file's name may hold bytes that are no UTF-8.
        self.write(self.rejection(key), text.encode("utf-8", errors="backslashreplace"))

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
        """Whether there is nothing to do for an entry: it is whole, or cannot be made."""
        return self.is_whole(kind, key) or self.rejection(key).exists()

    def rejection(self, key: str) -> Path:
        """Where the reason lies why an entry cannot be made."""
        return self.folder / "rejected" / f"{key}.txt"

    def rejected(self) -> dict[str, str]:
        """Keys of latents and masks that cannot be made, with the reasons."""
        return {
            path.stem: path.read_text(encoding="utf-8", errors="replace").removeprefix(FOR_NOW)
            for path in (self.folder / "rejected").glob("*.txt")
        }

    # Versions

    def newest_schema(self) -> int:
        """The newest schema that entries were written in; 0 if none is known."""
        try:
            return int(json.loads((self.folder / SCHEMA_FILE).read_bytes())["schema"])
        except (OSError, ValueError, LookupError, TypeError):
            return 0

    def note_schema(self) -> None:
        """Say in the folder in which schema entries are written, for versions to come, or for older ones.

        Raises:
            SpaceError: as `write`.
        """
        if self.newest_schema() < SCHEMA:
            self.write(self.folder / SCHEMA_FILE, json.dumps({"schema": SCHEMA}).encode())

    # Claims

    def claim_path(self, key: str) -> Path:
        """The file that says who is making an entry."""
        return self.folder / "claims" / key

    def claimant(self, key: str) -> str | None:
        """Which live process is making an entry, or None: no claim, or one whose process is gone or renews no more."""
        path = self.claim_path(key)
        try:
            age = time.time() - path.stat().st_mtime
            content = path.read_text(encoding="utf-8")
        except OSError:
            return None
        try:
            claim = json.loads(content)
            host, pid = str(claim["host"]), int(claim["pid"])
        except (ValueError, LookupError, TypeError):  # its process is about to write it, or was killed before it did
            return "a process" if age <= UNWRITTEN_CLAIM_LIFE else None
        if age > CLAIM_LIFE or (host == socket.gethostname() and not runs_elsewhere(pid)):
            return None
        return f"process {pid} on {host}"

    def listed(self) -> Iterator[tuple[Path, re.Pattern[str]]]:
        """The folders that belong to the cache, with what the names in them look like. Links are not followed."""
        yield self.folder / "rejected", REJECTED_NAME
        yield self.folder / "claims", CLAIM_NAME
        for kind in get_args(Kind):
            for folder in sorted((self.folder / kind).glob("??")):
                if folder.is_dir() and not folder.is_symlink() and not folder.parent.is_symlink():
                    yield folder, ENTRY_NAME

    def prune(self, needed: Collection[str]) -> tuple[int, int]:
        """Remove entries and rejections whose key is not needed, void claims, and temporary files left behind.

        Files with other names, and whatever lies in other folders, stay.

        Returns:
            how many files, and how many bytes.

        Raises:
            SpaceError: one cannot be removed.
        """
        num_files = num_bytes = 0
        oldest = time.time() - TEMPORARY_LIFE
        for folder, names in [(self.folder, None), *self.listed()]:
            if not folder.is_dir() or (folder.is_symlink() and folder != self.folder):
                continue
            for path in sorted(folder.iterdir()):
                try:
                    status = path.lstat()
                    if TEMPORARY_NAME.fullmatch(path.name):
                        unused = status.st_mtime < oldest
                    elif names is None or not names.fullmatch(path.name):
                        continue
                    elif names is CLAIM_NAME:
                        unused = self.claimant(path.name) is None
                    else:
                        unused = path.stem not in needed
                    if unused:
                        path.unlink()
                        num_files, num_bytes = num_files + 1, num_bytes + status.st_size
                except FileNotFoundError:
                    continue  # another process was faster
                except OSError as error:
                    raise SpaceError(f"cache folder {self.folder}: {path} could not be removed: {error}") from error
        return num_files, num_bytes


class Claims:
    """What this process is making, told to others by files that a thread renews; all are given up at the end.

    Two processes that meet a void claim in the same instant may both take it; then both make the entry.
    """

    def __init__(self) -> None:
        self.held: set[Path] = set()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.renew, daemon=True)

    def __enter__(self) -> "Claims":
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        self.thread.join()
        for path in list(self.held):
            self.drop(path)

    def renew(self) -> None:
        """Touch what is held until the end."""
        while not self.ended.wait(CLAIM_RENEWAL):
            for path in list(self.held):
                with contextlib.suppress(OSError):  # dropped just now, or the disk is gone, which writing will tell
                    os.utime(path)

    def take(self, cache: Cache, key: str) -> bool:
        """Claim an entry; False if a live process has done so.

        Raises:
            SpaceError: the claim cannot be written.
        """
        path = cache.claim_path(key)
        content = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "time": round(time.time())}).encode()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and cache.claimant(key) is None:
                self.drop(path)
            with open(path, "xb") as file:
                self.held.add(path)
                file.write(content)
        except FileExistsError:
            if not path.exists() and not path.parent.is_dir():
                raise cache.unwritable(NotADirectoryError(f"{path.parent} is a file"), len(content)) from None
            return False
        except OSError as error:
            raise cache.unwritable(error, len(content)) from error
        return True

    def release(self, cache: Cache, key: str) -> None:
        """Give a claim up."""
        self.drop(cache.claim_path(key))

    def drop(self, path: Path) -> None:
        """Remove a claim's file."""
        with contextlib.suppress(OSError):  # gone already; or it stays, and is void as soon as this process has ended
            path.unlink()
        self.held.discard(path)  # last: a signal in between finds it, and drops it again


def runs_elsewhere(pid: int) -> bool:
    """Whether this is another process of this machine; True where that cannot be told without harm, as on Windows."""
    if pid == os.getpid():  # of a process before this one: this one asks only for what it does not hold
        return False
    if os.name == "nt" or pid <= 0:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 over names, dtypes, shapes and bytes."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode(), value)
        value = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, value)
    return value
