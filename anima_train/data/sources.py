"""The dataset's settings, and the scan that turns folders of images and captions into samples."""

import concurrent.futures
import functools
import hashlib
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, TypeAdapter

from anima_train.core.errors import DataError, SpaceError, count
from anima_train.core.files import sha256_file
from anima_train.core.random import shuffled, uniform
from anima_train.core.settings import Settings
from anima_train.data.buckets import Size, aspect_ratios, kept_fraction, nearest, size_of
from anima_train.data.cache import Cache, entry_key
from anima_train.data.captions import (
    BadCaption,
    read_caption,
    read_captions_json,
    shuffled_tags,
    without_underscores,
)
from anima_train.data.images import EXTENSIONS, BadImage, probe

MAX_LISTED = 20  # files named in one message
CACHE_FOLDER = ".anima_cache"
MEMO_VERSION = 1  # raise when the meaning of `FileFacts` changes
CAPTIONS_JSON = "captions.json"
NATURAL = "_nl"  # ends the stem of a natural-language caption
CAPTION_FILES = {"tags": ".txt", "nl": "_nl.txt", "mixed": ".txt or _nl.txt"}  # by caption_mode
KOHYA_FOLDER = re.compile(r"([1-9][0-9]{0,3})_[^/]*")  # at most four digits: longer ones are dates, not repeats

# Text that a tokenizer of the model reads as one of its special tokens, not as letters.
SPECIAL_TOKEN = re.compile(r"</s>|<pad>|<unk>|<extra_id_\d+>|<\|\w+\|>")


class DirectorySettings(Settings):
    """Keys of the dataset, each of which a [[directory]] may set for itself."""

    resolutions: list[int | list[int]] | None = Field(default=None, min_length=1)
    """Side, in pixels, of the square whose area the images are scaled to, or [width, height] with that area. Each image
    goes to every resolution. Default [1024]."""
    enable_ar_bucket: bool | None = None
    """Keep the images' aspect ratios, each to the nearest of several buckets; false crops all to squares.
    Default true."""
    min_ar: float | None = Field(default=None, gt=0)
    """Smallest bucket aspect ratio, width / height. Default 0.5."""
    max_ar: float | None = Field(default=None, gt=0)
    """Largest bucket aspect ratio. Default 2.0."""
    num_ar_buckets: int | None = Field(default=None, ge=1)
    """Number of aspect ratios, evenly spaced in the logarithm from min_ar to max_ar. Default 9."""
    ar_buckets: list[float | list[int]] | None = Field(default=None, min_length=1)
    """The aspect ratios themselves, as width / height or [width, height]; replaces min_ar, max_ar and
    num_ar_buckets."""
    size_buckets: list[list[int]] | None = Field(default=None, min_length=1)
    """The sizes themselves, [width, height] in pixels (a third number, frames, must be 1); replaces resolutions and
    all aspect-ratio keys. Each image goes to the one whose aspect ratio is nearest; of equals, to the first."""
    num_repeats: float | None = Field(default=None, ge=0.001)
    """How often each image is seen per epoch. A fraction takes turns: 0.5 shows half of the images in each epoch,
    all of them in two. Default 1."""
    subsample_ratio: float | None = Field(default=None, gt=0, le=1)
    """Use only this share of the images, the same ones in every epoch. Default 1."""
    recursive: bool | None = None
    """Search sub-folders too, those of mask_path as well; captions and masks are found by the same path below path and
    mask_path. Hidden folders and the cache are left out. Default false."""
    kohya_folders: bool | None = None
    """Search the sub-folders of path that are named as 10_name (1 to 9999) too, and show their images num_repeats * 10
    times. The name behind the number is not used. Default false."""
    cache_shuffle_num: int | None = Field(default=None, ge=0)
    """Number of shuffled variants of each caption's tags; epochs take turns through them. 0 leaves captions as they
    are. Natural-language captions are not shuffled. Default 0."""
    cache_shuffle_delimiter: str | None = Field(default=None, min_length=1)
    """What separates tags, for cache_shuffle_num, trigger_word and replace_underscores. Default ", "."""
    caption_prefix: str | None = None
    """Put in front of every caption, missing and empty ones too, as it stands. Default ""."""
    trigger_word: str | None = None
    """Put first of all, before caption_prefix, with cache_shuffle_delimiter behind it; not where the caption is missing
    or empty, and not a second time where the caption begins with it already. Never shuffled. Default "" (none)."""
    replace_underscores: bool | None = None
    """Write spaces for the underscores in tags, except in those that look like emoticons, as ^_^, o_o and (o)_(o) do,
    and in score_7 and the like. Natural-language captions, caption_prefix and trigger_word stay as they are.
    Default false."""
    captions_per_line: bool | None = None
    """Each line of a .txt file that is not empty is a caption of its own; the showings of an image take turns through
    its captions. Default false: the whole file is one caption. A captions.json can give lists of captions anyway."""
    caption_mode: Literal["tags", "nl", "mixed"] | None = None
    """Which captions are used: "tags" those in {stem}.txt or captions.json, "nl" those in natural language in
    {stem}_nl.txt, "mixed" both, by nl_weight; an image that has only one of the two is trained with that one.
    Default "tags"."""
    nl_weight: float | None = Field(default=None, ge=0, le=1)
    """With caption_mode = "mixed", the share of each image's showings that use its natural-language caption, evenly
    spread. Default 0.5."""
    skip_empty_caption: bool | None = None
    """Set aside images whose caption is empty or missing. Default false."""
    missing_caption: Literal["empty", "error"] | None = None
    """What to do with an image without a caption (of the kind that caption_mode asks for): "empty" trains it with the
    empty one (after caption_prefix) and counts it; "error" stops. Default "empty"."""
    min_image_side: int | None = Field(default=None, ge=1)
    """Images whose shorter side has fewer pixels are set aside. Default 64."""
    min_kept: float | None = Field(default=None, ge=0, le=1)
    """Images of whose area the crop would keep less than this share are set aside. Default 0.25."""


class Directory(DirectorySettings):
    """A folder of images with a .txt caption beside each, or with a captions.json, {"file name": "caption" or
    ["several", "captions"]}, in the folder of the images, which counts before the .txt files."""

    path: str
    """The folder. Relative to the current folder or, where that does not exist, to this file."""
    mask_path: str | None = None
    """A folder of masks, one per image with the same name (any extension): white is trained, black is not, grey in
    between."""


class DatasetSettings(DirectorySettings):
    """A dataset: its folders, and what holds for all of them."""

    directory: list[Directory] = Field(min_length=1)
    """The folders."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """Stop when more than this share of the images has to be set aside because it is damaged or unreadable."""

    def model_post_init(self, context: Any) -> None:
        problems = [
            f"directory[{index}]: {problem}"
            for index in range(len(self.directory))
            for problem in self.rules(index).problems()
        ]
        if problems:
            raise ValueError("\n".join(problems))

    def rules(self, index: int) -> "Rules":
        """What holds for one directory: its own keys, else the dataset's, else the defaults."""
        chosen = {}
        for name in DirectorySettings.model_fields:
            value = getattr(self.directory[index], name)
            value = getattr(self, name) if value is None else value
            if value is not None:
                chosen[name] = value
        return Rules(**chosen)

    def level(self, index: int, name: str) -> int:
        """How near to a directory one of its keys is set: 2 in its own table, 1 in the dataset's, 0 nowhere."""
        if getattr(self.directory[index], name) is not None:
            return 2
        return 1 if getattr(self, name) is not None else 0

    def without_effect(self, index: int) -> Iterator[str]:
        """A sentence for each key of a directory that another one, set as near or nearer, makes useless.

        Not for the dataset's keys where the directory itself sets the other one: they may be meant for its siblings.
        """
        rules = self.rules(index)
        for cause, holds, replaced in REPLACED:
            if not holds(rules):
                continue
            for name in replaced:
                is_set = getattr(rules, name) != getattr(Rules, name) and self.level(index, name) > 0
                if is_set and self.level(index, name) >= self.level(index, cause):
                    yield f"directory[{index}]: {name} has no effect, because of {cause}"
        seen: dict[float, Sequence[int]] = {}
        for size in rules.size_buckets or []:
            if (first := seen.setdefault(size[0] / size[1], size)) is not size:
                yield f"directory[{index}]: size_buckets: {size} is never used: {first} has its aspect ratio"


@dataclass(frozen=True)
class Rules:
    """A directory's keys with the defaults filled in; see `DirectorySettings` for their meaning."""

    resolutions: Sequence[int | Sequence[int]] = (1024,)
    enable_ar_bucket: bool = True
    min_ar: float = 0.5
    max_ar: float = 2.0
    num_ar_buckets: int = 9
    ar_buckets: Sequence[float | Sequence[int]] | None = None
    size_buckets: Sequence[Sequence[int]] | None = None
    num_repeats: float = 1.0
    subsample_ratio: float = 1.0
    recursive: bool = False
    kohya_folders: bool = False
    cache_shuffle_num: int = 0
    cache_shuffle_delimiter: str = ", "
    caption_prefix: str = ""
    trigger_word: str = ""
    replace_underscores: bool = False
    captions_per_line: bool = False
    caption_mode: str = "tags"
    nl_weight: float = 0.5
    skip_empty_caption: bool = False
    missing_caption: str = "empty"
    min_image_side: int = 64
    min_kept: float = 0.25

    def problems(self) -> Iterator[str]:
        """What is wrong beyond single values."""
        if self.min_ar > self.max_ar:
            yield f"min_ar {self.min_ar} is larger than max_ar {self.max_ar}"
        sides = []
        for resolution in self.resolutions:
            if isinstance(resolution, Sequence) and (len(resolution) != 2 or min(resolution) < 1):
                yield f"resolutions: found {resolution}, expected a number of pixels or [width, height]"
                continue
            sides.append(side(resolution))
            if not 64 <= sides[-1] <= 4096:
                yield f"resolutions: found {resolution}, expected 64 to 4096 pixels"
        if len(set(sides)) < len(sides):
            yield f"resolutions: found {self.resolutions}, in which one is given twice"
        for size in self.size_buckets or []:
            if len(size) not in (2, 3) or size[2:] not in ([], [1]) or any(s < 16 or s % 16 for s in size[:2]):
                yield f"size_buckets: found {size}, expected [width, height] in multiples of 16"
        for ratio in self.ar_buckets or []:
            bad = (len(ratio) != 2 or min(ratio) < 1) if isinstance(ratio, Sequence) else ratio <= 0
            if bad:
                yield f"ar_buckets: found {ratio}, expected a positive ratio or [width, height]"

    @functools.cached_property
    def buckets(self) -> list[tuple[int, list[Size]]]:
        """(resolution, sizes) for each resolution."""
        if not self.enable_ar_bucket:
            ratios = [1.0]
        elif self.ar_buckets is not None:
            ratios = [r[0] / r[1] if isinstance(r, Sequence) else r for r in self.ar_buckets]
        else:
            ratios = aspect_ratios(self.min_ar, self.max_ar, self.num_ar_buckets)
        return [
            (resolution, sorted({size_of(resolution, ratio) for ratio in ratios}))
            for resolution in map(side, self.resolutions)
        ]

    def sizes(self, aspect: float) -> list[tuple[int, Size]]:
        """(resolution, size) of each sample that a picture of this aspect ratio becomes."""
        if self.size_buckets is not None:
            size = nearest(aspect, [Size(size[0], size[1]) for size in self.size_buckets])
            return [(size.resolution, size)]
        return [(resolution, nearest(aspect, sizes)) for resolution, sizes in self.buckets]

    def searches(self, folder: str) -> bool:
        """Whether a sub-folder, named by its path below `path`, is searched."""
        return self.recursive or (self.kohya_folders and KOHYA_FOLDER.fullmatch(folder) is not None)

    def of_folder(self, folder: str) -> "Rules":
        """What holds for the images of the sub-folder of this name directly below `path`; "" is `path` itself."""
        match = KOHYA_FOLDER.fullmatch(folder) if self.kohya_folders else None
        if match is None:
            return self
        # As a fraction, because 3 * 0.1 is no tenth of anything, and a plan of exact turns would never repeat.
        return replace(self, num_repeats=float(Fraction(str(self.num_repeats)) * int(match[1])))


ASPECT_KEYS = ("min_ar", "max_ar", "num_ar_buckets")
REPLACED: Sequence[tuple[str, Callable[[Rules], bool], Sequence[str]]] = (
    # key, when it replaces others, the others
    (
        "size_buckets",
        lambda rules: rules.size_buckets is not None,
        ("resolutions", "enable_ar_bucket", "ar_buckets", *ASPECT_KEYS),
    ),
    ("enable_ar_bucket", lambda rules: not rules.enable_ar_bucket, ("ar_buckets", *ASPECT_KEYS)),
    ("ar_buckets", lambda rules: rules.ar_buckets is not None, ASPECT_KEYS),
    (
        "caption_mode",
        lambda rules: rules.caption_mode == "nl",
        ("cache_shuffle_num", "replace_underscores", "nl_weight"),
    ),
    ("caption_mode", lambda rules: rules.caption_mode == "tags", ("nl_weight",)),
    (
        "cache_shuffle_num",
        lambda rules: rules.cache_shuffle_num == 0 and not rules.trigger_word and not rules.replace_underscores,
        ("cache_shuffle_delimiter",),
    ),
)


def side(resolution: int | Sequence[int]) -> int:
    """The side, in pixels, of the square with the area of [width, height]; a number is that side already."""
    return resolution if isinstance(resolution, int) else Size(resolution[0], resolution[1]).resolution


@dataclass(frozen=True, slots=True)
class Picture:
    """One image file with its captions, as they are in the files, and its mask."""

    path: Path
    sha256: str
    width: int  # pixels, after EXIF orientation
    height: int
    caption: str  # tags; "" where only natural language is used, or nothing
    mask: Path | None
    mask_sha256: str
    more_captions: tuple[str, ...] = ()  # tags too; with `caption` they take turns
    natural: tuple[str, ...] = ()  # in natural language, none empty; none where caption_mode does not use them

    @property
    def tags(self) -> tuple[str, ...]:
        """All captions that are not in natural language."""
        return (self.caption, *self.more_captions)

    @property
    def has_caption(self) -> bool:
        """Whether any caption holds text."""
        return any(self.tags) or bool(self.natural)


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture at one size: what a batch is made of."""

    id: str  # unique in the dataset, without any absolute path
    picture: Picture
    size: Size
    resolution: int
    directory: int
    rules: Rules
    cache: Cache

    # Captions. A picture has T captions of tags, each in S = max(1, cache_shuffle_num) orders, and N in natural
    # language. Its showings 0, 1, 2 ... are its variants. Of those before showing k, floor(k * share + phase) use
    # natural language, with a phase in [0, 1) of its own for each picture; so each picture keeps the share from its
    # first showings on, and all of them together in each epoch. The n-th of these showings uses caption n mod N. The
    # m-th of the others uses caption m mod T, in order (m div T) mod S. So there are at most T * S + N texts, however
    # often the picture is shown.

    @property
    def name(self) -> str:
        """Of the picture, in addresses: every resolution shares the same texts in the cache."""
        return self.id.rpartition("@")[0]

    @property
    def natural_share(self) -> float:
        """Share of the showings that use natural language."""
        if not self.picture.natural:
            return 0.0
        only = self.rules.caption_mode == "nl" or not any(self.picture.tags)
        return 1.0 if only else self.rules.nl_weight

    def caption(self, seed: int, variant: int) -> str:
        """The caption of a variant: what showing number `variant` of the sample, 0 the first, is trained with."""
        natural, share = self.picture.natural, self.natural_share
        if share > 0:
            phase = uniform(seed, "natural", self.name)
            before = math.floor(variant * share + phase)
            if math.floor((variant + 1) * share + phase) > before:
                return self.dressed(natural[before % len(natural)])
            variant -= before
        tags = self.picture.tags
        return self.tags_caption(seed, tags[variant % len(tags)], variant // len(tags))

    def captions(self, seed: int) -> list[str]:
        """Every caption this sample can be trained with."""
        texts = []
        if self.natural_share < 1:
            orders = range(max(1, self.rules.cache_shuffle_num))
            texts = [self.tags_caption(seed, tags, order) for order in orders for tags in self.picture.tags]
        if self.natural_share > 0:
            texts += map(self.dressed, self.picture.natural)
        return texts

    def tags_caption(self, seed: int, tags: str, order: int) -> str:
        """Tags as they are trained, in one of their orders; these repeat after `cache_shuffle_num`."""

        def arranged(text: str) -> str:
            if self.rules.replace_underscores:
                text = without_underscores(text, delimiter)
            return shuffled_tags(text, delimiter, seed, self.name, order % number) if number and text else text

        number, delimiter = self.rules.cache_shuffle_num, self.rules.cache_shuffle_delimiter
        return self.dressed(tags, arranged)

    def dressed(self, text: str, arranged: Callable[[str], str] = str) -> str:
        """A caption with what stands before it; `arranged` changes all of it but a trigger word it begins with."""
        prefix, word, delimiter = self.rules.caption_prefix, self.rules.trigger_word, self.rules.cache_shuffle_delimiter
        if not word or not text:
            return prefix + arranged(text)
        rest = "" if text == word else arranged(text.removeprefix(word + delimiter))
        return delimiter.join(filter(None, [word, prefix + rest]))

    def latent_key(self, vae_identity: str) -> str:
        """Key of its latent in the cache."""
        return entry_key(
            "latent", image=self.picture.sha256, width=self.size.width, height=self.size.height, vae=vae_identity
        )

    def mask_key(self) -> str:
        """Key of its mask in the cache."""
        picture = self.picture
        return entry_key(
            "mask",
            mask=picture.mask_sha256,
            image_width=picture.width,
            image_height=picture.height,
            width=self.size.width,
            height=self.size.height,
        )


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


def listed(lines: Sequence[str]) -> list[str]:
    """The first lines, fit to be printed, and how many more there are."""
    more = len(lines) - MAX_LISTED
    return [printable(line) for line in lines[:MAX_LISTED]] + ([f"... and {more:,} more"] if more > 0 else [])


def printable(text: str) -> str:
    """The text with escapes for what a terminal would obey or cannot show; names of files may hold both."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


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


def scan(
    dataset: DatasetSettings,
    folders: Sequence[Path],
    masks: Sequence[Path | None],
    caches: Sequence[Cache],
    seed: int,
    write: bool,
) -> Scan:
    """Look at every image of the dataset.

    Args:
        dataset: the settings.
        folders: the resolved path of each directory.
        masks: the resolved mask folder of each directory.
        caches: the cache of each directory.
        seed: for `subsample_ratio`.
        write: whether this process may write the memory of file facts.

    Raises:
        DataError: a folder cannot be read, or captions are missing where that is not allowed; for all folders at once.
    """
    total = Scan([], 0)
    num_images = 0
    problems: list[str] = []
    for index, (folder, mask_folder, cache) in enumerate(zip(folders, masks, caches, strict=True)):
        try:
            found = scan_folder(index, folder, mask_folder, dataset.rules(index), cache, seed, write)
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
    return Scan(total.samples, num_images, total.bad, total.skipped, total.warnings)


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


def scan_folder(
    index: int, folder: Path, mask_folder: Path | None, rules: Rules, cache: Cache, seed: int, write: bool
) -> Scan:
    """Look at every image of one directory.

    Raises:
        DataError: the folder cannot be read, or captions are missing where that is not allowed.
    """
    files = Files.of(folder, mask_folder, rules, cache)
    memo = FactsMemo(cache, "images", folder)
    mask_memo = FactsMemo(cache, "masks", folder if mask_folder is None else mask_folder)
    looks, bad = look_at(files, rules, memo, mask_memo)
    warnings = []
    try:
        if write:
            memo.save()
            mask_memo.save()
    except SpaceError as error:  # everything else may be in the cache already: then nothing needs to be written
        warnings.append(f"the next start will have to read the images again: {error}")

    uncaptioned = [look for look in looks if look.is_uncaptioned]
    if uncaptioned and rules.missing_caption == "error":
        noun = count(len(uncaptioned), "image has", "images have")
        title = f'{folder}: {noun} no {CAPTION_FILES[rules.caption_mode]} caption, and missing_caption is "error":'
        raise DataError([title, *listed([str(look.picture.path) for look in uncaptioned])])
    skipped = []
    usable = []
    for look in looks:
        if look.picture.has_caption or not rules.skip_empty_caption:
            usable.append(look)
        else:
            fault = "missing" if look.is_uncaptioned else "empty"
            skipped.append(f"{look.picture.path}: its caption is {fault}")
    kept = shuffled(usable, lambda look: look.file, seed, "subsample", index)
    kept = kept[: max(1, round(len(kept) * rules.subsample_ratio))]
    rules_of = functools.cache(rules.of_folder)  # one object for each folder
    samples = []
    for look in sorted(kept, key=lambda look: os.fsencode(look.file)):
        top, slash, _ = look.file.partition("/")
        try:
            samples.extend(place(look.file, look.picture, index, rules_of(top if slash else ""), cache))
        except Unsuitable as reason:
            skipped.append(f"{look.picture.path}: {reason}")
    warnings.extend(folder_warnings(files, looks, rules))
    return Scan(samples, len(files.images), bad, skipped, warnings)


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


class Look(NamedTuple):
    """An image that can be used, and what was found on the way."""

    file: str  # its path in the directory
    picture: Picture
    is_uncaptioned: bool  # none of the kind that caption_mode asks for, not even an empty one
    warnings: Sequence[str]  # of `probe`, from the header


def look_at(files: Files, rules: Rules, memo: FactsMemo, mask_memo: FactsMemo) -> tuple[list[Look], list[str]]:
    """The images that can be used, and "path: reason" for the others."""

    def texts(file: str) -> tuple[str, ...]:
        try:
            text = read_caption(files.folder / file)
        except BadCaption as error:
            raise BadCaption(f"its caption {file}: {error}") from error
        lines = text.split("\n") if rules.captions_per_line else [text]
        return tuple(line for line in map(str.strip, lines) if line) or ("",)

    def look(name: str) -> Look:
        facts = memo.facts(name)
        stem = stem_of(name)
        tags: tuple[str, ...] = ()
        natural: tuple[str, ...] = ()
        if rules.caption_mode != "nl":
            tags = files.from_json.get(name, ()) or (texts(files.captions[stem][0]) if stem in files.captions else ())
        if rules.caption_mode != "tags" and stem in files.natural:
            natural = texts(files.natural[stem][0])
        mask, mask_sha256 = None, ""
        if files.mask_folder is not None and stem in files.masks:
            file = files.masks[stem][0]
            mask = files.mask_folder / file
            try:
                mask_sha256 = mask_memo.facts(file).sha256
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


def folder_warnings(files: Files, looks: Sequence[Look], rules: Rules) -> Iterator[str]:
    """What the user should know of a folder, one line for each kind."""
    images = set(files.images)
    stems = by_stem(files.images)
    bare = "caption_prefix alone" if rules.caption_prefix else "the empty one"
    kind = CAPTION_FILES[rules.caption_mode]
    # An image without any caption is counted as that, not as one without natural language.
    mixed = [look for look in looks if rules.caption_mode == "mixed" and look.picture.has_caption]
    is_tagged = rules.caption_mode != "nl"  # whether captions.json and {stem}.txt are used
    before = rules.trigger_word + rules.caption_prefix
    findings: dict[str, list[str]] = {
        "subfolders, which are not searched": files.subfolders,
        "subfolders that are searched under another name, not searched again": files.again,
        "files that are neither images nor captions, not used": files.others,
        f"images without a {kind} caption, trained with {bare}": [
            look.file for look in looks if look.is_uncaptioned and not rules.skip_empty_caption
        ],
        f"images with an empty caption, trained with {bare}": [
            look.file
            for look in looks
            if not (look.is_uncaptioned or look.picture.has_caption or rules.skip_empty_caption)
        ],
        "images without a natural-language caption (_nl.txt), trained with their tags alone": [
            look.file for look in mixed if not look.picture.natural
        ],
        "images without tags, trained with their natural-language caption (_nl.txt) alone": [
            look.file for look in mixed if not any(look.picture.tags)
        ],
        'natural-language captions (_nl.txt), not used, because caption_mode is "tags"': [
            names[0] for stem, names in files.natural.items() if stem in stems and rules.caption_mode == "tags"
        ],
        "images with a caption that holds text that the tokenizer reads as a special token, as </s> is": [
            look.file
            for look in looks
            if any(SPECIAL_TOKEN.search(text) for text in (before, *look.picture.tags, *look.picture.natural))
        ],
        "captions without an image": [
            names[0]
            for captions in (files.captions, files.natural)
            for stem, names in captions.items()
            if stem not in stems
        ],
        "entries of captions.json without an image": [name for name in files.from_json if name not in images],
        "captions in .txt files not used, because captions.json has them": [
            files.captions[stem_of(name)][0]
            for name in files.from_json
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
    if not files.images:
        yield f"{files.folder}: holds no image ({', '.join(sorted(EXTENSIONS))})"
    for text, names in findings.items():
        if names:
            yield f"{files.folder}: {text}: {len(names):,}, such as {names[0]}"


class Unsuitable(Exception):
    """A good image that the dataset's rules leave out; the message is the reason."""


def place(file: str, picture: Picture, index: int, rules: Rules, cache: Cache) -> list[Sample]:
    """The picture at every resolution.

    Args:
        file: its path in the directory.
        picture: with its facts.
        index: of the directory.
        rules: of its folder.
        cache: of the directory.

    Raises:
        Unsuitable: too small, or too far from every bucket's aspect ratio.
    """
    if min(picture.width, picture.height) < rules.min_image_side:
        raise Unsuitable(f"{picture.width}x{picture.height} is smaller than min_image_side = {rules.min_image_side}")
    samples = []
    for resolution, size in rules.sizes(picture.width / picture.height):
        kept = kept_fraction(picture.width, picture.height, size)
        if kept < rules.min_kept:
            raise Unsuitable(
                f"{picture.width}x{picture.height} is too far from every bucket: cropping to {size} would keep "
                f"{kept:.0%} of it (min_kept = {rules.min_kept:g})"
            )
        name = f"{index}/{printable(file)}@{resolution}"
        samples.append(Sample(name, picture, size, resolution, index, rules, cache))
    return samples
