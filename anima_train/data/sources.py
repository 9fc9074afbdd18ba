"""The dataset's settings, and the scan that turns folders of images and captions into samples."""

import concurrent.futures
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, TypeAdapter

from anima_train.core.errors import DataError, SpaceError, count
from anima_train.core.files import sha256_file
from anima_train.core.random import shuffled
from anima_train.core.settings import Settings
from anima_train.data.buckets import Size, aspect_ratios, kept_fraction, nearest, size_of
from anima_train.data.cache import Cache, entry_key
from anima_train.data.captions import BadCaption, read_caption, shuffled_tags
from anima_train.data.images import EXTENSIONS, BadImage, probe

MAX_LISTED = 20  # files named in one message
CACHE_FOLDER = ".anima_cache"
MEMO_VERSION = 1  # raise when the meaning of `FileFacts` changes

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
    cache_shuffle_num: int | None = Field(default=None, ge=0)
    """Number of shuffled variants of each caption's tags; epochs take turns through them. 0 leaves captions as they
    are. Default 0."""
    cache_shuffle_delimiter: str | None = Field(default=None, min_length=1)
    """What separates tags, for cache_shuffle_num. Default ", "."""
    caption_prefix: str | None = None
    """Put in front of every caption, missing and empty ones too, as it stands. Default ""."""
    skip_empty_caption: bool | None = None
    """Set aside images whose caption is empty or missing. Default false."""
    missing_caption: Literal["empty", "error"] | None = None
    """What to do with an image without a .txt file: "empty" trains it with the empty caption (after caption_prefix) and
    counts it; "error" stops. Default "empty"."""
    min_image_side: int | None = Field(default=None, ge=1)
    """Images whose shorter side has fewer pixels are set aside. Default 64."""
    min_kept: float | None = Field(default=None, ge=0, le=1)
    """Images of whose area the crop would keep less than this share are set aside. Default 0.25."""


class Directory(DirectorySettings):
    """A folder of images with a .txt caption beside each."""

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
    cache_shuffle_num: int = 0
    cache_shuffle_delimiter: str = ", "
    caption_prefix: str = ""
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

    @cached_property
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
    ("cache_shuffle_num", lambda rules: rules.cache_shuffle_num == 0, ("cache_shuffle_delimiter",)),
)


def side(resolution: int | Sequence[int]) -> int:
    """The side, in pixels, of the square with the area of [width, height]; a number is that side already."""
    return resolution if isinstance(resolution, int) else Size(resolution[0], resolution[1]).resolution


@dataclass(frozen=True, slots=True)
class Picture:
    """One image file with its caption and mask."""

    path: Path
    sha256: str
    width: int  # pixels, after EXIF orientation
    height: int
    caption: str  # as in the file, without the prefix
    mask: Path | None
    mask_sha256: str


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

    def caption(self, seed: int, variant: int) -> str:
        """The caption of a variant; variants repeat after `cache_shuffle_num`."""
        number = self.rules.cache_shuffle_num
        caption = self.picture.caption
        if number and caption:
            # By the picture, not by the sample: every resolution shares the same texts in the cache.
            name = f"{self.directory}/{self.picture.path.name}"
            caption = shuffled_tags(caption, self.rules.cache_shuffle_delimiter, seed, name, variant % number)
        return self.rules.caption_prefix + caption

    def captions(self, seed: int) -> list[str]:
        """Every caption this sample can be trained with."""
        return [self.caption(seed, variant) for variant in range(max(1, self.rules.cache_shuffle_num))]

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
        digest = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()
        self.path = cache.folder / f"{kind}_{MEMO_VERSION}_{digest[:16]}.json"
        try:
            self.known = FACTS.validate_json(self.path.read_bytes())
        except (OSError, ValueError):  # none yet, or damaged: the files are looked at again
            self.known = {}
        self.changed = False

    def facts(self, path: Path) -> FileFacts:
        """The file's facts, from memory where it has not changed.

        Raises:
            BadImage: the file is no image that can be used.
        """
        name = printable(path.name)
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
    files = Files.of(folder, mask_folder)
    memo = FactsMemo(cache, "images", folder)
    mask_memo = FactsMemo(cache, "masks", folder if mask_folder is None else mask_folder)
    looks, bad = look_at(files, memo, mask_memo)
    warnings = []
    try:
        if write:
            memo.save()
            mask_memo.save()
    except SpaceError as error:  # everything else may be in the cache already: then nothing needs to be written
        warnings.append(f"the next start will have to read the images again: {error}")

    uncaptioned = [look.picture.path for look in looks if look.picture.path.stem not in files.captions]
    if uncaptioned and rules.missing_caption == "error":
        noun = count(len(uncaptioned), "image has", "images have")
        title = f'{folder}: {noun} no .txt caption, and missing_caption is "error":'
        raise DataError([title, *listed([str(path) for path in uncaptioned])])
    skipped = []
    pictures = []
    for picture in (look.picture for look in looks):
        if picture.caption or not rules.skip_empty_caption:
            pictures.append(picture)
        else:
            fault = "empty" if picture.path.stem in files.captions else "missing"
            skipped.append(f"{picture.path}: its caption is {fault}")
    kept = shuffled(pictures, lambda picture: picture.path.name, seed, "subsample", index)
    kept = kept[: max(1, round(len(kept) * rules.subsample_ratio))]
    samples = []
    for picture in sorted(kept, key=lambda picture: os.fsencode(picture.path.name)):
        try:
            samples.extend(place(picture, index, rules, cache))
        except Unsuitable as reason:
            skipped.append(f"{picture.path}: {reason}")
    warnings.extend(folder_warnings(files, looks, rules))
    return Scan(samples, len(files.images), bad, skipped, warnings)


@dataclass(frozen=True)
class Files:
    """What a directory and its mask folder hold."""

    folder: Path
    has_masks: bool
    images: list[Path]  # all that is named like one, whatever it is
    captions: dict[str, list[Path]]  # by stem; the first is read
    masks: dict[str, list[Path]]
    subfolders: list[Path]  # without the mask folder
    others: list[Path]

    @classmethod
    def of(cls, folder: Path, mask_folder: Path | None) -> "Files":
        """List both folders.

        Raises:
            DataError: one cannot be read.
        """
        paths = [path for path in list_folder(folder) if path != mask_folder]
        images = [path for path in paths if is_image(path)]
        captions = [path for path in paths if is_caption(path)]
        rest = [p for p in paths if not (is_image(p) or is_caption(p) or p.name.startswith("."))]
        subfolders = [path for path in rest if path.is_dir()]
        masks = [] if mask_folder is None else [path for path in list_folder(mask_folder) if is_image(path)]
        others = [path for path in rest if path not in set(subfolders)]
        return cls(folder, mask_folder is not None, images, by_stem(captions), by_stem(masks), subfolders, others)


def list_folder(folder: Path) -> list[Path]:
    """Everything in a folder, ordered by the bytes of the names.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return [folder / name for name in sorted(os.listdir(folder), key=os.fsencode)]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); it should be a folder of images") from error


def is_image(path: Path) -> bool:
    """Whether a path is named like an image, whatever it is."""
    return path.suffix.lower() in EXTENSIONS


def is_caption(path: Path) -> bool:
    """Whether a path is named like a caption, whatever it is."""
    return path.suffix.lower() == ".txt"


def by_stem(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Paths by their names without the ending."""
    stems: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        stems[path.stem].append(path)
    return dict(stems)


class Look(NamedTuple):
    """An image that can be used, and what its header made `probe` warn of."""

    picture: Picture
    warnings: Sequence[str]


def look_at(files: Files, memo: FactsMemo, mask_memo: FactsMemo) -> tuple[list[Look], list[str]]:
    """The images that can be used, and "path: reason" for the others."""

    def look(path: Path) -> Look:
        facts = memo.facts(path)
        caption, mask, mask_sha256 = "", None, ""
        if path.stem in files.captions:
            file = files.captions[path.stem][0]
            try:
                caption = read_caption(file)
            except BadCaption as error:
                raise BadCaption(f"its caption {file.name}: {error}") from error
        if path.stem in files.masks:
            mask = files.masks[path.stem][0]
            try:
                mask_sha256 = mask_memo.facts(mask).sha256
            except BadImage as error:
                raise BadImage(f"its mask {mask.name}: {error}") from error
        return Look(Picture(path, facts.sha256, facts.width, facts.height, caption, mask, mask_sha256), facts.warnings)

    looks = []
    bad = []
    pool = concurrent.futures.ThreadPoolExecutor()
    try:
        for path, future in [(path, pool.submit(look, path)) for path in files.images]:
            try:
                looks.append(future.result())
            except (BadImage, BadCaption) as error:
                bad.append(f"{path}: {error}")
    finally:
        pool.shutdown(cancel_futures=True)  # so that Ctrl-C does not wait for all that is left
    return looks, bad


def folder_warnings(files: Files, looks: Sequence[Look], rules: Rules) -> Iterator[str]:
    """What the user should know of a folder, one line for each kind."""
    pictures = [look.picture for look in looks]
    stems = by_stem(files.images)
    bare = "caption_prefix alone" if rules.caption_prefix else "the empty one"
    findings: dict[str, list[Path]] = {
        "subfolders, which are not searched": files.subfolders,
        "files that are neither images nor captions, not used": files.others,
        f"images without a .txt caption, trained with {bare}": [
            p.path for p in pictures if p.path.stem not in files.captions and not rules.skip_empty_caption
        ],
        f"images with an empty caption, trained with {bare}": [
            p.path for p in pictures if not p.caption and p.path.stem in files.captions and not rules.skip_empty_caption
        ],
        "captions with text that the tokenizer reads as a special token, as </s> is": [
            files.captions[p.path.stem][0] for p in pictures if SPECIAL_TOKEN.search(rules.caption_prefix + p.caption)
        ],
        "captions without an image": [paths[0] for stem, paths in files.captions.items() if stem not in stems],
        "images that share caption and mask, because their names differ in the ending only": [
            path for paths in stems.values() for path in paths if len(paths) > 1
        ],
        "captions not used, because another differs in the ending only": [
            path for paths in files.captions.values() for path in paths[1:]
        ],
        "masks not used, because another differs in the ending only": [
            path for paths in files.masks.values() for path in paths[1:]
        ],
        "images without a mask, trained whole": [p.path for p in pictures if files.has_masks and p.mask is None],
    }
    for picture, warnings in looks:
        for warning in warnings:
            findings.setdefault(warning, []).append(picture.path)
    if not files.images:
        yield f"{files.folder}: holds no image ({', '.join(sorted(EXTENSIONS))})"
    for text, paths in findings.items():
        if paths:
            yield f"{files.folder}: {text}: {len(paths):,}, such as {paths[0].name}"


class Unsuitable(Exception):
    """A good image that the dataset's rules leave out; the message is the reason."""


def place(picture: Picture, index: int, rules: Rules, cache: Cache) -> list[Sample]:
    """The picture at every resolution.

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
        name = f"{index}/{printable(picture.path.name)}@{resolution}"
        samples.append(Sample(name, picture, size, resolution, index, rules, cache))
    return samples
