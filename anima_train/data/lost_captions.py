"""Captions that lie beside images in a form that is not read: found before a run trains without them."""

import contextlib
import os
from collections.abc import Iterator, Sequence

from anima_train.core.format import Listing, count
from anima_train.data.scan_images import ScannedImage
from anima_train.data.settings import DirectoryOptions
from anima_train.data.sources.folder import CAPTION_SUFFIXES, CAPTIONS_JSON, Files, stem_of, suffix_of

LISTS = ("captions", "caption", "metadata", "prompts", "labels")  # text files of one caption a line
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # as Hugging Face's image folders have them


def lost_captions(files: Files, images: Sequence[ScannedImage], options: DirectoryOptions) -> str | None:
    """Return what to do where most images lack a caption, and files that look like captions are there.

    None where `missing_caption` is set, as then it is meant.

    Args:
        files: of the directory.
        images: that can be used.
        options: of the directory.
    """
    lacking = [image.file for image in images if image.is_uncaptioned]
    if 2 * len(lacking) <= len(images) or "missing_caption" in options.model_fields_set or files.is_table:
        return None
    for found, remedy in candidates(files, lacking, options):
        if found:
            text = (
                f"{files.folder}: {len(lacking):,} of {count(len(images), 'image')} would be trained without a "
                f"caption, while {count(len(found), 'file')}, such as {found[0]}, may hold them: {remedy}. If they are "
                'to have none: missing_caption = "empty"'
            )
            return Listing(text, found, num_shown=0)
    return None


def misnamed(files: Files, lacking: Sequence[str]) -> Iterator[tuple[list[str], str]]:
    """Yield text files that are named nearly as images without a caption, lie elsewhere, or are lists of captions."""
    by_name = {os.path.basename(stem_of(name)).lower(): stem_of(name) for name in lacking}
    texts = [names[0] for kind in (files.caption_files, files.natural_files) for names in kind.values()]
    stems = {stem_of(name) for name in files.images}
    strays = [name for name in texts if stem_of(name) not in stems]
    elsewhere = [name for name in (*strays, *unsearched_texts(files)) if key_of(name) in by_name]
    moved = [name for name in elsewhere if os.path.dirname(name) != os.path.dirname(by_name[key_of(name)])]
    yield moved, "move them beside their images"
    if elsewhere:
        yield elsewhere, f"rename them, {elsewhere[0]} to {by_name[key_of(elsewhere[0])]}.txt"
    # As a0_tags.txt or A0.PNG.txt of a0.png: the longest beginning that is an image's name.
    for mark in ("_", ".", "-", " "):
        longer = [name for name in strays if key_of(name).rpartition(mark)[0] in by_name]
        if longer:
            yield longer, f"rename them, {longer[0]} to {by_name[key_of(longer[0]).rpartition(mark)[0]]}.txt"
    lists = [name for name in strays if key_of(name) in LISTS]
    yield lists, f'write them into one {CAPTIONS_JSON}, {{"file name": "caption"}}'


def key_of(name: str) -> str:
    """Return the last part of a name without its suffix, in small letters."""
    return stem_of(os.path.basename(name)).lower()


def unsearched_texts(files: Files) -> list[str]:
    """Return the caption files in sub-folders that are not searched."""
    found: list[str] = []
    for folder in files.subfolders:
        with contextlib.suppress(OSError):
            inside = sorted(os.listdir(files.folder / folder))
            found.extend(f"{folder}/{name}" for name in inside if suffix_of(name) in CAPTION_SUFFIXES)
    return found


def candidates(files: Files, lacking: Sequence[str], options: DirectoryOptions) -> Iterator[tuple[list[str], str]]:
    """Yield files that may hold the captions of images that lack one, and what makes them count."""
    stems = {stem_of(name) for name in lacking}
    if options.caption_mode == "tags":
        natural = [names[0] for stem, names in files.natural_files.items() if stem in stems]
        yield natural, 'caption_mode = "nl" reads them'
    if options.caption_mode == "nl":
        tags = [names[0] for stem, names in files.caption_files.items() if stem in stems]
        yield tags, 'caption_mode = "tags" reads them'
    behind = [files.caption_files[name][0] for name in lacking if name in files.caption_files]
    if behind:
        yield behind, f"rename them, {behind[0]} to {stem_of(stem_of(behind[0]))}.txt"
    yield from misnamed(files, lacking)
    same_stem = [name for name in files.unused_files if stem_of(name) in stems]
    tables = [name for name in files.unused_files if os.path.basename(name).lower() in TABLES]
    as_json = f'write them into one {CAPTIONS_JSON}, {{"file name": "caption"}}'
    yield tables, f"hf_dataset = {str(files.folder)!r} instead of path reads images and table"
    yield [name for name in same_stem if suffix_of(name) == ".json"], as_json
    yield [name for name in same_stem if suffix_of(name) != ".json"], "save them as text files that end in .txt"
    yield [name for name in files.unused_files if suffix_of(name) in (".json", ".jsonl", ".csv")], as_json
    yield (
        [name for name in files.listed_captions if name not in files.images],
        (f"{CAPTIONS_JSON} has other names than the images; it names files beside it, with their suffix"),
    )
