"""The dataset's settings, and the scan that turns folders of images and captions into samples."""

import concurrent.futures
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from anima_train.core.errors import DataError, count
from anima_train.core.files import sha256_file, write_text
from anima_train.core.random import shuffled
from anima_train.core.settings import Settings
from anima_train.data.buckets import Size, aspect_ratios, kept_fraction, nearest, size_of
from anima_train.data.cache import Cache, entry_key
from anima_train.data.captions import BadCaption, read_caption, shuffled_tags
from anima_train.data.images import EXTENSIONS, BadImage, probe

MAX_LISTED = 20  # files named in one message
CACHE_FOLDER = ".anima_cache"


class DirectorySettings(Settings):
    """Keys of the dataset, each of which a [[directory]] may set for itself."""

    resolutions: list[int] | None = Field(default=None, min_length=1)
    """Side, in pixels, of the square whose area the images are scaled to. Each image goes to every resolution.
    Default [1024]."""
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
    all aspect-ratio keys."""
    num_repeats: float | None = Field(default=None, gt=0)
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
    """Put in front of every caption, as it stands. Default ""."""
    skip_empty_caption: bool | None = None
    """Set aside images whose caption is empty or missing. Default false."""
    missing_caption: Literal["empty", "error"] | None = None
    """What to do with an image without a .txt file: "empty" trains it with the empty caption and counts it; "error"
    stops. Default "empty"."""
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
        for index in range(len(self.directory)):
            rules = self.rules(index)
            if rules.min_ar > rules.max_ar:
                raise ValueError(f"directory[{index}]: min_ar {rules.min_ar} is larger than max_ar {rules.max_ar}")
            for resolution in rules.resolutions:
                if not 64 <= resolution <= 4096:
                    raise ValueError(f"directory[{index}]: resolutions: found {resolution}, expected 64 to 4096 pixels")
            for size in rules.size_buckets or []:
                if len(size) not in (2, 3) or size[2:] not in ([], [1]) or any(s < 16 or s % 16 for s in size[:2]):
                    raise ValueError(
                        f"directory[{index}]: size_buckets: found {size}, expected [width, height] in multiples of 16"
                    )
            for ratio in rules.ar_buckets or []:
                if (isinstance(ratio, list) and (len(ratio) != 2 or min(ratio) < 1)) or ratio == 0:
                    raise ValueError(f"directory[{index}]: ar_buckets: found {ratio}, expected a ratio or [w, h]")

    def rules(self, index: int) -> "Rules":
        """What holds for one directory: its own keys, else the dataset's, else the defaults."""
        own = self.directory[index]
        chosen = {}
        for name in DirectorySettings.model_fields:
            value = getattr(own, name)
            value = getattr(self, name) if value is None else value
            if value is not None:
                chosen[name] = value
        return Rules(**chosen)


@dataclass(frozen=True)
class Rules:
    """A directory's keys with the defaults filled in; see `DirectorySettings` for their meaning."""

    resolutions: Sequence[int] = (1024,)
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

    def buckets(self) -> list[tuple[int, list[Size]]]:
        """(resolution, sizes) for each resolution; with `size_buckets` each size is what its area says."""
        if self.size_buckets is not None:
            sizes = [Size(size[0], size[1]) for size in self.size_buckets]
            return [(round((size.width * size.height) ** 0.5), sizes) for size in sizes[:1]]
        if not self.enable_ar_bucket:
            ratios = [1.0]
        elif self.ar_buckets is not None:
            ratios = [r if isinstance(r, int | float) else r[0] / r[1] for r in self.ar_buckets]
        else:
            ratios = aspect_ratios(self.min_ar, self.max_ar, self.num_ar_buckets)
        return [
            (resolution, sorted({size_of(resolution, ratio) for ratio in ratios})) for resolution in self.resolutions
        ]


@dataclass(frozen=True)
class Picture:
    """One image file with its caption and mask."""

    path: Path
    sha256: str
    width: int  # pixels, after EXIF orientation
    height: int
    caption: str  # as in the file, without the prefix
    mask: Path | None
    mask_sha256: str


@dataclass(frozen=True)
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
        if not self.picture.caption:
            return ""
        caption = self.picture.caption
        if number:
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
            raise DataError(["no image is left to train on", *listed(self.bad + self.skipped)])
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
    """The first lines, and how many more there are."""
    more = len(lines) - MAX_LISTED
    return list(lines[:MAX_LISTED]) + ([f"... and {more:,} more"] if more > 0 else [])


@dataclass(frozen=True)
class FileFacts:
    """What a look at an image file found."""

    sha256: str
    width: int
    height: int
    warnings: tuple[str, ...]


class FactsMemo:
    """Remembers what files held, by path, size and time of change, so that a second start reads none of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.known: dict[str, list] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet, or damaged: the files are looked at again
            self.known = {}
        self.fresh: dict[str, list] = {}

    def facts(self, path: Path) -> FileFacts:
        """The file's facts, from memory where it has not changed.

        Raises:
            BadImage: the file is no image that can be used.
        """
        name = os.fsdecode(path.name)
        try:
            status = path.stat()
        except OSError as error:
            raise BadImage(f"not readable ({error.strerror})") from error
        stamp = [status.st_size, status.st_mtime_ns]
        entry = self.known.get(name)
        if entry is None or entry[:2] != stamp:
            info = probe(path)
            try:
                digest = sha256_file(path)
            except OSError as error:
                raise BadImage(f"not readable ({error.strerror})") from error
            entry = [*stamp, digest, info.width, info.height, list(info.warnings)]
        self.fresh[name] = entry
        return FileFacts(entry[2], entry[3], entry[4], tuple(entry[5]))

    def save(self) -> None:
        """Write what is known now; files that are gone are forgotten."""
        if self.fresh != self.known:
            write_text(self.path, json.dumps(self.fresh))


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
    """
    total = Scan([], 0)
    num_images = 0
    for index, (folder, mask_folder, cache) in enumerate(zip(folders, masks, caches, strict=True)):
        rules = dataset.rules(index)
        found = scan_folder(index, folder, mask_folder, rules, cache, seed, write)
        total.samples.extend(found.samples)
        total.bad.extend(found.bad)
        total.skipped.extend(found.skipped)
        total.warnings.extend(found.warnings)
        num_images += found.num_images
    hashes = Counter(sample.picture.sha256 for sample in {s.picture.path: s for s in total.samples}.values())
    if repeated := sum(number - 1 for number in hashes.values()):
        total.warnings.append(f"{count(repeated, 'image is', 'images are')} in the dataset more than once")
    return Scan(total.samples, num_images, total.bad, total.skipped, total.warnings)


def scan_folder(
    index: int, folder: Path, mask_folder: Path | None, rules: Rules, cache: Cache, seed: int, write: bool
) -> Scan:
    """Look at every image of one directory."""
    result = Scan([], 0)
    paths = sorted(image_paths(folder), key=lambda path: os.fsencode(path.name))
    captions = {path.stem: path for path in folder.iterdir() if path.suffix.lower() == ".txt"}
    masks = {} if mask_folder is None else {path.stem: path for path in image_paths(mask_folder)}
    memo = FactsMemo(cache.folder / f"files_{entry_key('latent', folder=str(folder))[:16]}.json")
    mask_memo = FactsMemo(cache.folder / f"files_{entry_key('mask', folder=str(mask_folder))[:16]}.json")

    pictures = []
    missing_captions = 0
    missing_masks = 0
    with concurrent.futures.ThreadPoolExecutor() as pool:
        looks = [pool.submit(memo.facts, path) for path in paths]
        for path, look in zip(paths, looks, strict=True):
            try:
                facts = look.result()
                caption_path = captions.get(path.stem)
                caption = "" if caption_path is None else read_caption(caption_path)
                mask = masks.get(path.stem)
                mask_sha256 = "" if mask is None else mask_memo.facts(mask).sha256
            except (BadImage, BadCaption) as error:
                result.bad.append(f"{path}: {error}")
                continue
            result.warnings.extend(f"{path}: {warning}" for warning in facts.warnings)
            missing_captions += caption_path is None
            missing_masks += mask is None
            if not caption and rules.skip_empty_caption:
                result.skipped.append(f"{path}: its caption is {'missing' if caption_path is None else 'empty'}")
                continue
            pictures.append(Picture(path, facts.sha256, facts.width, facts.height, caption, mask, mask_sha256))
    if write:
        memo.save()
        if mask_folder is not None:
            mask_memo.save()

    if missing_captions and rules.missing_caption == "error":
        raise DataError(f"{folder}: {count(missing_captions, 'image has', 'images have')} no .txt caption")
    if missing_captions and not rules.skip_empty_caption:
        noun = count(missing_captions, "image has", "images have")
        result.warnings.append(f"{folder}: {noun} no .txt caption, and trains with the empty one")
    empty = sum(1 for picture in pictures if not picture.caption) - missing_captions
    if empty > 0:
        result.warnings.append(f"{folder}: {count(empty, 'caption is', 'captions are')} empty")
    if missing_masks and mask_folder is not None:
        result.warnings.append(f"{folder}: {count(missing_masks, 'image has', 'images have')} no mask; trained whole")
    if strays := sorted(set(captions) - {path.stem for path in paths}):
        result.warnings.append(
            f"{folder}: {count(len(strays), 'caption')} without an image, such as {captions[strays[0]].name}"
        )

    kept = shuffled(pictures, lambda picture: picture.path.name, seed, "subsample", index)
    kept = kept[: max(1, round(len(kept) * rules.subsample_ratio))]
    for picture in sorted(kept, key=lambda picture: os.fsencode(picture.path.name)):
        try:
            result.samples.extend(place(picture, index, rules, cache))
        except Unsuitable as reason:
            result.skipped.append(f"{picture.path}: {reason}")
    return Scan(result.samples, len(paths), result.bad, result.skipped, result.warnings)


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
    for resolution, sizes in rules.buckets():
        size = nearest(picture.width / picture.height, sizes)
        kept = kept_fraction(picture.width, picture.height, size)
        if kept < rules.min_kept:
            raise Unsuitable(
                f"{picture.width}x{picture.height} is too far from every bucket: cropping to {size} would keep "
                f"{kept:.0%} of it (min_kept = {rules.min_kept:g})"
            )
        name = f"{index}/{picture.path.name}@{resolution}"
        samples.append(Sample(name, picture, size, resolution, index, rules, cache))
    return samples


def image_paths(folder: Path) -> Iterator[Path]:
    """Everything in the folder that is named like an image, files or not."""
    return (path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)
