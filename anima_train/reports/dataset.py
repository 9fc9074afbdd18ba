"""The report of a dataset before the run, collected into plain values; `dataset_page` draws it."""

import concurrent.futures
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from anima_train.caching.entries import needed_entries
from anima_train.caching.sizes import CacheCost, TextFormat, cache_costs
from anima_train.config.config import Config
from anima_train.core.device import DTYPES
from anima_train.core.format import format_duration
from anima_train.data.buckets import Size
from anima_train.data.image_headers import BadImage
from anima_train.data.images import cover_box, decode
from anima_train.data.loader import TextIdentity
from anima_train.data.plan import EpochSchedule, Plan, batch_size_for, short_by, times_seen
from anima_train.data.samples import Sample
from anima_train.data.scan import Scan
from anima_train.data.sources.archive import content_of
from anima_train.model.text import Tokenizers
from anima_train.optim.groups import GroupRow
from anima_train.optim.lr_schedules import lr_factor
from anima_train.reports.captions import CaptionStats, Missing, caption_stats, missing_words, tokenized
from anima_train.reports.html import small_jpeg
from anima_train.reports.places import places_of, shared_text
from anima_train.reports.series import evenly, evenly_to_last
from anima_train.training.costs import (
    Measured,
    MemoryCost,
    ModelStats,
    estimated_seconds,
    memory_cost,
    memory_suggestions,
)

MAX_THUMBNAILS = 160
THUMBNAIL_SIDE = 160  # pixels, the longer one
CURVE_POINTS = 200
ANY_MODEL = TextIdentity("", "", "", "", "")  # the number and sizes of cache entries are those of every model
NUM_THREADS = 4  # each holds a whole decoded image, of up to 400 MB


@dataclass(frozen=True)
class Thumbnail:
    """A small picture, and the part of the image that is trained."""

    name: str
    caption: str
    width: int  # of the image
    height: int
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels of the image
    scale: float  # from the image to the bucket; above 1 it is enlarged
    jpeg: str  # base64


@dataclass(frozen=True)
class Bucket:
    """The images of one size, and their costs."""

    resolution: int
    size: Size
    num_images: int
    batch_size: int
    short_by: int  # images that the last batch of the first epoch lacks
    memory: MemoryCost | None  # None: not trained
    measured: Measured | None  # counts instead of `memory`
    savings: Sequence[str]  # what to change where memory ran out
    thumbnails: Sequence[Thumbnail]


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
    buckets: Sequence[Bucket]
    captions: CaptionStats
    missing: Sequence[Missing]  # only of the training set


@dataclass(frozen=True)
class DatasetReport:
    """The whole report."""

    title: str
    notes: Sequence[str]
    sets: Sequence[SetReport]  # the training set first
    exposures: Sequence[tuple[int, int]]  # (times seen in the run, samples)
    steps_per_epoch: int  # of the first
    num_steps: int
    curve: Sequence[tuple[int, float]]  # (step, factor on the learning rates)
    groups: Sequence[GroupRow]
    cache: Sequence[CacheCost]
    run_seconds: float | None  # None where nothing was measured, or memory ran out

    @property
    def run_time(self) -> str:
        """The time of the whole run, and what it leaves out; "" without an estimate."""
        if self.run_seconds is None:
            return ""
        return (
            f"about {format_duration(self.run_seconds)} in one process, without caching, evaluation and saving (an "
            "estimate from what was measured)"
        )


def collect(
    title: str, config: Config, notes: Sequence[str], scans: Mapping[str, Scan], plan: Plan, timetable: EpochSchedule,
    groups: Sequence[GroupRow], tokenizers: Tokenizers, model: ModelStats, max_thumbnails: int,
    measured: Sequence[Measured],
) -> DatasetReport:  # fmt: skip
    """Return the report, for which captions are tokenized and some of the pictures decoded.

    Args:
        title: of the report.
        config: of the run.
        notes: about keys without effect.
        scans: by the dataset's name; "train" is trained.
        plan: of the run.
        timetable: of the run.
        groups: the trained components.
        tokenizers: of the model.
        model: for the costs.
        max_thumbnails: pictures in the whole report; 0 decodes no image.
        measured: instead of the estimates, for some of the training set's buckets.
    """
    captions = {
        name: [
            sample.captions(config.seed) if name == "train" else [sample.evaluation_caption().text]
            for sample in found.samples
        ]
        for name, found in scans.items()
    }
    known = tokenized(tokenizers, ["", *(text for lists in captions.values() for texts in lists for text in texts)])
    refs = plan.refs_by_bucket(0)
    costs = {(each.size, each.batch_size): each for each in measured}
    # The page may be shown to others, so it names no folder of this machine.
    shared = partial(shared_text, places=[str(Path.home() / "x"), *places_of(config.model_dump())])
    sets = []
    for name, found in scans.items():
        is_trained = name == "train"
        sizes = config.batch_sizes() if is_trained else config.eval_batch_sizes()
        small, damaged = thumbnails(config.seed, found.samples, max_thumbnails // len(scans))
        buckets = []
        for (resolution, size), members in by_bucket(found.samples).items():
            width = batch_size_for(sizes, resolution)
            shown = len(refs[resolution, size] if is_trained else members)
            memory = memory_cost(config, model, size, width) if is_trained else None
            cost = costs.get((size, width)) if is_trained else None
            ran_out = cost is not None and cost.seconds_per_step is None
            advice = memory_suggestions(config, resolution, width, model.num_text_weights > 0) if ran_out else []
            pictures = small[resolution, size]
            buckets.append(
                Bucket(resolution, size, len(members), width, short_by(shown, width), memory, cost, advice, pictures)
            )
        texts_of = {sample.picture.path: texts for sample, texts in zip(found.samples, captions[name], strict=True)}
        sets.append(
            SetReport(
                name,
                found.num_images,
                len(texts_of),
                list(map(shared, found.bad)),
                list(map(shared, damaged)),
                list(map(shared, found.skipped)),
                list(map(shared, found.warnings)),
                [list(map(shared, group)) for group in duplicates(found.samples)],
                buckets,
                caption_stats(texts_of.values(), known),
                [
                    replace(each, images=list(map(shared, each.images)))
                    for each in (missing_words(found.samples) if is_trained else ())
                ],
            )
        )
    steps = evenly_to_last(range(timetable.num_steps), CURVE_POINTS)
    curve = [(step, lr_factor(config.lr_scheduler, step, timetable.num_steps, config.warmup_steps)) for step in steps]
    evals = [sample for name, found in scans.items() if name != "train" for sample in found.samples]
    entries = needed_entries(
        scans["train"].samples, evals, "", ANY_MODEL, config.seed, config.uncond_fraction > 0,
        config.model.cache_text_embeddings,
    )  # fmt: skip
    text_format = TextFormat(
        config.learning_rates().by_component["llm_adapter"] == 0, model.source_width, model.context_width,
        DTYPES[config.model.dtype].itemsize,
    )  # fmt: skip
    seen = times_seen(plan, timetable, timetable.num_steps)
    num_tokens = sum(times * sample.size.num_tokens for times, sample in zip(seen, plan.samples, strict=True))
    return DatasetReport(
        title, list(map(shared, notes)), sets, sorted(Counter(seen).items()), plan.steps_in(0), timetable.num_steps,
        curve, groups,
        cache_costs(entries, known.lengths, text_format),
        estimated_seconds(measured, plan.micro_batches_per_step, timetable.num_steps, num_tokens),
    )  # fmt: skip


def by_bucket(samples: Iterable[Sample]) -> dict[tuple[int, Size], list[Sample]]:
    """Return the samples by resolution and size, in that order."""
    buckets: dict[tuple[int, Size], list[Sample]] = defaultdict(list)
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
    seed: int, samples: Sequence[Sample], number: int
) -> tuple[dict[tuple[int, Size], list[Thumbnail]], list[str]]:
    """Return some of the pictures of each bucket, at most `number` in all, and "path: reason" for damaged ones."""
    buckets = by_bucket(samples)
    chosen = evenly(list(buckets), number)
    share = number // max(1, len(chosen))
    drawn: dict[tuple[int, Size], list[Thumbnail]] = {bucket: [] for bucket in buckets}
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


def thumbnail(sample: Sample, seed: int) -> Thumbnail:
    """Return the picture of a sample, small.

    Raises:
        BadImage: its pixels are damaged.
    """
    image = decode(content_of(sample.picture.source))
    box = cover_box(image.size, sample.views()[0].crop)
    return Thumbnail(
        sample.picture.path.name,
        sample.captions(seed)[0],
        *image.size,
        box,
        sample.size.width / (box[2] - box[0]),
        small_jpeg(image, THUMBNAIL_SIDE),
    )
