"""The files of a directory: images, and the captions and masks that belong to them."""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from anima_train.core.errors import DataError
from anima_train.data.cache import Cache
from anima_train.data.captions import BadCaption, read_captions_json
from anima_train.data.image_headers import EXTENSIONS
from anima_train.data.settings import DirectoryOptions
from anima_train.data.sources.archive import ArchiveMember, tar_members

CAPTIONS_JSON = "captions.json"
NATURAL = "_nl"  # ends the stem of a natural-language caption


@dataclass(frozen=True)
class Files:
    """What a directory and its mask folder hold: names are paths in them, with slashes; stems have no ending."""

    folder: Path  # or the one file that everything is in
    mask_folder: Path | None
    stored: Mapping[str, ArchiveMember]  # what is inside of other files, by name
    stored_masks: Mapping[str, ArchiveMember]
    images: list[str]  # all that is named like one, whatever it is
    captions: dict[str, list[str]]  # by stem; the first is read
    natural: dict[str, list[str]]  # captions in natural language, by the stem of the image
    given: dict[str, tuple[str, ...]]  # captions that are in no file of their own, by image: of a captions.json
    given_natural: dict[str, tuple[str, ...]]  # the same in natural language: of a table
    masks: dict[str, list[str]]
    subfolders: list[str]  # not searched; without the mask folder
    again: list[str]  # not searched, because they are folders that are searched under another name
    others: list[str]
    identity: bytes  # the same for the same images in every run
    mask_identity: bytes
    is_table: bool = False  # rows of a table, not files

    @classmethod
    def of(cls, folder: Path, mask_folder: Path | None, options: DirectoryOptions, cache: Cache) -> "Files":
        """List both folders.

        Raises:
            DataError: one cannot be read, or an archive or a captions.json in it.
        """
        own = [cache.folder] if mask_folder is None else [cache.folder, mask_folder]
        found = list_folder(folder, options, own)
        images = [name for name in found.names if is_image(name)]
        texts = [name for name in found.names if is_caption(name)]
        stems = {stem_of(name) for name in images}
        # x_nl.txt belongs to the image x, but to the image x_nl if there is one.
        natural = [name for name in texts if is_natural(name) and stem_of(name) not in stems]
        captions = sorted(set(texts) - set(natural), key=os.fsencode)
        tables = [name for name in found.names if os.path.basename(name) == CAPTIONS_JSON]
        used = {*images, *texts, *tables}
        rest = [name for name in found.names if not (name in used or os.path.basename(name).startswith("."))]
        subfolders = [name for name in rest if os.path.isdir(folder / name)]
        masks = Listing() if mask_folder is None else list_folder(mask_folder, options, [cache.folder])
        return cls(
            folder=folder,
            mask_folder=mask_folder,
            stored=found.stored,
            stored_masks=masks.stored,
            images=images,
            captions=by_stem(captions),
            natural={stem.removesuffix(NATURAL): files for stem, files in by_stem(natural).items()},
            given_natural={},
            given=captions_from(folder, tables, found.stored),
            masks=by_stem([name for name in masks.names if is_image(name)]),
            subfolders=subfolders,
            again=found.again,
            others=sorted(set(rest) - set(subfolders), key=os.fsencode),
            identity=os.fsencode(folder.resolve()),
            mask_identity=os.fsencode((mask_folder or folder).resolve()),
        )

    def file(self, name: str) -> Path | ArchiveMember:
        """Where an image or a caption is read from."""
        return self.stored.get(name) or self.folder / name

    def mask(self, name: str) -> Path | ArchiveMember:
        """Where a mask is read from."""
        assert self.mask_folder is not None
        return self.stored_masks.get(name) or self.mask_folder / name


@dataclass
class Listing:
    """What is in a folder and in its sub-folders and archives that are searched."""

    names: list[str] = field(default_factory=list)  # files, and sub-folders and archives that are not searched
    stored: dict[str, ArchiveMember] = field(default_factory=dict)  # those of the files that are in archives
    again: list[str] = field(default_factory=list)  # folders met again


def list_folder(folder: Path, options: DirectoryOptions, without: Sequence[Path]) -> Listing:
    """Everything in a folder and what is to be searched of it, ordered by the bytes of the names.

    Each folder is searched once, under the name that is found first, so that loops of links end. Hidden ones never are.

    Args:
        folder: where to start; an archive, too.
        options: which sub-folders and archives are searched.
        without: folders to pass over.

    Raises:
        DataError: a folder or archive cannot be read; for all archives at once.
    """
    found = Listing()
    problems: list[str] = []

    def search(archive: Path, inside: str) -> None:
        try:
            found.stored.update((inside + name, member) for name, member in tar_members(archive).items())
        except DataError as error:
            problems.extend(error.problems)

    try:
        passed_over = {identity(path) for path in without if path.exists()}
        seen = {identity(folder)}
        pending = [""] if folder.is_dir() else []
        if folder.is_file():
            search(folder, "")
        for inside in pending:  # it grows
            for entry in sorted(os.listdir(folder / inside), key=os.fsencode):
                name = inside + entry
                if not os.path.isdir(folder / name):
                    is_hidden = entry.startswith(".")  # as macOS leaves beside each file where it cannot hide more
                    if options.tars and is_archive(name) and not is_hidden and (folder / name).is_file():
                        search(folder / name, f"{name}/")
                    else:
                        found.names.append(name)
                elif (own := identity(folder / name)) in passed_over:
                    continue
                elif entry.startswith(".") or not options.searches(name):
                    found.names.append(name)
                elif own in seen:
                    found.again.append(name)
                else:
                    seen.add(own)
                    pending.append(f"{name}/")
    except OSError as error:
        place = folder if error.filename is None else error.filename
        raise DataError(f"{place}: cannot be read ({error.strerror}); it should be a folder of images") from error
    if problems:
        raise DataError(problems)
    found.names = sorted([*found.names, *found.stored], key=os.fsencode)
    return found


def identity(folder: Path) -> tuple[int, int]:
    """What is the same for every name of a folder."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def captions_from(
    folder: Path, tables: Iterable[str], stored: Mapping[str, ArchiveMember]
) -> dict[str, tuple[str, ...]]:
    """The captions of every captions.json, by image; each names the images beside it.

    Raises:
        DataError: they cannot be read; all of them at once.
    """
    captions: dict[str, tuple[str, ...]] = {}
    problems = []
    for table in tables:
        inside = table.removesuffix(CAPTIONS_JSON)
        try:
            texts_of = read_captions_json(stored.get(table) or folder / table)
            captions |= {inside + name: texts for name, texts in texts_of.items()}
        except BadCaption as error:
            problems.append(f"{folder / table}: {error}")
    if problems:
        raise DataError(problems)
    return captions


def is_image(name: str) -> bool:
    """Whether a file is named like an image, whatever it is."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def is_archive(name: str) -> bool:
    """Whether a file is named like an archive that can be read."""
    return os.path.splitext(name)[1].lower() == ".tar"


def is_caption(name: str) -> bool:
    """Whether a file is named like a caption, whatever it is."""
    return os.path.splitext(name)[1].lower() == ".txt"


def is_natural(name: str) -> bool:
    """Whether a file is named like a caption in natural language."""
    return is_caption(name) and stem_of(name).endswith(NATURAL)


def stem_of(name: str) -> str:
    """A name without its ending."""
    return os.path.splitext(name)[0]


def by_stem(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by their stems."""
    stems: dict[str, list[str]] = defaultdict(list)
    for name in names:
        stems[stem_of(name)].append(name)
    return dict(stems)
