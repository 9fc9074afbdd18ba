"""The index of image files: what was read from them, kept from run to run."""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import TypeAdapter

from anima_train.core.format import printable
from anima_train.data.cache import Cache
from anima_train.data.image_headers import Unreadable, probe
from anima_train.data.images import decode_mask
from anima_train.data.sources.archive import ArchiveMember, content_of, file_stamp

INDEX_VERSION = 4  # raise when the meaning of `ImageRecord`, or the form of the file, changes


class ImageRecord(NamedTuple):
    """The content hash and header of an image file, and its `file_stamp` when they were read."""

    num_bytes: int
    modified: int  # ns
    changed: int  # ns, of the inode: shows a file that is replaced by one of the same size and time
    sha256: str
    width: int
    height: int
    has_alpha: bool
    warnings: tuple[str, ...]
    coverage: float = 1.0  # of a mask: the share of the image that it trains


RECORDS = TypeAdapter(dict[str, ImageRecord])


class ImageIndex:
    """The records of a folder's files, so that a second start reads only those files that have changed.

    Args:
        cache: of the directory; keeps the index.
        kind: "images" or "masks".
        identity: of the directory that holds the files.
    """

    def __init__(self, cache: Cache, kind: str, identity: bytes) -> None:
        self.cache = cache
        self.holds_masks = kind == "masks"
        digest = hashlib.sha256(identity).hexdigest()
        self.path = cache.folder / f"{kind}_{INDEX_VERSION}_{digest[:16]}.json"
        self.records: dict[str, ImageRecord] = {}
        with contextlib.suppress(OSError, ValueError):  # none yet, or damaged: the files are read again
            digest_line, _, content = self.path.read_bytes().partition(b"\n")
            if digest_line.decode() == hashlib.sha256(content).hexdigest():
                self.records = RECORDS.validate_json(content)
        self.changed = False

    def lookup(self, name: str, file: Path | ArchiveMember) -> ImageRecord:
        """Return the record of a file, by its path in the directory; the file is read only if it is new or has changed.

        Raises:
            BadImage: the file is no image that can be used.
        """
        name = printable(name)
        try:
            # Taken before the file is read: a file that changes meanwhile is read again the next time.
            stamp = file_stamp(file) if isinstance(file, Path) else file.stamp
            record = self.records.get(name)
            if record is None or record[:3] != stamp:
                record = read_record(name, file, stamp, self.holds_masks)
                self.records[name] = record
                self.changed = True
        except OSError as error:
            raise Unreadable(f"not readable ({error.strerror})") from error
        return record

    def save(self) -> None:
        """Write the index, if it has changed.

        Raises:
            SpaceError: it cannot be written.
        """
        if self.changed:
            content = RECORDS.dump_json(self.records)
            self.cache.write(self.path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def read_record(name: str, file: Path | ArchiveMember, stamp: tuple[int, int, int], is_mask: bool) -> ImageRecord:
    """Read the header of an image file and hash its content, read once; a mask is decoded, to see what it leaves.

    Raises:
        BadImage: as `content_of` and `probe`; for a mask as `decode_mask`.
    """
    content = content_of(file)
    info = probe(content, os.path.splitext(name)[1])
    digest = hashlib.sha256(content).hexdigest()
    coverage = float(np.asarray(decode_mask(content, (info.width, info.height))).mean()) / 255 if is_mask else 1.0
    return ImageRecord(*stamp, digest, info.width, info.height, info.has_alpha, info.warnings, coverage)
