"""What was found in image files, remembered from run to run."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter

from anima_train.core.errors import printable
from anima_train.core.files import sha256_file
from anima_train.data.cache import Cache
from anima_train.data.images import BadImage, probe

MEMO_VERSION = 1  # raise when the meaning of `FileFacts` changes


class FileFacts(NamedTuple):
    """What a look at an image file found, and by what a change of the file shows."""

    num_bytes: int
    modified: int  # ns
    changed: int  # ns, of the file's place and rights too: shows a file that is replaced by one of its size and time
    sha256: str
    width: int
    height: int
    warnings: tuple[str, ...]


FACTS = TypeAdapter(dict[str, FileFacts])


class FactsMemo:
    """Remembers what the files of a folder held, so that a second start reads only those that have changed.

    Args:
        cache: where the memory is kept.
        kind: "images" or "masks".
        folder: the folder of the files.
    """

    def __init__(self, cache: Cache, kind: str, folder: Path) -> None:
        self.cache = cache
        self.folder = folder
        digest = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()
        self.path = cache.folder / f"{kind}_{MEMO_VERSION}_{digest[:16]}.json"
        try:
            self.known = FACTS.validate_json(self.path.read_bytes())
        except (OSError, ValueError):  # none yet, or damaged: the files are looked at again
            self.known = {}
        self.changed = False

    def facts(self, file: str) -> FileFacts:
        """A file's facts, by its path in the folder, from memory where it has not changed.

        Raises:
            BadImage: the file is no image that can be used.
        """
        path = self.folder / file
        name = printable(file)
        try:
            status = path.stat()
            # Taken before the file is read: a file that changes meanwhile is looked at again the next time.
            stamp = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            facts = self.known.get(name)
            if facts is None or facts[:3] != stamp:
                info = probe(path)
                facts = FileFacts(*stamp, sha256_file(path), info.width, info.height, info.warnings)
                self.known[name] = facts
                self.changed = True
        except OSError as error:
            raise BadImage(f"not readable ({error.strerror})") from error
        return facts

    def save(self) -> None:
        """Write what is known now, if anything is new.

        Raises:
            SpaceError: it cannot be written.
        """
        if self.changed:
            self.cache.write(self.path, FACTS.dump_json(self.known))
