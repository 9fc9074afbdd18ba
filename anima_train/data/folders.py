"""The files of a directory: images, and the captions and masks that belong to them."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from anima_train.core.errors import DataError
from anima_train.data.cache import Cache
from anima_train.data.captions import BadCaption, read_captions_json
from anima_train.data.images import EXTENSIONS
from anima_train.data.rules import Rules

CAPTIONS_JSON = "captions.json"
NATURAL = "_nl"  # ends the stem of a natural-language caption


@dataclass(frozen=True)
class Files:
    """What a directory and its mask folder hold: names are paths in them, with slashes; stems have no ending."""

    folder: Path
    mask_folder: Path | None
    images: list[str]  # all that is named like one, whatever it is
    captions: dict[str, list[str]]  # by stem; the first is read
    natural: dict[str, list[str]]  # captions in natural language, by the stem of the image
    from_json: dict[str, tuple[str, ...]]  # captions that a captions.json gives, by image
    masks: dict[str, list[str]]
    subfolders: list[str]  # not searched; without the mask folder
    again: list[str]  # not searched, because they are folders that are searched under another name
    others: list[str]

    @classmethod
    def of(cls, folder: Path, mask_folder: Path | None, rules: Rules, cache: Cache) -> "Files":
        """List both folders.

        Raises:
            DataError: one cannot be read, or a captions.json in it.
        """
        own = [cache.folder] if mask_folder is None else [cache.folder, mask_folder]
        names, again = list_folder(folder, rules.searches, own)
        images = [name for name in names if is_image(name)]
        texts = [name for name in names if is_caption(name)]
        stems = {stem_of(name) for name in images}
        # x_nl.txt belongs to the image x, but to the image x_nl if there is one.
        natural = [name for name in texts if is_natural(name) and stem_of(name) not in stems]
        captions = sorted(set(texts) - set(natural), key=os.fsencode)
        tables = [name for name in names if os.path.basename(name) == CAPTIONS_JSON]
        used = {*images, *texts, *tables}
        rest = [name for name in names if not (name in used or os.path.basename(name).startswith("."))]
        subfolders = [name for name in rest if os.path.isdir(folder / name)]
        masks: list[str] = []
        if mask_folder is not None:
            masks, _ = list_folder(mask_folder, rules.searches, [cache.folder])
        return cls(
            folder=folder,
            mask_folder=mask_folder,
            images=images,
            captions=by_stem(captions),
            natural={stem.removesuffix(NATURAL): files for stem, files in by_stem(natural).items()},
            from_json=captions_from(folder, tables),
            masks=by_stem([name for name in masks if is_image(name)]),
            subfolders=subfolders,
            again=again,
            others=sorted(set(rest) - set(subfolders), key=os.fsencode),
        )


def list_folder(folder: Path, searches: Callable[[str], bool], without: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Everything in a folder and the sub-folders that are to be searched, ordered by the bytes of the names.

    Each folder is searched once, under the name that is found first, so that loops of links end.

    Args:
        folder: where to start.
        searches: whether a sub-folder of this name is searched; hidden ones never are.
        without: folders to pass over.

    Returns:
        the names of files and of sub-folders that are not searched; the names of folders met again.

    Raises:
        DataError: one cannot be read.
    """
    names: list[str] = []
    again: list[str] = []
    try:
        passed_over = {identity(path) for path in without if path.exists()}
        seen = {identity(folder)}
        pending = [""]
        for inside in pending:  # it grows
            for entry in sorted(os.listdir(folder / inside), key=os.fsencode):
                name = inside + entry
                if not os.path.isdir(folder / name):
                    names.append(name)
                elif (own := identity(folder / name)) in passed_over:
                    continue
                elif entry.startswith(".") or not searches(name):
                    names.append(name)
                elif own in seen:
                    again.append(name)
                else:
                    seen.add(own)
                    pending.append(f"{name}/")
    except OSError as error:
        place = folder if error.filename is None else error.filename
        raise DataError(f"{place}: cannot be read ({error.strerror}); it should be a folder of images") from error
    return sorted(names, key=os.fsencode), again


def identity(folder: Path) -> tuple[int, int]:
    """What is the same for every name of a folder."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def captions_from(folder: Path, tables: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The captions of every captions.json, by image; each names the images beside it.

    Raises:
        DataError: they cannot be read; all of them at once.
    """
    captions: dict[str, tuple[str, ...]] = {}
    problems = []
    for table in tables:
        inside = table.removesuffix(CAPTIONS_JSON)
        try:
            captions |= {inside + name: texts for name, texts in read_captions_json(folder / table).items()}
        except BadCaption as error:
            problems.append(f"{folder / table}: {error}")
    if problems:
        raise DataError(problems)
    return captions


def is_image(name: str) -> bool:
    """Whether a file is named like an image, whatever it is."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


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
