"""The scan that turns a dataset into samples, and says what it leaves out."""

import concurrent.futures
import functools
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from anima_train.core.errors import DataError, SpaceError
from anima_train.core.format import count, listed, printable
from anima_train.core.random import shuffled
from anima_train.data.buckets import SIDE_MULTIPLE, kept_fraction
from anima_train.data.cache import Cache
from anima_train.data.captions import BadCaption, read_caption, unescaped
from anima_train.data.image_headers import EXTENSIONS, BadImage
from anima_train.data.image_index import ImageIndex
from anima_train.data.samples import Picture, Sample, exact
from anima_train.data.settings import DatasetSettings, Directory, DirectoryOptions
from anima_train.data.sources.folder import Files, by_stem, stem_of
from anima_train.data.sources.hf_dataset import table_files

CAPTION_FILES = {"tags": ".txt", "nl": "_nl.txt", "mixed": ".txt or _nl.txt"}  # by caption_mode
CAPTION_COLUMNS = {"tags": "caption_column", "nl": "natural_column", "mixed": "caption_column or natural_column"}

# Text that a tokenizer of the model reads as one of its special tokens, not as letters.
SPECIAL_TOKEN = re.compile(r"</s>|<pad>|<unk>|<extra_id_\d+>|<\|\w+\|>")


@dataclass(frozen=True)
class Scan:
    """What the folders hold."""

    samples: list[Sample]
    num_images: int  # seen, those set aside included
    bad: list[str] = field(default_factory=list)  # damaged or unreadable: "path: reason"
    skipped: list[str] = field(default_factory=list)  # set aside by a setting: "path: reason"
    warnings: list[str] = field(default_factory=list)

    def check(self, max_bad_fraction: float) -> None:
        """Stop where nothing is left, or more than the allowed share is bad.

        Raises:
            DataError: with every file set aside, up to `MAX_LISTED`.
        """
        if not self.samples:
            raise DataError(["no image is left to train on", *listed(self.bad + self.skipped + self.warnings)])
        if len(self.bad) > max_bad_fraction * self.num_images:
            share = len(self.bad) / self.num_images
            raise DataError(
                [
                    f"{count(len(self.bad), 'image')} of {self.num_images:,} cannot be used ({share:.1%}, more than "
                    f"max_bad_fraction = {max_bad_fraction:g}); repair or remove them, or raise max_bad_fraction:",
                    *listed(self.bad),
                ]
            )


def scan(
    dataset: DatasetSettings,
    folders: Sequence[Path],
    masks: Sequence[Path | None],
    caches: Sequence[Cache],
    seed: int,
    write: bool,
    offline: bool = False,
) -> Scan:
    """Look at every image of the dataset.

    Args:
        dataset: the settings.
        folders: the resolved path of each directory; for a dataset of the Hub, its name.
        masks: the resolved mask folder of each directory.
        caches: the cache of each directory.
        seed: for `subsample_ratio`.
        write: whether this process may write the memory of file facts.
        offline: whether nothing may be looked up on the Hub.

    Raises:
        DataError: a folder cannot be read, or captions are missing where that is not allowed; for all folders at once.
    """
    total = Scan([], 0)
    num_images = 0
    problems: list[str] = []
    for index, (folder, mask_folder, cache) in enumerate(zip(folders, masks, caches, strict=True)):
        options = dataset.options(index)
        if dataset.directory[index].hf_dataset is not None:
            options = options.model_copy(update={"kohya_folders": False})  # the folders of its files are no part of it
        try:
            files = files_of(dataset.directory[index], folder, mask_folder, options, cache, offline)
            found = scan_files(index, files, options, cache, seed, write)
        except DataError as error:
            problems.extend(error.problems)
            continue
        total.samples.extend(found.samples)
        total.bad.extend(found.bad)
        total.skipped.extend(found.skipped)
        total.warnings.extend(found.warnings)
        num_images += found.num_images
    if problems:
        raise DataError(problems)
    total.warnings.extend(duplicates(sample.picture for sample in total.samples))
    weights = [dataset.options(index).weight for index in range(len(folders))]
    return Scan(weighted(total.samples, weights), num_images, total.bad, total.skipped, total.warnings)


def weighted(samples: list[Sample], weights: Sequence[float | None]) -> list[Sample]:
    """The samples, repeated so that each directory has its share of all that is shown; `weights` by directory.

    All together are shown as often as without weights.
    """
    shown: dict[int, Fraction] = defaultdict(Fraction)
    for sample in samples:
        shown[sample.directory] += sample.repeats
    shares = {index: exact(weight) for index, weight in enumerate(weights) if weight is not None and shown[index]}
    if len(shares) < 2:
        return samples
    total, all_shares = sum(shown.values()), sum(shares.values())
    factors = {index: total * share / all_shares / shown[index] for index, share in shares.items()}
    return [replace(sample, repeat_factor=factors[sample.directory]) for sample in samples]


def duplicates(pictures: Iterable[Picture]) -> Iterator[str]:
    """A warning if different files hold the same image."""
    first: dict[str, Path] = {}
    repeated = {}
    for picture in pictures:
        original = first.setdefault(picture.sha256, picture.path)
        if original != picture.path:
            repeated[picture.path] = original
    for path, original in list(repeated.items())[:1]:
        noun = count(len(repeated), "image is", "images are")
        yield f"{noun} in the dataset more than once, such as {path}, which equals {original}"


def files_of(
    directory: Directory, folder: Path, mask_folder: Path | None, options: DirectoryOptions, cache: Cache, offline: bool
) -> Files:
    """The files of a directory, whatever it is.

    Raises:
        DataError: it cannot be read.
    """
    if directory.hf_dataset is not None:
        return table_files(directory, folder, offline)
    return Files.of(folder, mask_folder, options, cache)


def scan_files(index: int, files: Files, options: DirectoryOptions, cache: Cache, seed: int, write: bool) -> Scan:
    """Look at every image of one directory.

    Raises:
        DataError: captions are missing where that is not allowed.
    """
    memo = ImageIndex(cache, "images", files.identity)
    mask_memo = ImageIndex(cache, "masks", files.mask_identity)
    looks, bad = scan_images(files, options, memo, mask_memo)
    warnings = []
    try:
        if write:
            memo.save()
            mask_memo.save()
    except SpaceError as error:  # everything else may be in the cache already: then nothing needs to be written
        warnings.append(f"the next start will have to read the images again: {error}")

    uncaptioned = [look for look in looks if look.is_uncaptioned]
    if uncaptioned and options.missing_caption == "error":
        noun = count(len(uncaptioned), "image has", "images have")
        title = f'{files.folder}: {noun} no {caption_kind(files, options)} caption, and missing_caption is "error":'
        raise DataError([title, *listed([str(look.picture.path) for look in uncaptioned])])
    skipped = []
    usable = []
    for look in looks:
        if look.picture.has_caption or not options.skip_empty_caption:
            usable.append(look)
        else:
            fault = "missing" if look.is_uncaptioned else "empty"
            skipped.append(f"{look.picture.path}: its caption is {fault}")
    kept = shuffled(usable, lambda look: look.file, seed, "subsample", index)
    kept = kept[: max(1, round(len(kept) * options.subsample_ratio))]
    options_of = functools.cache(options.of_folder)  # one object for each folder
    samples = []
    for look in sorted(kept, key=lambda look: os.fsencode(look.file)):
        top, slash, _ = look.file.partition("/")
        try:
            samples.extend(place(look.file, look.picture, index, options_of(top if slash else ""), cache))
        except SkippedImage as reason:
            skipped.append(f"{look.picture.path}: {reason}")
    warnings.extend(folder_warnings(files, looks, options))
    return Scan(samples, len(files.images), bad, skipped, warnings)


class Look(NamedTuple):
    """An image that can be used, and what was found on the way."""

    file: str  # its path in the directory
    picture: Picture
    is_uncaptioned: bool  # none of the kind that caption_mode asks for, not even an empty one
    warnings: Sequence[str]  # of `probe`, from the header


def scan_images(
    files: Files, options: DirectoryOptions, memo: ImageIndex, mask_memo: ImageIndex
) -> tuple[list[Look], list[str]]:
    """The images that can be used, and "path: reason" for the others."""

    def texts(file: str) -> tuple[str, ...]:
        try:
            text = read_caption(files.file(file))
        except BadCaption as error:
            raise BadCaption(f"its caption {file}: {error}") from error
        lines = text.split("\n") if options.captions_per_line else [text]
        return tuple(line for line in map(str.strip, lines) if line) or ("",)

    def look(name: str) -> Look:
        facts = memo.facts(name, files.file(name))
        stem = stem_of(name)
        tags: tuple[str, ...] = ()
        natural: tuple[str, ...] = ()
        if options.caption_mode != "nl":
            tags = files.given.get(name, ()) or (texts(files.captions[stem][0]) if stem in files.captions else ())
        if options.caption_mode != "tags":
            in_file = texts(files.natural[stem][0]) if stem in files.natural else ()
            natural = files.given_natural.get(name, in_file)
        mask, stored_mask, mask_sha256 = None, None, ""
        if files.mask_folder is not None and stem in files.masks:
            file = files.masks[stem][0]
            mask, stored_mask = files.mask_folder / file, files.stored_masks.get(file)
            try:
                mask_sha256 = mask_memo.facts(file, files.mask(file)).sha256
            except BadImage as error:
                raise BadImage(f"its mask {file}: {error}") from error
        caption, *more = tags or ("",)
        picture = Picture(
            path=files.folder / name,
            sha256=facts.sha256,
            width=facts.width,
            height=facts.height,
            caption=caption,
            mask=mask,
            mask_sha256=mask_sha256,
            more_captions=tuple(more),
            natural=tuple(filter(None, natural)),
            has_alpha=facts.has_alpha,
            stored=files.stored.get(name),
            stored_mask=stored_mask,
        )
        return Look(name, picture, not tags and not natural, facts.warnings)

    looks = []
    bad = []
    pool = concurrent.futures.ThreadPoolExecutor()
    try:
        for name, future in [(name, pool.submit(look, name)) for name in files.images]:
            try:
                looks.append(future.result())
            except (BadImage, BadCaption) as error:
                bad.append(f"{files.folder / name}: {error}")
    finally:
        pool.shutdown(cancel_futures=True)  # so that Ctrl-C does not wait for all that is left
    return looks, bad


def caption_kind(files: Files, options: DirectoryOptions) -> str:
    """Where a directory's captions come from, as messages say it."""
    return (CAPTION_COLUMNS if files.is_table else CAPTION_FILES)[options.caption_mode]


def folder_warnings(files: Files, looks: Sequence[Look], options: DirectoryOptions) -> Iterator[str]:
    """What the user should know of a folder, one line for each kind."""
    images = set(files.images)
    stems = by_stem(files.images)
    bare = "caption_prefix alone" if options.caption_prefix else "the empty one"
    kind = caption_kind(files, options)
    sentences = "natural_column" if files.is_table else "_nl.txt"
    # An image without any caption is counted as that, not as one without natural language.
    mixed = [look for look in looks if options.caption_mode == "mixed" and look.picture.has_caption]
    is_tagged = options.caption_mode != "nl"  # whether captions.json and {stem}.txt are used
    before = options.prefix_word + options.caption_prefix
    joined = [] if not options.varies_tags else [look.file for look in looks if any(look.picture.tags)]
    if any(options.cache_shuffle_delimiter in text for look in looks for text in look.picture.tags):
        joined = []
    escaped = r"captions with \( or \), which belong in prompts; unescape_parentheses writes ( and )"
    findings: dict[str, list[str]] = {
        "subfolders, which are not searched": files.subfolders,
        "subfolders that are searched under another name, not searched again": files.again,
        "files that are neither images nor captions, not used": files.others,
        f"images without a {kind} caption, trained with {bare}": [
            look.file for look in looks if look.is_uncaptioned and not options.skip_empty_caption
        ],
        f"images with an empty caption, trained with {bare}": [
            look.file
            for look in looks
            if not (look.is_uncaptioned or look.picture.has_caption or options.skip_empty_caption)
        ],
        f"images without a natural-language caption ({sentences}), trained with their tags alone": [
            look.file for look in mixed if not look.picture.natural
        ],
        f"images without tags, trained with their natural-language caption ({sentences}) alone": [
            look.file for look in mixed if not any(look.picture.tags)
        ],
        'natural-language captions (_nl.txt), not used, because caption_mode is "tags"': [
            names[0] for stem, names in files.natural.items() if stem in stems and options.caption_mode == "tags"
        ],
        "images with a caption that holds text that the tokenizer reads as a special token, as </s> is": [
            look.file
            for look in looks
            if any(SPECIAL_TOKEN.search(text) for text in (before, *look.picture.tags, *look.picture.natural))
        ],
        f"captions, none of which holds cache_shuffle_delimiter {options.cache_shuffle_delimiter!r}, "
        "so that each is one tag": joined,
        escaped: [
            look.file
            for look in looks
            if not options.unescape_parentheses
            and any(unescaped(text) != text for text in (*look.picture.tags, *look.picture.natural))
        ],
        "captions without an image": [
            names[0]
            for captions in (files.captions, files.natural)
            for stem, names in captions.items()
            if stem not in stems
        ],
        "entries of captions.json without an image": [name for name in files.given if name not in images],
        "captions in .txt files not used, because captions.json has them": [
            files.captions[stem_of(name)][0]
            for name in files.given
            if is_tagged and name in images and stem_of(name) in files.captions
        ],
        "images that share caption and mask, because their names differ in the ending only": [
            name for names in stems.values() for name in names if len(names) > 1
        ],
        "captions not used, because another differs in the ending only": [
            name for captions in (files.captions, files.natural) for names in captions.values() for name in names[1:]
        ],
        "masks not used, because another differs in the ending only": [
            name for names in files.masks.values() for name in names[1:]
        ],
        "images without a mask, trained whole": [
            look.file for look in looks if files.mask_folder is not None and look.picture.mask is None
        ],
    }
    for look in looks:
        for warning in look.warnings:
            findings.setdefault(warning, []).append(look.file)
    endings = ", ".join(sorted(EXTENSIONS))
    if not files.images:
        yield f"{files.folder}: holds no {'row' if files.is_table else f'image ({endings})'}"
    for text, names in findings.items():
        if names:
            yield f"{files.folder}: {text}: {len(names):,}, such as {names[0]}"


class SkippedImage(Exception):
    """A good image that the dataset's options leave out; the message is the reason."""


def place(file: str, picture: Picture, index: int, options: DirectoryOptions, cache: Cache) -> list[Sample]:
    """The picture at every resolution.

    Args:
        file: its path in the directory.
        picture: with its facts.
        index: of the directory.
        options: of its folder.
        cache: of the directory.

    Raises:
        SkippedImage: too small, or too far from every bucket's aspect ratio.
    """
    if min(picture.width, picture.height) < options.min_image_side:
        raise SkippedImage(
            f"{picture.width}x{picture.height} is smaller than min_image_side = {options.min_image_side}"
        )
    if options.no_upscale and min(picture.width, picture.height) < SIDE_MULTIPLE:
        raise SkippedImage(f"{picture.width}x{picture.height} has a side below {SIDE_MULTIPLE} pixels (no_upscale)")
    samples = []
    for resolution, size in options.sizes(picture.width, picture.height):
        kept = kept_fraction(picture.width, picture.height, size)
        if kept < options.min_kept:
            raise SkippedImage(
                f"{picture.width}x{picture.height} is too far from every bucket: cropping to {size} would keep "
                f"{kept:.0%} of it (min_kept = {options.min_kept:g})"
            )
        name = f"{index}/{printable(file)}@{size if options.no_upscale else resolution}"
        samples.append(Sample(name, picture, size, resolution, index, options, cache))
    return samples
