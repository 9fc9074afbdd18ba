"""Images, captions and masks that are no files of their own, but inside of others: members of tar archives."""

import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from anima_train.core.errors import DataError
from anima_train.data.image_headers import MAX_BYTES, Unreadable, read_file


class ArchiveMember(Protocol):
    """An image, caption or mask inside of another file."""

    @property
    def stamp(self) -> tuple[int, int, int]:
        """What changes when the content may have: as `ImageRecord` begins."""

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
            Unreadable: the archive cannot be read, or is another one than before; or the member is too large.
        """
        if self.num_bytes > MAX_BYTES:
            raise Unreadable(f"{self.num_bytes:,} bytes is more than the limit of {MAX_BYTES:,}")
        try:
            with open(self.archive, "rb") as file:
                is_other = os.fstat(file.fileno()).st_mtime_ns != self.modified
                file.seek(self.offset)
                content = file.read(self.num_bytes)
        except OSError as error:
            raise Unreadable(f"{self.archive.name} is not readable ({error.strerror})") from error
        if is_other or len(content) < self.num_bytes:
            raise Unreadable(f"{self.archive.name} has changed since it was looked at")
        return content


def content_of(file: Path | ArchiveMember) -> bytes:
    """The whole content, read once.

    Raises:
        BadImage: not a file, or none of a plausible size; `Unreadable` where a later try may go well.
    """
    return read_file(file) if isinstance(file, Path) else file.read()


def tar_members(archive: Path) -> dict[str, TarMember]:
    """The names of the files in an archive, and where they are; nothing is unpacked.

    Hidden ones are left out, as are symbolic links.

    Raises:
        DataError: it cannot be read, is damaged, or compressed.
    """
    members: dict[str, TarMember] = {}  # a name that is given again replaces the first, as for tar itself
    try:
        status = archive.stat()
        with tarfile.open(archive, "r:") as tar:
            linked: dict[str, TarMember] = {}  # by the name as it stands
            for entry in tar:
                if entry.isreg() and not entry.issparse():
                    place = (entry.offset_data, entry.size, status.st_mtime_ns, status.st_ctime_ns)
                    linked[entry.name] = TarMember(archive, *place)
                elif entry.islnk() and entry.linkname in linked:  # another name of a file that came before
                    linked[entry.name] = linked[entry.linkname]
                else:
                    continue
                parts = [part for part in entry.name.split("/") if part not in ("", ".")]
                if not any(part.startswith(".") for part in parts):
                    members["/".join(parts)] = linked[entry.name]
            end = tar.offset
        # tarfile takes a damaged header for the end of the archive, and so would lose what comes behind it.
        with open(archive, "rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"no header and no end at byte {end:,}")
    except tarfile.TarError as error:
        raise DataError(
            f"{archive}: no tar archive, compressed, or damaged ({error}); only whole and uncompressed ones are read"
        ) from error
    except OSError as error:
        raise DataError(f"{archive}: cannot be read ({error.strerror})") from error
    return members
