"""A folder or an archive as a source of images, with the captions and masks that belong to them."""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from anima_train.core.errors import DataError
from anima_train.data.cache import Cache
from anima_train.data.captions import BadCaption, read_captions_json
from anima_train.data.image_headers import EXTENSIONS, UNREAD_SUFFIXES
from anima_train.data.settings import DirectoryOptions
from anima_train.data.sources.archive import ArchiveMember, is_left_out, tar_members

CAPTIONS_JSON = "captions.json"
CAPTION_SUFFIXES = (".txt", ".caption")  # the first one of an image is read
MASK_SUFFIXES = ("-masklabel", "_mask")  # of the stem of a mask beside its image
NATURAL_SUFFIX = "_nl"  # of the stem of a natural-language caption


@dataclass(frozen=True, kw_only=True)
class Files:
    """The files of a directory and its mask folder; a name is a path in them, with slashes, a stem has no suffix."""

    folder: Path  # or the one file that holds all of them
    mask_folder: Path | None
    members: Mapping[str, ArchiveMember]  # images, captions and tables that are inside of other files, by name
    mask_members: Mapping[str, ArchiveMember]
    images: list[str]  # all that are named like one, whatever they hold
    caption_files: dict[str, list[str]] = field(default_factory=dict)  # by stem; the first is read
    natural_files: dict[str, list[str]] = field(default_factory=dict)  # in natural language, by the image's stem
    listed_captions: dict[str, tuple[str, ...]]  # by image; those of a captions.json or a dataset's column
    listed_natural: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of a dataset's column
    mask_files: dict[str, list[str]]  # by stem; the first is read
    masks_beside: dict[str, list[str]] = field(default_factory=dict)  # by the stem of the image; the first is read
    captioned_masks: list[str] = field(default_factory=list)  # named as masks of images, with captions of their own
    unread_images: list[str] = field(default_factory=list)  # pictures and videos of formats that are not read
    subfolders: list[str] = field(default_factory=list)  # not searched; without the mask folder
    repeated_folders: list[str] = field(default_factory=list)  # searched under another name, and so not again
    unused_files: list[str] = field(default_factory=list)  # neither image nor caption
    lost_members: dict[str, str] = field(default_factory=dict)  # of archives: links and the like, with the reason
    identity: bytes  # the same for the same images in every run
    mask_identity: bytes
    is_table: bool = False  # rows of a dataset, not files

    @classmethod
    def of(cls, folder: Path, mask_folder: Path | None, options: DirectoryOptions, cache: Cache) -> "Files":
        """Return the files of both folders.

        Raises:
            DataError: one cannot be read, or an archive or a captions.json in it.
        """
        excluded = [cache.folder] if mask_folder is None else [cache.folder, mask_folder]
        found = list_folder(folder, options, excluded)
        images = [name for name in found.names if is_image(name)]
        texts = [name for name in found.names if suffix_of(name) in CAPTION_SUFFIXES]
        beside, captioned_masks = masks_beside(images, texts)
        images = sorted(set(images) - {mask for masks in beside.values() for mask in masks}, key=os.fsencode)
        unread = [name for name in found.names if suffix_of(name)[1:] in UNREAD_SUFFIXES]
        stems = {stem_of(name) for name in images}
        # x_nl.txt belongs to the image x, but to the image x_nl if there is one.
        natural = [name for name in texts if stem_of(name).endswith(NATURAL_SUFFIX) and stem_of(name) not in stems]
        captions = sorted(set(texts) - set(natural), key=in_order)
        natural = sorted(natural, key=in_order)
        tables = [name for name in found.names if os.path.basename(name) == CAPTIONS_JSON]
        used = {*images, *(mask for masks in beside.values() for mask in masks), *texts, *unread, *tables}
        rest = [name for name in found.names if name not in used]
        subfolders = [name for name in rest if os.path.isdir(folder / name)]
        shown = [name for name in subfolders if not is_left_out(os.path.basename(name), is_folder=True)]
        masks = FoundNames() if mask_folder is None else list_folder(mask_folder, options, [cache.folder])
        return cls(
            folder=folder,
            mask_folder=mask_folder,
            members=found.members,
            mask_members=masks.members,
            images=images,
            caption_files=by_stem(captions),
            natural_files={stem.removesuffix(NATURAL_SUFFIX): files for stem, files in by_stem(natural).items()},
            listed_captions=captions_from(folder, tables, found.members),
            mask_files=by_stem([name for name in masks.names if is_image(name)]),
            subfolders=shown,
            repeated_folders=found.repeated_folders,
            masks_beside=beside,
            captioned_masks=captioned_masks,
            unread_images=unread,
            lost_members=found.lost_members,
            unused_files=sorted(set(rest) - set(subfolders), key=os.fsencode),
            identity=os.fsencode(folder.resolve()),
            mask_identity=os.fsencode((mask_folder or folder).resolve()),
        )

    def file(self, name: str) -> Path | ArchiveMember:
        """Return the source of an image or a caption: a path, or a member of another file."""
        return self.members.get(name) or self.folder / name

    def mask(self, name: str) -> Path | ArchiveMember:
        """Return the source of a mask: a path, or a member of another file."""
        assert self.mask_folder is not None
        return self.mask_members.get(name) or self.mask_folder / name


@dataclass
class FoundNames:
    """The names in a folder and in those of its sub-folders and archives that are searched."""

    names: list[str] = field(default_factory=list)  # files, and sub-folders and archives that are not searched
    members: dict[str, ArchiveMember] = field(default_factory=dict)  # those of the files that are in archives
    lost_members: dict[str, str] = field(default_factory=dict)  # of archives, with the reason why they are not read
    repeated_folders: list[str] = field(default_factory=list)  # folders that are searched under another name


def list_folder(folder: Path, options: DirectoryOptions, excluded: Sequence[Path]) -> FoundNames:
    """Return the names in a folder, ordered by the bytes of the names.

    Each folder is searched once, under the name that is found first, so that loops of links end. Hidden ones never are.

    Args:
        folder: a folder or an archive.
        options: choose which sub-folders and archives are searched.
        excluded: folders that are left out.

    Raises:
        DataError: a folder or archive cannot be read; for all archives at once.
    """
    found = FoundNames()
    problems: list[str] = []

    def search(archive: Path, inside: str) -> None:
        try:
            members, lost = tar_members(archive)
            found.members.update((inside + name, member) for name, member in members.items())
            found.lost_members.update((inside + name, reason) for name, reason in lost.items())
        except DataError as error:
            problems.extend(error.problems)

    try:
        excluded_ids = {identity(path) for path in excluded if path.exists()}
        seen = {identity(folder)}
        pending = [""] if folder.is_dir() else []
        if folder.is_file():
            search(folder, "")
        for inside in pending:  # grows while it is iterated
            for entry in sorted(os.listdir(folder / inside), key=os.fsencode):
                name = inside + entry
                if not os.path.isdir(folder / name):
                    if is_left_out(entry):
                        continue
                    if options.tars and suffix_of(name) == ".tar" and (folder / name).is_file():
                        search(folder / name, f"{name}/")
                    else:
                        found.names.append(name)
                elif (folder_id := identity(folder / name)) in excluded_ids:
                    continue
                elif is_left_out(entry, is_folder=True) or not options.searches(name):
                    found.names.append(name)
                elif folder_id in seen:
                    found.repeated_folders.append(name)
                else:
                    seen.add(folder_id)
                    pending.append(f"{name}/")
    except OSError as error:
        path = folder if error.filename is None else error.filename
        raise DataError(f"{path}: cannot be read ({error.strerror}); it should be a folder of images") from error
    if problems:
        raise DataError(problems)
    found.names = sorted([*found.names, *found.members], key=os.fsencode)
    return found


def identity(folder: Path) -> tuple[int, int]:
    """Return the device and inode of a folder, which are the same for all of its names."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def captions_from(
    folder: Path, tables: Iterable[str], members: Mapping[str, ArchiveMember]
) -> dict[str, tuple[str, ...]]:
    """Return the captions of every captions.json, by image; each names the images beside it.

    Raises:
        DataError: they cannot be read; all of them at once.
    """
    captions: dict[str, tuple[str, ...]] = {}
    problems = []
    for table in tables:
        inside = table.removesuffix(CAPTIONS_JSON)
        try:
            texts_of = read_captions_json(members.get(table) or folder / table)
            captions |= {inside + name: texts for name, texts in texts_of.items()}
        except BadCaption as error:
            problems.append(f"{folder / table}: {error}")
    if problems:
        raise DataError(problems)
    return captions


def is_image(name: str) -> bool:
    """Return True if a file is named like an image, whatever it holds."""
    return suffix_of(name) in EXTENSIONS


def masks_beside(images: Sequence[str], captions: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return those of the images that are masks of others, by the stem of the other; and those that only seem to be.

    x-masklabel.png (as OneTrainer writes it) or x_mask.png, also in capitals, is the mask of x, unless it has a caption
    of its own.
    """
    stems, captioned = {stem_of(name) for name in images}, {stem_of(name) for name in captions}
    found: dict[str, list[str]] = defaultdict(list)
    others = []
    for suffix in MASK_SUFFIXES:
        for name in images:
            stem = stem_of(name)[: -len(suffix)]
            if not stem_of(name).lower().endswith(suffix) or stem not in stems:
                continue
            if stem_of(name) in captioned:
                others.append(name)
            else:
                found[stem].append(name)
    return dict(found), others


def in_order(caption_file: str) -> tuple[int, bytes]:
    """Return the key that sorts caption files: those with the suffix that counts first in front."""
    return CAPTION_SUFFIXES.index(suffix_of(caption_file)), os.fsencode(caption_file)


def suffix_of(name: str) -> str:
    """Return a name's suffix in lower case, with its dot; "" without one."""
    return os.path.splitext(name)[1].lower()


def stem_of(name: str) -> str:
    """Return a name without its suffix."""
    return os.path.splitext(name)[0]


def by_stem(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names grouped by their stems."""
    stems: dict[str, list[str]] = defaultdict(list)
    for name in names:
        stems[stem_of(name)].append(name)
    return dict(stems)
