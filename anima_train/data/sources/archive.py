"""Images, captions and masks that are no files of their own: members of archives, and rows of datasets."""

import os
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from anima_train.core.errors import DataError
from anima_train.data.image_headers import MAX_BYTES, BadImage, Unreadable, read_file

if TYPE_CHECKING:  # slow to import, and needed by those alone who have such a dataset
    from datasets import Dataset


# Of systems that leave something beside the files of people, in small letters.
LEAVINGS = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")
LEAVING_FOLDERS = ("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found")

NO_FILES = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a link to no file before it",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a FIFO",
}  # kinds of entries in a tar archive, as messages name them


class ArchiveMember(Protocol):
    """An image, caption or mask that is no file of its own: it can be read, and shows when it has changed."""

    @property
    def stamp(self) -> tuple[int, int, int]:
        """Three numbers that change when the content may have, as those of `file_stamp`."""

    def read(self) -> bytes:
        """Return the content.

        Raises:
            BadImage: it cannot be read; `Unreadable` where a later try may go well.
        """


def file_stamp(path: Path) -> tuple[int, int, int]:
    """Return three numbers that change when a file's content may have: size, and times of change in ns.

    Raises:
        OSError: there is no such file.
    """
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file in a tar archive that is not compressed."""

    archive: Path
    offset: int
    num_bytes: int
    modified: int  # ns, of the archive
    changed: int  # ns

    @property
    def stamp(self) -> tuple[int, int, int]:
        """Its size, and the times of its archive."""
        return self.num_bytes, self.modified, self.changed

    def read(self) -> bytes:
        """Return the content.

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


@dataclass(frozen=True, slots=True)
class RowImage:
    """An image inside of a dataset's row."""

    column: "Dataset"  # that column alone, as Arrow
    row: int
    stamp: tuple[int, int, int]  # the row, and the content of its column: see `column_images`

    def read(self) -> bytes:
        """Return the content."""
        value = self.column[self.row].column(0)[0].as_py()
        content: bytes = value["bytes"] if isinstance(value, dict) else value
        return content


@dataclass(frozen=True, slots=True)
class ReferencedImage:
    """An image that a dataset's row names and does not hold: a file or, as in many on the Hub, a member of a zip."""

    path: Path
    member: str | None

    @property
    def stamp(self) -> tuple[int, int, int]:
        """The stamp of the file, or archive."""
        return file_stamp(self.path)

    def read(self) -> bytes:
        """Return the content.

        Raises:
            BadImage: as `read_file`; for a member `Unreadable`.
        """
        if self.member is None:
            return read_file(self.path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                if (num_bytes := archive.getinfo(self.member).file_size) > MAX_BYTES:  # no more than this is unpacked
                    raise Unreadable(f"{num_bytes:,} bytes is more than the limit of {MAX_BYTES:,}")
                return archive.read(self.member)
        except KeyError as error:
            raise Unreadable(f"it is not in {self.path.name} any more") from error
        # RuntimeError: encrypted; NotImplementedError, a kind of it: packed in a way that Python does not know.
        except (OSError, zipfile.BadZipFile, EOFError, RuntimeError) as error:
            raise Unreadable(f"{self.path.name} is not readable ({error})") from error


@dataclass(frozen=True, slots=True)
class MissingImage:
    """The absence of an image that can be read in a dataset's row."""

    reason: str = "no image in this row"
    stamp: tuple[int, int, int] = (0, 0, 0)

    def read(self) -> bytes:
        """Raise BadImage."""
        raise BadImage(self.reason)


def is_left_out(name: str, is_folder: bool = False) -> bool:
    """Return True for the name of a file or folder that is hidden, or that a system has left."""
    return name.startswith(".") or name.lower() in (LEAVING_FOLDERS if is_folder else LEAVINGS)


def content_of(file: Path | ArchiveMember) -> bytes:
    """Return the whole content, read once.

    Raises:
        BadImage: not a file, or none of a plausible size; `Unreadable` where a later try may go well.
    """
    return read_file(file) if isinstance(file, Path) else file.read()


def tar_members(archive: Path) -> tuple[dict[str, TarMember], dict[str, str]]:
    """Return the files in an archive by name, and the reason for each name that is none; nothing is unpacked.

    Hidden ones are left out, as in folders. A name that is given again replaces the first, as for tar itself.

    Raises:
        DataError: it cannot be read, is damaged, or compressed.
    """
    members: dict[str, TarMember] = {}
    lost: dict[str, str] = {}
    try:
        status = archive.stat()
        with tarfile.open(archive, "r:") as tar:
            by_entry_name: dict[str, TarMember] = {}
            for entry in tar:
                parts = [part for part in entry.name.split("/") if part not in ("", ".")]
                name, is_out = "/".join(parts), ".." in parts
                inside = [part for part in parts if part != ".."]
                is_hidden = any(is_left_out(part, place < len(inside) - 1) for place, part in enumerate(inside))
                if entry.isreg() and not entry.issparse():
                    position = (entry.offset_data, entry.size, status.st_mtime_ns, status.st_ctime_ns)
                    by_entry_name[entry.name] = TarMember(archive, *position)
                elif entry.islnk() and entry.linkname in by_entry_name:  # another name of a file that came before
                    by_entry_name[entry.name] = by_entry_name[entry.linkname]
                elif not (entry.isdir() or is_hidden):
                    lost[name] = "a sparse file" if entry.issparse() else NO_FILES.get(entry.type, "no regular file")
                    continue
                else:
                    continue
                if is_out:
                    lost[name] = "its name leads out of the archive"
                elif not is_hidden:
                    if name in members:
                        lost[name] = "more than once; the last one is read"
                    members[name] = by_entry_name[entry.name]
            end = tar.offset
        # tarfile takes a damaged header for the end of the archive, and so would lose what follows it.
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
    return members, lost
