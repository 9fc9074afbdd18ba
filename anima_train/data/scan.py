"""The scan that turns a dataset into samples, and lists what it skips."""

import functools
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

from anima_train.core.errors import DataError, SpaceError
from anima_train.core.format import Listing, count, printable
from anima_train.core.random import shuffled
from anima_train.data.buckets import SIDE_MULTIPLE, kept_fraction
from anima_train.data.cache import Cache
from anima_train.data.image_headers import UNREAD_SUFFIXES
from anima_train.data.image_index import ImageIndex
from anima_train.data.lost_captions import lost_captions
from anima_train.data.samples import Picture, Sample, exact
from anima_train.data.scan_images import scan_images
from anima_train.data.scan_warnings import caption_kind, folder_warnings
from anima_train.data.settings import DatasetSettings, DirectoryOptions
from anima_train.data.sources.folder import Files, is_image, suffix_of
from anima_train.data.sources.hf_dataset import hf_dataset_files

REGULARIZATION_SHARE = Fraction(1, 5)  # of the samples seen, where no key says it
OWN = 2  # the level of a key in a directory's own table


@dataclass(frozen=True)
class Scan:
    """The samples of a dataset, and what was found on the way."""

    samples: list[Sample]
    num_images: int  # found, skipped ones included
    bad: list[str] = field(default_factory=list)  # skipped as damaged or unreadable: "path: reason"
    skipped: list[str] = field(default_factory=list)  # by a setting, or as nothing can read them: "path: reason"
    warnings: list[str] = field(default_factory=list)  # those about files are each a `Listing`

    def check(self, max_bad_fraction: float) -> None:
        """Stop where nothing is left, or more than the allowed share is bad.

        Raises:
            DataError: with every file skipped.
        """
        if not self.samples:
            raise DataError([Listing("no image is left to train on", self.bad + self.skipped), *self.warnings])
        if len(self.bad) > max_bad_fraction * self.num_images:
            share = len(self.bad) / self.num_images
            title = (
                f"{count(len(self.bad), 'image')} of {self.num_images:,} cannot be used ({share:.1%}, more than "
                f"max_bad_fraction = {max_bad_fraction:g}); repair or remove them, or raise max_bad_fraction:"
            )
            raise DataError(Listing(title, self.bad))


def scan(
    dataset: DatasetSettings,
    folders: Sequence[Path],
    masks: Sequence[Path | None],
    caches: Sequence[Cache],
    seed: int,
    write: bool,
    offline: bool = False,
) -> Scan:
    """Read the header of every image and all captions, and make samples of them.

    Args:
        dataset: the settings.
        folders: the resolved path of each directory; for a dataset of the Hub, its name.
        masks: the resolved mask folder of each directory.
        caches: the cache of each directory.
        seed: for `subsample_ratio`.
        write: True if this process may write the index of images.
        offline: look nothing up on the Hub.

    Raises:
        DataError: a folder cannot be read, or captions are missing where that is not allowed; for all folders at once.
    """
    total = Scan([], 0)
    num_images = 0
    problems: list[str] = []
    for index, (folder, mask_folder, cache) in enumerate(zip(folders, masks, caches, strict=True)):
        options = dataset.options(index)
        try:
            if dataset.directory[index].hf_dataset is None:
                files = Files.of(folder, mask_folder, options, cache)
            else:
                files = hf_dataset_files(dataset.directory[index], folder, offline)
                options = options.model_copy(update={"kohya_folders": False})  # the folders of its files do not count
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
    samples = weighted(with_regularization_share(total.samples, dataset), weights)
    return Scan(samples, num_images, total.bad, total.skipped, total.warnings)


def with_regularization_share(samples: list[Sample], dataset: DatasetSettings) -> list[Sample]:
    """Return the samples, images for regularization as often as is their share: their weight, if others have none.

    Without a weight it is the default, where no num_repeats of their own, or of their folders, says how often. Other
    images are seen as often as without them.
    """
    options = [dataset.options(index) for index in range(len(dataset.directory))]
    weights = {index: own.weight for index, own in enumerate(options) if own.weight is not None}
    free = tuple(
        index
        for index, own in enumerate(options)
        if own.role == "regularization" and own.weight is None and not own.kohya_folders
        if dataset.level(index, "num_repeats") < OWN
    )
    shares: list[tuple[tuple[int, ...], Fraction]] = [((index,), exact(weight)) for index, weight in weights.items()]
    shares = shares or [(free, REGULARIZATION_SHARE)]
    kept = {each: sum(sample.repeats for sample in samples if sample.directory in each) for each, _ in shares}
    rest = 1 - sum(share for directories, share in shares if kept[directories])
    trained = sum(sample.repeats for sample in samples if sample.options.role == "train")
    if not trained or len(weights) == len(options):
        return samples
    factors: dict[int, Fraction] = {}
    for directories, share in shares:
        if kept[directories]:
            factors |= dict.fromkeys(directories, share / rest * trained / kept[directories])
    return [replace(each, repeat_factor=factors.get(each.directory, each.repeat_factor)) for each in samples]


def weighted(samples: list[Sample], weights: Sequence[float | None]) -> list[Sample]:
    """Return the samples, repeated so that each directory has its share of an epoch; `weights` by directory.

    The length of the epoch stays that without weights. Where some have none nothing is changed.
    """
    per_epoch: dict[int, Fraction] = defaultdict(Fraction)
    for sample in samples:
        per_epoch[sample.directory] += sample.repeats
    shares = {index: exact(weight) for index, weight in enumerate(weights) if weight is not None and per_epoch[index]}
    if None in weights or len(shares) < 2:
        return samples
    total, all_shares = sum(per_epoch.values()), sum(shares.values())
    factors = {index: total * share / all_shares / per_epoch[index] for index, share in shares.items()}
    return [replace(sample, repeat_factor=factors[sample.directory]) for sample in samples]


def duplicates(pictures: Iterable[Picture]) -> Iterator[str]:
    """Yield a warning if different files hold the same image."""
    first: dict[str, Path] = {}
    repeated = {}
    for picture in pictures:
        original = first.setdefault(picture.sha256, picture.path)
        if original != picture.path:
            repeated[picture.path] = original
    if repeated:
        equal = [f"{path}, which equals {original}" for path, original in repeated.items()]
        noun = count(len(repeated), "image is", "images are")
        yield Listing(f"{noun} in the dataset more than once, such as {equal[0]}", equal, num_shown=0)


def scan_files(index: int, files: Files, options: DirectoryOptions, cache: Cache, seed: int, write: bool) -> Scan:
    """Make samples of the files of one directory.

    Raises:
        DataError: captions are missing where that is not allowed.
    """
    image_index = ImageIndex(cache, "images", files.identity)
    mask_index = ImageIndex(cache, "masks", files.mask_identity)
    images, bad = scan_images(files, options, image_index, mask_index)
    warnings: list[str] = []
    try:
        if write:
            image_index.save()
            mask_index.save()
    except SpaceError as error:  # everything else may be in the cache already: then nothing needs to be written
        warnings.append(f"the next start will have to read the images again: {error}")

    uncaptioned = [image for image in images if image.is_uncaptioned]
    if uncaptioned and options.missing_caption == "error":
        noun = count(len(uncaptioned), "image has", "images have")
        title = f'{files.folder}: {noun} no {caption_kind(files, options)} caption, and missing_caption is "error":'
        raise DataError(Listing(title, [str(image.picture.path) for image in uncaptioned]))
    if (advice := lost_captions(files, images, options)) is not None:
        raise DataError(advice)
    skipped = []
    usable = []
    for image in images:
        if image.picture.has_caption or not options.skip_empty_caption:
            usable.append(image)
        else:
            fault = "missing" if image.is_uncaptioned else "empty"
            skipped.append(f"{image.picture.path}: its caption is {fault}")
    for name in files.unread_images:
        advice = UNREAD_SUFFIXES[suffix_of(name)[1:]]
        skipped.append(f"{files.folder / name}: {suffix_of(name)[1:].upper()} is not read; {advice}")
    lost = [name for name in files.lost_members if is_image(name) and name not in files.members]
    skipped.extend(f"{files.folder / name}: {files.lost_members[name]}" for name in lost)
    kept = shuffled(usable, lambda image: image.file, seed, "subsample", index)
    kept = kept[: max(1, round(len(kept) * options.subsample_ratio))]
    options_of = functools.cache(options.of_folder)  # one object for each folder
    samples = []
    for image in sorted(kept, key=lambda image: os.fsencode(image.file)):
        top, slash, _ = image.file.partition("/")
        try:
            samples.extend(make_samples(image.file, image.picture, index, options_of(top if slash else ""), cache))
        except SkippedImage as reason:
            skipped.append(f"{image.picture.path}: {reason}")
    warnings.extend(folder_warnings(files, images, options))
    return Scan(samples, len(files.images) + len(files.unread_images) + len(lost), bad, skipped, warnings)


class SkippedImage(Exception):
    """A good image that the dataset's options leave out; the message is the reason."""


def make_samples(file: str, picture: Picture, index: int, options: DirectoryOptions, cache: Cache) -> list[Sample]:
    """Return the samples of a picture, one for each resolution.

    Args:
        file: its path in the directory.
        picture: with its size and captions.
        index: of the directory.
        options: of its folder.
        cache: of the directory.

    Raises:
        SkippedImage: too small, or too far from every bucket's aspect ratio.
    """
    width, height = picture.width, picture.height
    if min(width, height) < options.min_image_side:
        raise SkippedImage(f"{width}x{height} is smaller than min_image_side = {options.min_image_side}")
    if options.no_upscale and min(width, height) < SIDE_MULTIPLE:
        raise SkippedImage(f"{width}x{height} has a side below {SIDE_MULTIPLE} pixels (no_upscale)")
    samples = []
    usual = options.usual_sizes(width, height)
    for resolution, size in options.sizes(width, height):
        kept = kept_fraction(width, height, size)
        if kept < exact(options.min_kept):
            raise SkippedImage(
                f"{width}x{height} is too far from every bucket: cropping to {size} would keep "
                f"{math.floor(1000 * kept) / 10:g}% of it (min_kept = {options.min_kept:g})"
            )
        # An image that no_upscale does not touch has the name that it has without.
        name = f"{index}/{printable(file)}@{resolution if (resolution, size) in usual else size}"
        samples.append(Sample(name, picture, size, resolution, index, options, cache))
    return samples
