"""Files that are either there whole or not there at all."""

import concurrent.futures
import contextlib
import errno
import hashlib
import math
import os
import shutil
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from anima_train.core.errors import ConfigError, SpaceError
from anima_train.core.format import format_bytes

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)
UMASK_LOCK = threading.Lock()
SYNC_THREADS = 8  # that flush files side by side
BLOCK = 4096  # bytes; what file systems round a file's size up to


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of the file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def current_umask() -> int:
    """Return the process's umask (the system only tells it by setting it)."""
    with UMASK_LOCK:  # or a thread would take what another one sets meanwhile for the umask, and leave it so
        mask = os.umask(0o022)
        os.umask(mask)
    return mask


def on_disk(num_bytes: int) -> int:
    """Return the bytes that a file of this size takes of a disk."""
    return -(-num_bytes // BLOCK) * BLOCK


def existing_folder(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if os.path.isdir(place))


@contextlib.contextmanager
def written_to(path: Path) -> Iterator[None]:
    """Report what cannot be written while entered: there is a file where a folder should be, or the name is none.

    Raises:
        ConfigError: a file cannot be there.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror or error}); choose another place") from error


def check_writable(folder: Path, name: str) -> None:
    """Check that a folder can be made, or written if it is there; nothing is left behind.

    Args:
        folder: that will be written.
        name: of the key that says where it is.

    Raises:
        ConfigError: it cannot be a folder.
        SpaceError: it, or the one in which it would be made, cannot be written.
    """
    place = folder.absolute()
    try:
        while not place.exists():
            if place.is_symlink():
                raise ConfigError(f"{name}: {place} is a link that leads nowhere; set another folder")
            place = place.parent
    except OSError as error:  # a name that is too long
        raise ConfigError(f"{name}: {folder} cannot be written ({error.strerror}); set another folder") from error
    if not place.is_dir():
        raise ConfigError(f"{name}: {place} is a file, where a folder is needed; set another folder")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=place))
    except OSError as error:
        raise SpaceError(f"{name}: {place} cannot be written ({error.strerror}); set another folder") from error


def free_bytes(folder: Path) -> float:
    """Return the bytes free for writing in a folder, which need not exist; infinity if the disk does not tell."""
    usage = shutil.disk_usage(existing_folder(folder))
    return usage.free if usage.total else math.inf  # some disks in memory or on a network say 0 bytes in all


@dataclass(frozen=True)
class DiskRequirement:
    """The bytes that are about to be written in a folder, which need not exist."""

    folder: Path
    num_bytes: int  # on disk
    what: str  # "the training state"


def require_space(needs: Iterable[DiskRequirement], remedy: str) -> None:
    """Check that the disks have room for all of these; requirements of folders on the same disk are summed.

    A quota is not seen ahead: the system tells of it only when a write fails.

    Args:
        needs: everything that is to be written.
        remedy: the end of the message.

    Raises:
        SpaceError: for each disk without room the bytes needed, free and missing; or a folder that cannot be written.
    """
    by_disk: dict[int, list[DiskRequirement]] = defaultdict(list)
    problems = []
    for need in needs:
        if need.num_bytes == 0:
            continue
        folder = existing_folder(need.folder)
        if os.access(folder, os.W_OK):
            by_disk[folder.stat().st_dev].append(need)
        else:
            size = format_bytes(need.num_bytes)
            problems.append(f"{need.folder}: cannot be written, where {size} are needed for {need.what}; {remedy}")
    for wanted in by_disk.values():
        num_bytes, free = sum(need.num_bytes for need in wanted), free_bytes(wanted[0].folder)
        if num_bytes > free:
            names = [f"{need.what} in {need.folder} ({format_bytes(need.num_bytes)})" for need in wanted]
            problems.append(
                f"the disk has no room for {', '.join(names)}: {format_bytes(num_bytes)} needed, "
                f"{format_bytes(free)} free, {format_bytes(num_bytes - free)} missing; {remedy}"
            )
    if problems:
        raise SpaceError(problems)


@contextlib.contextmanager
def atomic_path(path: Path, num_bytes: int | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed to `path`, else removed.

    The file gets the permissions the umask allows (safetensors writes 0600), and the folder's entry is flushed too,
    so after this returns a power cut cannot take the file back.

    Args:
        path: of the file.
        num_bytes: of the file, if known: nothing is written without room for all of it.

    Raises:
        SpaceError: the disk is full or read-only; an earlier file at `path` is untouched.
    """
    with disk_errors(path, num_bytes):
        temporary = temporary_beside(path, num_bytes)
        try:
            yield temporary
            os.chmod(temporary, 0o666 & ~current_umask())
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)  # before the free space is looked at for the message


def temporary_beside(path: Path, num_bytes: int | None) -> Path:
    """Return a new empty file in the folder of `path`, which is made; arguments as of `atomic_path`."""
    if num_bytes is not None and on_disk(num_bytes) > free_bytes(path.parent):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    return Path(name)


@contextlib.contextmanager
def atomic_files() -> Iterator[Callable[[Path, bytes], None]]:
    """Yield a function that writes a file under a temporary name; on leaving, all files appear under their own.

    Each is as safe as with `atomic_path`, for two waits for the disk in all: first all files are flushed, side by side
    (file systems join flushes that come together), then all are renamed, then each folder is flushed once. So at any
    moment, that of a power cut too, a file under its own name is whole. Every file has to be flushed by itself:
    `os.sync` only begins it on some systems, waits for what other programs write, and hides the errors.

    On an exception inside, or if a file cannot be flushed, none appears.

    Raises:
        SpaceError: the disk is full or read-only; by the function, or on leaving. Earlier files are untouched.
    """
    temporaries: list[tuple[Path, Path]] = []

    def write(path: Path, content: bytes) -> None:
        with disk_errors(path, len(content)):
            temporary = temporary_beside(path, len(content))
            try:
                temporary.write_bytes(content)
                os.chmod(temporary, 0o666 & ~current_umask())
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            temporaries.append((temporary, path))

    try:
        yield write
        publish(temporaries)
    finally:
        for temporary, _ in temporaries:
            temporary.unlink(missing_ok=True)


def publish(temporaries: Sequence[tuple[Path, Path]]) -> None:
    """Flush temporary files, rename each to the path beside it, and flush their folders."""

    def flush(written: Path, path: Path) -> None:
        with disk_errors(path):
            sync(written)

    if not temporaries:
        return
    with concurrent.futures.ThreadPoolExecutor(min(SYNC_THREADS, len(temporaries))) as pool:
        for flushed in [pool.submit(flush, *pair) for pair in temporaries]:
            flushed.result()
        for temporary, path in temporaries:
            with disk_errors(path):
                os.replace(temporary, path)
        for flushed in [pool.submit(flush, folder, folder) for folder in {path.parent for _, path in temporaries}]:
            flushed.result()


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success all of it is flushed to disk and it is renamed, else removed.

    `path` is not there yet, or an empty folder.

    Raises:
        SpaceError: the disk is full or read-only.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.parent))
        try:
            yield temporary
            os.chmod(temporary, 0o777 & ~current_umask())
            for inside in (*temporary.rglob("*"), temporary):
                sync(inside)
            temporary.rename(path)
            sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(path: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Report a disk that is full or read-only as a `SpaceError` about `path`.

    Args:
        path: of the file or folder that is written.
        num_bytes: of it, if known.
    """
    try:
        yield
    except OSError as error:
        if error.errno in UNWRITABLE:
            lack = shortfall(path.parent, num_bytes) if error.errno == errno.ENOSPC else ""
            raise SpaceError(
                f"{path}: could not be written ({error.strerror}){lack}; earlier files are intact"
            ) from error
        raise


def shortfall(folder: Path, num_bytes: int | None) -> str:
    """Return the words of a message about what a full disk lacks; "" if the disk does not tell."""
    free = free_bytes(folder)
    if free == math.inf:
        return ""
    if num_bytes is None:
        return f"; the disk has {format_bytes(free)} free"
    text = f"; {format_bytes(num_bytes)} needed, {format_bytes(free)} free"
    if (missing := on_disk(num_bytes) - free) > 0:
        return f"{text}, {format_bytes(missing)} missing"
    return f"{text}: there was less, or the disk can take no more files"


def sync(path: Path) -> None:
    """Flush a file or a folder to disk; do nothing where folders cannot be flushed, as on Windows."""
    on_windows = os.name == "nt"
    if on_windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if on_windows else os.O_RDONLY)  # Windows flushes only what it may write
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    content = text.encode()
    with atomic_path(path, len(content)) as temporary:
        temporary.write_bytes(content)
