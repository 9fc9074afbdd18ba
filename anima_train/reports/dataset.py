"""The report of a dataset before the run, collected into plain values; `dataset_page` draws it."""

import concurrent.futures
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from anima_train.caching.sizes import CacheCost
from anima_train.core.format import format_duration
from anima_train.core.text_batch import MAX_TOKENS
from anima_train.data.buckets import Size
from anima_train.data.decoding import mask_image
from anima_train.data.image_headers import BadImage
from anima_train.data.images import cover_box, decode, mask_to_latent
from anima_train.data.plan import BatchSizes, EpochSchedule, Plan, batch_size_for, short_by
from anima_train.data.samples import Sample
from anima_train.data.scan import Scan
from anima_train.data.sources.archive import content_of
from anima_train.optim.groups import GroupRow
from anima_train.optim.lr_schedules import Schedule, lr_factor
from anima_train.reports.captions import (
    CaptionStats,
    Missing,
    Tokenized,
    caption_kinds,
    caption_stats,
    missing_words,
)  # fmt: skip
from anima_train.reports.html import shrunk, small_jpeg
from anima_train.reports.series import evenly, evenly_to_last
from anima_train.training.costs import Measured, MemoryCost
from anima_train.training.ladder import Choice

MAX_THUMBNAILS = 160
THUMBNAIL_SIDE = 160  # pixels, the longer one
MASKED = "#5a3cc8"  # violet, over what is not trained
CURVE_POINTS = 200
MAX_GIVEN = 3  # captions that are shown as the model is given them
NUM_THREADS = 4  # each holds a whole decoded image, of up to 400 MB

BucketKey = tuple[int, Size]  # resolution, size
Captions = Mapping[Path, Sequence[str]]  # of each picture


@dataclass(frozen=True)
class Thumbnail:
    """A small picture, and the part of the image that is trained."""

    name: str
    written: str  # the first caption as it is in the file
    given: Sequence[str]  # what the model may be given instead, at the first repeats; without those equal to it
    width: int  # of the image
    height: int
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels of the image
    scale: float  # from the image to the bucket; above 1 it is enlarged
    jpeg: str  # base64; what its mask hides is tinted
    mask_leaves: float | None = None  # share of the box that is trained; None without a mask


@dataclass(frozen=True)
class Bucket:
    """The images of one size, and their costs."""

    resolution: int
    size: Size
    num_images: int
    batch_size: int
    short_by: int  # images that the last batch of the first epoch lacks
    thumbnails: Sequence[Thumbnail]
    memory: MemoryCost | None = None  # None: not trained
    measured: Measured | None = None  # counts instead of `memory`
    savings: Sequence[str] = ()  # what to change where memory ran out


@dataclass(frozen=True)
class SetReport:
    """The report of one dataset."""

    name: str
    num_images: int  # seen, those skipped included
    num_used: int
    bad: Sequence[str]  # "path: reason"
    damaged: Sequence[str]  # the same, of those pictures that were drawn
    skipped: Sequence[str]
    warnings: Sequence[str]
    duplicates: Sequence[Sequence[str]]  # files with the same bytes
    num_masked: int  # images with a mask, or alpha that counts as one
    buckets: Sequence[Bucket]
    captions: CaptionStats
    kinds: Mapping[str, Sequence[str]]  # files by what their captions are made of: tags, sentences, both
    missing: Sequence[Missing]  # only of the training set


@dataclass(frozen=True)
class RunLength:
    """The way from images to steps."""

    num_images: int
    num_samples: int  # an image counts once for each of its resolutions
    num_shown: int  # in the first epoch, with repeats and weights
    num_micro_batches: int  # of the first epoch; each of one size
    micro_batches_per_step: int
    steps_in_epoch: int  # the first
    epochs: int | None  # None: max_steps ends the run
    num_steps: int

    @classmethod
    def of(cls, plan: Plan, schedule: EpochSchedule, epochs: int | None) -> "RunLength":
        """Return the length of a run; `epochs` is the setting."""
        shown = plan.refs_by_bucket(0)
        batches = (math.ceil(len(refs) / batch_size_for(plan.batch_sizes, key[0])) for key, refs in shown.items())
        is_cut = schedule.num_steps < schedule.epoch_starts[-1]
        return cls(
            len({sample.picture.path for sample in plan.samples}),
            len(plan.samples),
            sum(map(len, shown.values())),
            sum(batches),
            plan.micro_batches_per_step,
            plan.steps_in(0),
            None if is_cut else epochs,
            schedule.num_steps,
        )


@dataclass(frozen=True)
class DatasetReport:
    """The whole report."""

    title: str
    warnings: Sequence[str]  # beside those of the sets
    notes: Sequence[str]
    settings: Sequence[tuple[str, str]]  # those that matter most: (what, value)
    sets: Sequence[SetReport]  # the training set first
    exposures: Sequence[tuple[int, int]]  # (times seen in the run, samples)
    length: RunLength
    curve: Sequence[tuple[int, float]]  # (step, factor on the learning rates)
    groups: Sequence[GroupRow]
    cache: Sequence[CacheCost]
    against_forgetting: Sequence[str]  # lines about what is measured, and what keeps the base
    files: str  # that the run writes
    memory: Choice | None  # the estimate of the largest micro-batch, and the settings that were chosen for it
    device_bytes: int  # all memory of the device
    run_seconds: float | None  # None where nothing was measured, or memory ran out
    max_tokens: int = MAX_TOKENS  # of a caption that are read

    @property
    def run_time(self) -> str:
        """The time of the whole run, and what it leaves out; "" without an estimate."""
        if self.run_seconds is None:
            return ""
        return (
            f"about {format_duration(self.run_seconds)} in one process, without caching, evaluation and saving (an "
            "estimate from what was measured)"
        )


def captions_of(scans: Mapping[str, Scan], seed: int) -> dict[str, Captions]:
    """Return the captions of each set as they are trained, of evaluation sets the one that is measured."""
    return {
        name: {
            sample.picture.path: sample.captions(seed) if name == "train" else [sample.evaluation_caption().text]
            for sample in scan.samples
        }
        for name, scan in scans.items()
    }


def collect_sets(
    scans: Mapping[str, Scan], plan: Plan, eval_batch_sizes: BatchSizes, captions: Mapping[str, Captions],
    known: Tokenized, max_thumbnails: int, shared: Callable[[str], str],
) -> list[SetReport]:  # fmt: skip
    """Return the report of each set, without the costs of its buckets.

    Args:
        scans: by the set's name; "train" is trained.
        plan: of the run.
        eval_batch_sizes: of the evaluation sets.
        captions: by the set's name.
        known: the tokens of all captions.
        max_thumbnails: pictures in the whole report; 0 decodes no image.
        shared: makes of a message one that may be shown to others.
    """
    sets = []
    for name, scan in scans.items():
        is_trained = name == "train"
        samples = scan.samples
        seed = plan.seed if is_trained else None
        there = [sample for sample in samples if not sample.is_preserved or os.path.exists(sample.picture.path)]
        pictures, damaged = thumbnails(seed, there, max_thumbnails // len(scans))
        batch_sizes = plan.batch_sizes if is_trained else eval_batch_sizes
        shown = plan.refs_by_bucket(0) if is_trained else by_bucket(samples)
        missing = missing_words(samples) if is_trained else ()
        sets.append(
            SetReport(
                name,
                scan.num_images,
                num_used=len({sample.picture.path for sample in samples if not sample.is_preserved}),
                bad=list(map(shared, scan.bad)),
                damaged=list(map(shared, damaged)),
                skipped=list(map(shared, scan.skipped)),
                warnings=list(map(shared, scan.warnings)),
                duplicates=[list(map(shared, group)) for group in duplicates(samples)],
                num_masked=len({sample.picture.path for sample in samples if sample.has_mask}),
                buckets=collect_buckets(samples, batch_sizes, shown, pictures),
                captions=caption_stats(captions[name].values(), known),
                kinds={kind: list(map(shared, files)) for kind, files in caption_kinds(samples).items()},
                missing=[replace(each, images=list(map(shared, each.images))) for each in missing],
            )
        )
    return sets


def collect_buckets(
    samples: Iterable[Sample], batch_sizes: BatchSizes, shown: Mapping[BucketKey, Sequence[object]],
    pictures: Mapping[BucketKey, Sequence[Thumbnail]],
) -> list[Bucket]:  # fmt: skip
    """Return the buckets of a set, without their costs; `shown` is what the first epoch shows of each."""
    found = []
    for (resolution, size), members in by_bucket(samples).items():
        width = batch_size_for(batch_sizes, resolution)
        lacks = short_by(len(shown.get((resolution, size), ())), width)
        found.append(Bucket(resolution, size, len(members), width, lacks, pictures[resolution, size]))
    return found


def lr_curve(schedule: Schedule, warmup_steps: int, num_steps: int) -> list[tuple[int, float]]:
    """Return (step, factor on the learning rates) for some steps of a run, evenly spread."""
    steps = evenly_to_last(range(num_steps), CURVE_POINTS)
    return [(step, lr_factor(schedule, step, num_steps, warmup_steps)) for step in steps]


def by_bucket(samples: Iterable[Sample]) -> dict[BucketKey, list[Sample]]:
    """Return the samples by resolution and size, in that order."""
    buckets: dict[BucketKey, list[Sample]] = defaultdict(list)
    for sample in samples:
        buckets[sample.resolution, sample.size].append(sample)
    return dict(sorted(buckets.items()))


def duplicates(samples: Iterable[Sample]) -> list[list[str]]:
    """Return groups of files that hold the same bytes."""
    paths: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        paths[sample.picture.sha256].add(str(sample.picture.path))
    return sorted(sorted(group) for group in paths.values() if len(group) > 1)


def thumbnails(
    seed: int | None, samples: Sequence[Sample], number: int
) -> tuple[dict[BucketKey, list[Thumbnail]], list[str]]:
    """Return some of the pictures of each bucket, at most `number` in all, and "path: reason" for damaged ones.

    The seed is that of the run; None for evaluation, where captions do not vary.
    """
    buckets = by_bucket(samples)
    chosen = evenly(list(buckets), number)
    share = number // max(1, len(chosen))
    drawn: dict[BucketKey, list[Thumbnail]] = {bucket: [] for bucket in buckets}
    damaged = []
    work = [(bucket, sample) for bucket in chosen for sample in evenly(buckets[bucket], share)]
    pool = concurrent.futures.ThreadPoolExecutor(NUM_THREADS)
    try:
        results = [(bucket, sample, pool.submit(thumbnail, sample, seed)) for bucket, sample in work]
        for bucket, sample, future in results:
            try:
                drawn[bucket].append(future.result())
            except BadImage as error:
                damaged.append(f"{sample.picture.path}: {error}")
    finally:
        pool.shutdown(cancel_futures=True)  # so that Ctrl-C does not wait for all that is left
    return drawn, list(dict.fromkeys(damaged))  # once, not for every resolution


def thumbnail(sample: Sample, seed: int | None) -> Thumbnail:
    """Return the picture of a sample, small, with its caption as it is written and as the model may be given it.

    Raises:
        BadImage: its pixels are damaged, or those of its mask.
    """
    image = decode(content_of(sample.picture.source))
    size, crop, small, mask_leaves = image.size, sample.views()[0].crop, shrunk(image, THUMBNAIL_SIDE), None
    if sample.has_mask:
        weights = mask_image(sample)
        small, mask_leaves = tinted(small, weights), float(mask_to_latent(weights, crop).mean())
    texts = [*filter(None, sample.picture.tags), *sample.picture.natural, ""]
    written = texts[0]
    captions = [sample.evaluation_caption()] if seed is None else [sample.caption(seed, k) for k in range(MAX_GIVEN)]
    given = dict.fromkeys(caption.text for caption in captions)
    box = cover_box(size, crop)
    return Thumbnail(
        sample.picture.path.name,
        written,
        [text for text in given if text != written],
        *size,
        box,
        sample.size.width / (box[2] - box[0]),
        small_jpeg(small, THUMBNAIL_SIDE),
        mask_leaves,
    )


def tinted(image: Image.Image, weights: Image.Image) -> Image.Image:
    """Return the image with what a mask hides in grey and `MASKED`."""
    covered = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, MASKED), 0.6)
    return Image.composite(image, covered, weights.resize(image.size, Image.Resampling.BOX))
