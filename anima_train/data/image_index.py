"""What was found in image files, remembered from run to run."""

import hashlib
import io
import os
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter

from anima_train.core.files import sha256_file
from anima_train.core.format import printable
from anima_train.data.cache import Cache
from anima_train.data.image_headers import BadImage, Unreadable, probe
from anima_train.data.sources.archive import ArchiveMember

MEMO_VERSION = 2  # raise when the meaning of `ImageRecord` changes


class ImageRecord(NamedTuple):
    """What a look at an image file found, and by what a change of the file shows."""

    num_bytes: int
    modified: int  # ns
    changed: int  # ns, of the file's place and rights too: shows a file that is replaced by one of its size and time
    sha256: str
    width: int
    height: int
    has_alpha: bool
    warnings: tuple[str, ...]


FACTS = TypeAdapter(dict[str, ImageRecord])


class ImageIndex:
    """Remembers what the files of a folder held, so that a second start reads only those that have changed.

    Args:
        cache: where the memory is kept.
        kind: "images" or "masks".
        identity: of the directory that holds the files.
    """

    def __init__(self, cache: Cache, kind: str, identity: bytes) -> None:
        self.cache = cache
        digest = hashlib.sha256(identity).hexdigest()
        self.path = cache.folder / f"{kind}_{MEMO_VERSION}_{digest[:16]}.json"
        try:
            self.known = FACTS.validate_json(self.path.read_bytes())
        except (OSError, ValueError):  # none yet, or damaged: the files are looked at again
            self.known = {}
        self.changed = False

    def facts(self, name: str, file: Path | ArchiveMember) -> ImageRecord:
        """A file's facts, by its path in the directory, from memory where it has not changed.

        Raises:
            BadImage: the file is no image that can be used.
        """
        name = printable(name)
        try:
            # Taken before the file is read: a file that changes meanwhile is looked at again the next time.
            stamp = file_stamp(file) if isinstance(file, Path) else file.stamp
            facts = self.known.get(name)
            if facts is None or facts[:3] != stamp:
                facts = look_into(name, file, stamp)
                self.known[name] = facts
                self.changed = True
        except OSError as error:
            raise Unreadable(f"not readable ({error.strerror})") from error
        return facts

    def save(self) -> None:
        """Write what is known now, if anything is new.

        Raises:
            SpaceError: it cannot be written.
        """
        if self.changed:
            self.cache.write(self.path, FACTS.dump_json(self.known))


def file_stamp(path: Path) -> tuple[int, int, int]:
    """What changes when a file's content may have."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def look_into(name: str, file: Path | ArchiveMember, stamp: tuple[int, int, int]) -> ImageRecord:
    """What is in an image file.

    Raises:
        BadImage: as `probe`.
        OSError: the file cannot be read.
    """
    if isinstance(file, Path):
        info, digest = probe(file), sha256_file(file)
    else:
        content = file.read()
        if not content:
            raise BadImage("zero bytes")
        info, digest = probe(io.BytesIO(content), os.path.splitext(name)[1]), hashlib.sha256(content).hexdigest()
    return ImageRecord(*stamp, digest, info.width, info.height, info.has_alpha, info.warnings)
