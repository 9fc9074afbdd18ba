"""Images, captions and masks that are no files of their own, but inside of others: members of tar archives."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from anima_train.core.errors import DataError
from anima_train.data.images import Unreadable, read_file


class Stored(Protocol):
    """An image, caption or mask inside of another file."""

    @property
    def stamp(self) -> tuple[int, int, int]:
        """What changes when the content may have: as `FileFacts` begins."""

    def read(self) -> bytes:
        """The content.

        Raises:
            Unreadable: it cannot be read.
        """


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file in an archive that is not compressed."""

    archive: Path
    offset: int
    num_bytes: int
    modified: int  # ns, of the archive
    changed: int  # ns

    @property
    def stamp(self) -> tuple[int, int, int]:
        """Of its size, and its archive."""
        return self.num_bytes, self.modified, self.changed

    def read(self) -> bytes:
        """The content.

        Raises:
            Unreadable: the archive cannot be read, or has become shorter.
        """
        try:
            with open(self.archive, "rb") as file:
                file.seek(self.offset)
                content = file.read(self.num_bytes)
        except OSError as error:
            raise Unreadable(f"{self.archive.name} is not readable ({error.strerror})") from error
        if len(content) < self.num_bytes:
            raise Unreadable(f"{self.archive.name} has become shorter")
        return content


def content_of(file: Path | Stored) -> bytes:
    """The whole content, read once.

    Raises:
        BadImage: not a file, or none of a plausible size; `Unreadable` where a later try may go well.
    """
    return read_file(file) if isinstance(file, Path) else file.read()


def tar_members(archive: Path) -> Iterator[tuple[str, TarMember]]:
    """The names of the files in an archive, and where they are; nothing is unpacked. Hidden ones are left out.

    Raises:
        DataError: it cannot be read, is damaged, or compressed.
    """
    try:
        status = archive.stat()
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                if member.isreg() and not member.issparse() and not member.name.rpartition("/")[2].startswith("."):
                    name = member.name.removeprefix("./")
                    yield (
                        name,
                        TarMember(archive, member.offset_data, member.size, status.st_mtime_ns, status.st_ctime_ns),
                    )
    except tarfile.TarError as error:
        raise DataError(
            f"{archive}: no tar archive, compressed, or damaged ({error}); only whole and uncompressed ones are read"
        ) from error
    except OSError as error:
        raise DataError(f"{archive}: cannot be read ({error.strerror})") from error
