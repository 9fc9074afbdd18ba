"""The warnings about a directory: files that are not used, images without a caption, captions with odd text."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from anima_train.core.format import Listing
from anima_train.data.caption_parts import caption_parts
from anima_train.data.captions import unescaped
from anima_train.data.image_headers import EXTENSIONS
from anima_train.data.scan_images import ScannedImage
from anima_train.data.settings import KOHYA_FOLDER, DirectoryOptions
from anima_train.data.sources.folder import Files, by_stem, is_image, stem_of

Findings = Iterator[tuple[str, list[str]]]  # what was found, and the files it was found in

CAPTION_FILES = {"tags": ".txt", "nl": "_nl.txt", "mixed": ".txt or _nl.txt"}  # by caption_mode
CAPTION_COLUMNS = {"tags": "caption_column", "nl": "natural_column", "mixed": "caption_column or natural_column"}

SEPARATOR = "|||"  # of tags that stay and tags that move, in captions written for kohya's scripts
BARE_COMMA = re.compile(r",(?=[^\s\d,])|[，、]")  # between two tags, without a blank, or of full width

LITTLE = 0.01  # of an image: a mask that leaves less is told

# Text that a tokenizer of the model reads as one of its special tokens, not as letters.
SPECIAL_TOKEN = re.compile(r"</s>|<pad>|<unk>|<extra_id_\d+>|<\|\w+\|>")


def folder_warnings(files: Files, images: Sequence[ScannedImage], options: DirectoryOptions) -> Iterator[str]:
    """Yield the warnings about a directory, one for each kind, with the number of files, the first one and all."""
    if not files.images:
        endings = ", ".join(sorted(EXTENSIONS))
        yield f"{files.folder}: holds no {'row' if files.is_table else f'image ({endings})'}"
    findings = chain(
        unused_entries(files, options),
        missing_captions(files, images, options),
        odd_texts(images, options),
        unused_captions(files, options),
        mask_findings(files, images),
        header_findings(images),
    )
    for text, names in findings:
        if names:
            yield Listing.naming_first(f"{files.folder}: {text}", names)


def caption_kind(files: Files, options: DirectoryOptions) -> str:
    """Return where a directory's captions come from, as messages say it."""
    return (CAPTION_COLUMNS if files.is_table else CAPTION_FILES)[options.caption_mode]


def unused_entries(files: Files, options: DirectoryOptions) -> Findings:
    """Yield the folders that are not searched or count as others, and the files that are of no known kind."""
    numbered = [name for name in files.subfolders if KOHYA_FOLDER.fullmatch(name)]
    yield "subfolders named as kohya's scripts count repeats, not searched; kohya_folders = true reads them", numbered
    parents = [name for name in files.subfolders if any(map(KOHYA_FOLDER.fullmatch, folders_in(files.folder / name)))]
    yield (
        "subfolders that hold folders named as kohya's scripts count repeats, not searched; a [[directory]] for each, "
        "with its path and kohya_folders = true, reads them",
        parents,
    )
    others = [name for name in files.subfolders if name not in (*numbered, *parents)]
    yield "subfolders, which are not searched", others
    if not options.kohya_folders:
        searched = {name.partition("/")[0] for name in files.images if "/" in name}
        counted = sorted(filter(KOHYA_FOLDER.fullmatch, searched))
        yield "subfolders named as kohya's scripts count repeats, seen once; kohya_folders = true counts them", counted
    if not files.is_table and KOHYA_FOLDER.fullmatch(files.folder.resolve().name):
        repeats, _, name = files.folder.resolve().name.partition("_")
        yield (
            "a folder named as kohya's scripts count repeats; kohya_folders counts those below path: num_repeats = "
            f'{repeats} does the same here, and trigger_word = "{name}" what the name did',
            [files.folder.resolve().name] if options.num_repeats == 1 else [],
        )
    yield "subfolders that are searched under another name, not searched again", files.repeated_folders
    yield "files that are neither images nor captions, not used", files.unused_files
    # An image that is there another time is used, and so not among those that are skipped.
    lost = {name: why for name, why in files.lost_members.items() if not is_image(name) or name in files.members}
    yield "entries of archives that are not read", [f"{name} ({why})" for name, why in lost.items()]


def folders_in(folder: Path) -> list[str]:
    """Return the names of a folder's sub-folders; none if it cannot be read."""
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError:
        return []


def missing_captions(files: Files, images: Sequence[ScannedImage], options: DirectoryOptions) -> Findings:
    """Yield the images that lack a caption of some kind, and the captions of a kind that is not used."""
    bare = "caption_prefix alone" if options.caption_prefix else "the empty one"
    sentences = "natural_column" if files.is_table else "_nl.txt"
    without = [] if options.skip_empty_caption else [image for image in images if not image.picture.has_caption]
    missing = [image.file for image in without if image.is_uncaptioned]
    yield f"images without a {caption_kind(files, options)} caption, trained with {bare}", missing
    empty = [image.file for image in without if not image.is_uncaptioned]
    yield f"images with an empty caption, trained with {bare}", empty
    if options.caption_mode == "mixed":
        # An image without any caption is counted as that, not as one without natural language.
        captioned = [image for image in images if image.picture.has_caption]
        tagged = [image.file for image in captioned if not image.picture.natural]
        yield f"images without a natural-language caption ({sentences}), trained with their tags alone", tagged
        untagged = [image.file for image in captioned if not any(image.picture.tags)]
        yield f"images without tags, trained with their natural-language caption ({sentences}) alone", untagged
    if options.caption_mode == "tags":
        stems = by_stem(files.images)
        unused = [names[0] for stem, names in files.natural_files.items() if stem in stems]
        yield 'natural-language captions (_nl.txt), not used, because caption_mode is "tags"', unused


def odd_texts(images: Sequence[ScannedImage], options: DirectoryOptions) -> Findings:
    """Yield the images whose captions hold text that is probably not meant as it is read."""
    before = options.prefix_word + options.caption_prefix
    texts = {image.file: (*image.picture.tags, *image.picture.natural) for image in images}
    special = [file for file, own in texts.items() if any(map(SPECIAL_TOKEN.search, (before, *own)))]
    yield "images with a caption that holds text that the tokenizer reads as a special token, as </s> is", special
    delimiter = options.cache_shuffle_delimiter
    if options.varies_tags and not any(delimiter in text for image in images for text in image.picture.tags):
        tagged = [image.file for image in images if any(image.picture.tags)]
        yield f"captions, none of which holds cache_shuffle_delimiter {delimiter!r}, so that each is one tag", tagged
    elif delimiter == ", ":
        bare = [image.file for image in images if any(map(holds_bare_comma, image.picture.tags))]
        yield (
            'captions with a comma that has no blank behind it, or is of full width: "a,b" is one tag, and the model '
            'knows "a, b"',
            bare,
        )
    if not options.keep_tokens_separator:
        parted = [image.file for image in images if any(SEPARATOR in text for text in image.picture.tags)]
        yield (
            f'captions with {SEPARATOR}, trained as text; keep_tokens_separator = "{SEPARATOR}" gives it its meaning',
            parted,
        )
    if not options.unescape_parentheses:
        escaped = [file for file, own in texts.items() if any(unescaped(text) != text for text in own)]
        yield r"captions with \( or \), which belong in prompts; unescape_parentheses writes ( and )", escaped


def holds_bare_comma(caption: str) -> bool:
    """Return True if a run of tags has a comma with no blank behind it."""
    if BARE_COMMA.search(caption) is None:
        return False
    return any(BARE_COMMA.search(part.text) for part in caption_parts(caption, ", ") if not part.is_prose)


def unused_captions(files: Files, options: DirectoryOptions) -> Findings:
    """Yield the captions without an image, and those that another one replaces."""
    images = set(files.images)
    stems = by_stem(files.images)
    caption_files = [*files.caption_files.items(), *files.natural_files.items()]
    known = stems.keys() | set(map(stem_of, files.unread_images))
    yield "captions without an image", [names[0] for stem, names in caption_files if stem not in known]
    yield "entries of captions.json without an image", [name for name in files.listed_captions if name not in images]
    if options.caption_mode != "nl":
        listed = [stem_of(name) for name in files.listed_captions if name in images]
        replaced = [files.caption_files[stem][0] for stem in listed if stem in files.caption_files]
        yield "captions in .txt files not used, because captions.json has them", replaced
    sharing = [name for names in stems.values() for name in names if len(names) > 1]
    yield "images that share caption and mask, because their names differ in the ending only", sharing
    others = [name for _, names in caption_files for name in names[1:]]
    yield "captions not used, because another differs in the ending only", others


def mask_findings(files: Files, images: Sequence[ScannedImage]) -> Findings:
    """Yield the masks that are not used, and the images without one."""
    unused = [name for names in files.mask_files.values() for name in names[1:]]
    yield "masks not used, because another differs in the ending only", unused
    beside = sorted(names[0] for names in files.masks_beside.values())
    others = [name for names in files.masks_beside.values() for name in names[1:]]
    yield "masks beside their images (-masklabel, _mask), not used, because the image has another", others
    yield (
        "images named as masks of others (-masklabel, _mask), trained as images, because they have captions",
        files.captioned_masks,
    )
    if files.mask_folder is None:
        yield "masks beside their images (-masklabel, _mask), used", beside
    else:
        yield "masks beside their images (-masklabel, _mask), not used, because of mask_path", beside
    unmasked = [image.file for image in images if files.mask_folder is not None and image.picture.mask is None]
    yield "images without a mask, trained whole", unmasked
    hidden = [image.file for image in images if image.mask_coverage == 0]
    yield "images whose mask is all black: nothing of them is trained (white is trained)", hidden
    little = [image.file for image in images if 0 < image.mask_coverage < LITTLE]
    yield f"images whose mask leaves less than {LITTLE:.0%} of them to train", little


def header_findings(images: Sequence[ScannedImage]) -> Findings:
    """Yield the warnings of the images' headers, each with all of its images."""
    findings: dict[str, list[str]] = defaultdict(list)
    for image in images:
        for warning in image.warnings:
            findings[warning].append(image.file)
    yield from findings.items()
