"""The data of a run, ready before its model is loaded: images looked at, everything in the cache."""

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

from accelerate import Accelerator
from accelerate.utils import gather_object

from anima_train.adapters.choice import AnyAdapter
from anima_train.caching.entries import (
    CacheEntries,
    model_text_identity,
    needed_entries,
    vae_identity,
    without_rejected,
)
from anima_train.caching.fill import RankInfo, fill_cache, verify_cache
from anima_train.caching.text_encoding import CaptionEncoder, OnlineTextEncoder, encodes_online, truncated
from anima_train.checkpoint.disk_space import first_requirements
from anima_train.checkpoint.manifest import SavedState
from anima_train.checkpoint.samples import check_same_samples
from anima_train.config.loaded import Dataset, LoadedConfig
from anima_train.config.memory_advice import cache_suggestions
from anima_train.config.model_files import build_model_spec
from anima_train.config.sections import EvalDataset, Role
from anima_train.core.errors import DataError
from anima_train.core.files import DiskRequirement
from anima_train.core.format import Listing, count, prefixed
from anima_train.data.cache import SCHEMA, Cache
from anima_train.data.loader import CachedData
from anima_train.data.plan import BatchSizes
from anima_train.data.samples import Sample, exact
from anima_train.data.scan import Scan, scan
from anima_train.distributed.collectives import broadcast_from_main, main_process_first, patient_barrier
from anima_train.distributed.consistency import check_same_data
from anima_train.evaluation.base_drawn import draw_missing, split_undrawn, stand_ins, undrawn
from anima_train.evaluation.evaluate import EvalSet
from anima_train.model.loading import ModelSpec
from anima_train.model.text import count_tokens
from anima_train.optim.groups import LearningRates
from anima_train.training.build import check_blocks, file_sizes, initial_lora
from anima_train.training.memory import MemoryContext, memory_errors
from anima_train.training.summary import data_messages, trained_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """The data of a run: everything in the cache."""

    spec: ModelSpec
    train: CachedData
    evals: list[EvalSet]
    warnings: list[str]  # about images and captions
    unusable: list[Sample]  # of the training set, found while they were encoded


def prepare_data(
    loaded: LoadedConfig, accelerator: Accelerator, prune: bool = False, verify: bool = False, trains: bool = False,
    saved: SavedState | None = None,
) -> Prepared:  # fmt: skip
    """Find the model's files, look at the images, and fill the cache.

    Args:
        loaded: the configuration.
        accelerator: device and processes.
        prune: remove from the cache what this configuration does not need, first.
        verify: read every entry, and rebuild those that are damaged.
        trains: True if a run follows, whose first files must have room beside the cache.
        saved: the state that the run goes on from.

    Raises:
        DataError: the dataset is not that of the state; nothing is encoded.
    """
    config, is_main = loaded.config, bool(accelerator.is_main_process)
    datasets = loaded.datasets
    caches = list({cache.folder: cache for dataset in datasets for cache in dataset.caches}.values())  # each once
    with main_process_first(accelerator):  # one process downloads and reads the images, the others find it done
        spec = build_model_spec(config, accelerator.device)
        if trains:
            blocks = config.blocks_to_swap, config.checkpointed_blocks
            check_blocks(*blocks, config.adapter, spec, accelerator.num_processes)
            tell_what_trains(config.adapter, config.learning_rates(), spec, begins=saved is None)
        scans = look_at_all(datasets, config.seed, spec, is_main)
        if is_main:
            for cache in caches:
                cache.retry()
    patient_barrier(accelerator)  # the others have looked at the images too
    warnings = tell_scans(scans)
    check_same_data(scans, accelerator)
    note_newer_entries(caches)

    vae_id, samples = vae_identity(spec.files), scans["train"].samples
    if saved is not None:
        known, _ = without_rejected(samples, vae_id)
        broadcast_from_main(accelerator, partial(check_same_samples, saved, known, config.adapter, spec.files))
    text_id = model_text_identity(spec)
    needed = needed_entries(
        samples,
        chain.from_iterable(found.samples for name, found in scans.items() if name != "train"),
        vae_id, text_id, config.seed, config.uncond_fraction > 0, config.model.cache_text_embeddings,
        loaded.preservation,
    )  # fmt: skip
    ranks = rank_info(accelerator)
    clean(caches if prune and is_main else (), needed, verify, ranks, accelerator)
    first = []
    if trains and is_main:
        sizes = file_sizes(config, spec, samples)
        first = first_requirements(Path(config.output_dir) / loaded.run_name, sizes, config.saves_states)
    fill_all(needed, spec, ranks, config.caching_batch_size, config.model.text_encoder_device, accelerator, first)

    sets, bad = usable_sets(datasets, scans, vae_id)
    rest = (vae_id, text_id, config.seed, config.model.cache_text_embeddings)
    data = {name: CachedData(kept, *rest) for name, kept in sets.items()}
    evals = eval_sets(config.eval_datasets, data, config.eval_batch_sizes(), config.measures_drift)
    train = replace(data["train"], preservation=loaded.preservation)
    return Prepared(spec, train, evals, warnings + bad, left_out(samples, sets["train"]))


def look_at_all(datasets: Sequence[Dataset], seed: int, spec: ModelSpec, is_main: bool) -> dict[str, Scan]:
    """Look at every image of all sets; the main process first has the base model draw those that begin with captions.

    Raises:
        DataError: as `scan_all`; where images are wrong, nothing is drawn.
    """
    ready, undrawn = split_undrawn(datasets)
    if undrawn and is_main:
        scan_all(ready, seed, write=True)
    if is_main:
        advice = ["a smaller width and height in pictures of the evaluation set"]
        with memory_errors(spec.device, MemoryContext("drawing with the base model"), lambda _: advice):
            draw_missing(datasets, spec)
    return scan_all(datasets, seed, write=is_main)


def tell_what_trains(adapter: AnyAdapter, rates: LearningRates, spec: ModelSpec, begins: bool) -> None:
    """Tell what is trained where that may be a surprise; of a run that begins, check the LoRA that it begins with."""
    for line in trained_text(adapter, rates, spec):
        logger.info("%s", line)
    if begins:
        initial_lora(adapter, spec, rates)


def rank_info(accelerator: Accelerator) -> RankInfo:
    """Return the place of this process among those of its run."""
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return RankInfo(
        accelerator.process_index, accelerator.num_processes, accelerator.local_process_index, local_size
    )  # fmt: skip


def clean(
    pruned: Iterable[Cache], needed: CacheEntries, verify: bool, ranks: RankInfo, accelerator: Accelerator
) -> None:
    """Remove what is not needed from these caches, and what is damaged, if that is asked for."""
    if pruned := list(pruned):
        prune_caches(pruned, needed)
    if verify:
        remove_damaged(needed, ranks, accelerator)


def fill_all(
    needed: CacheEntries, spec: ModelSpec, ranks: RankInfo, batch_size: int | None,
    text_encoder_device: Literal["training", "cpu"], accelerator: Accelerator, first_files: Sequence[DiskRequirement],
) -> None:  # fmt: skip
    """Fill the caches, and tell what was made; where memory runs out, what to change. Arguments as of `fill_cache`."""
    suggestions = cache_suggestions(batch_size, text_encoder_device)
    with memory_errors(accelerator.device, MemoryContext("filling the cache"), lambda _: suggestions):
        made = fill_cache(needed, spec, ranks, batch_size, partial(patient_barrier, accelerator), first_files)
    numbers = [f"{number:,}" for number in sum_over_ranks(made[kind] for kind in ("latents", "masks", "texts"))]
    logger.info("cache: %s latents, %s masks and %s texts added", *numbers)


def tell_scans(scans: Mapping[str, Scan]) -> list[str]:
    """Tell what was found in every dataset, and return the warnings for the run's records."""
    warnings: list[str] = []
    for name, found in scans.items():
        for message in data_messages(name, found):
            logger.info(message)
        told = [*(f"cannot be used: {line}" for line in found.bad), *found.warnings]
        warnings.extend(prefixed(f"dataset {name}: ", message) for message in told)
    return warnings


def note_newer_entries(caches: Iterable[Cache]) -> None:
    """Tell about entries that only a newer version reads."""
    for cache in caches:
        if (newest := cache.newest_schema()) > SCHEMA:
            text = "note: %s holds entries of a newer anima-train (schema %d, this one writes %d); they are ignored"
            logger.info(f"{text}, and left alone", cache.folder, newest, SCHEMA)


def prune_caches(caches: Iterable[Cache], needed: CacheEntries) -> None:
    """Remove from the caches what is not needed."""
    keys = needed.by_cache()
    removed = [cache.prune({entry.key for entry in keys.get(cache.folder, [])}) for cache in caches]
    num_files, num_bytes = map(sum, zip(*removed, strict=True))
    logger.info("cache: %s removed, %s bytes freed", count(num_files, "file"), f"{num_bytes:,}")


def remove_damaged(needed: CacheEntries, ranks: RankInfo, accelerator: Accelerator) -> None:
    """Read every entry, and remove those that are damaged; all processes meet here."""
    numbers = verify_cache(needed, ranks)
    patient_barrier(accelerator)  # before the first look for what is missing
    num_read, num_damaged = sum_over_ranks(numbers)
    read = count(num_read, "entry", "entries")
    logger.info("cache: %s read, %d damaged and removed to be rebuilt", read, num_damaged)


def sum_over_ranks(numbers: Iterable[int]) -> list[int]:
    """Return the sum over all processes of each number; all of them meet here."""
    return [sum(column) for column in zip(*gather_object([tuple(numbers)]), strict=True)]


def with_online_text_encoder(data: Prepared, caches_texts: bool, seed: int) -> Prepared:
    """Return the data with a text encoder for those captions that are not in the cache, if there are any."""
    samples, spec = data.train.samples, data.spec
    if not encodes_online(caches_texts, samples):
        return data
    encoder = CaptionEncoder(spec, spec.files.load_tokenizers())
    logger.info("captions are encoded during training, on %s", encoder.device)
    online = [each for each in samples if each.options.draws_tags or not caches_texts]
    owners: dict[str, list[Sample]] = defaultdict(list)
    for sample in online:
        for caption in sample.captions(seed):
            owners[caption].append(sample)
    for message in truncated(count_tokens(encoder.tokenizers, sorted(owners), spec.max_tokens), owners):
        logger.warning(message)
    encode = OnlineTextEncoder(encoder)
    evals = [replace(eval_set, data=replace(eval_set.data, encode=encode)) for eval_set in data.evals]
    return replace(data, train=replace(data.train, encode=encode), evals=evals)


def eval_sets(
    entries: Iterable[EvalDataset], data: Mapping[str, CachedData], batch_sizes: BatchSizes,
    measures_drift: Callable[[EvalDataset], bool],
) -> list[EvalSet]:  # fmt: skip
    """Return the evaluation sets with their data.

    Args:
        entries: of the configuration.
        data: by the sets' names.
        batch_sizes: for evaluation.
        measures_drift: True for sets on which the distance from the base is measured.
    """
    return [
        EvalSet(each.name, data[each.name], batch_sizes, each.role, each.points(), measures_drift(each))
        for each in entries
    ]


def usable_sets(
    datasets: Iterable[Dataset], scans: Mapping[str, Scan], vae_id: str
) -> tuple[dict[str, list[Sample]], list[str]]:
    """Return what `usable` returns of each set: the samples by the sets' names, and the warnings of all.

    Raises:
        DataError: as `usable`.
    """
    sets, warnings = {}, []
    for dataset in datasets:
        if dataset.name not in scans:  # its samples are among those that are trained
            continue
        sets[dataset.name], bad = usable(
            dataset.name, scans[dataset.name], dataset.settings.max_bad_fraction, vae_id
        )  # fmt: skip
        warnings.extend(bad)
    return sets, warnings


def left_out(samples: Iterable[Sample], kept: Iterable[Sample]) -> list[Sample]:
    """Return the samples that are not among those that are kept."""
    names = {sample.id for sample in kept}
    return [sample for sample in samples if sample.id not in names]


def usable(name: str, found: Scan, max_bad_fraction: float, vae_id: str) -> tuple[list[Sample], list[str]]:
    """Return the samples whose latents could be made, and a warning for each of the others, which is told here.

    Raises:
        DataError: too many could not, or none is left.
    """
    kept, bad = without_rejected(found.samples, vae_id)
    if bad:
        logger.info(Listing(f"dataset {name}: cannot be used: {len(bad):,}", bad))
    try:
        Scan(kept, found.num_images, found.bad + bad, found.skipped).check(max_bad_fraction)
    except DataError as error:
        raise DataError([prefixed(f"dataset {name}: ", problem) for problem in error.problems]) from None
    return kept, [f"dataset {name}: cannot be used: {line}" for line in bad]


class RefusedData(DataError):
    """Datasets that cannot be used, with what was found in them."""

    def __init__(self, problems: str | Iterable[str], scans: Mapping[str, Scan] | None = None) -> None:
        super().__init__(problems)
        self.scans = scans or {}  # none where the error of another process is raised again


def scan_all(datasets: Sequence[Dataset], seed: int, write: bool) -> dict[str, Scan]:
    """Look at every image of the training set, which is the first, and the evaluation sets.

    Pictures that keep the base are counted among the samples of the training set.

    Raises:
        RefusedData: a set is empty, or too many of its images are bad; for all sets at once.
    """
    scans: dict[str, Scan] = {}
    problems: list[str] = []
    for each in datasets:
        try:
            if each.role == "preservation" and each.drawn is not None and undrawn(each.drawn):
                found = stand_ins(each)
            else:
                found = scan(each.settings, each.folders, each.masks, each.caches, seed, write, each.offline)
            if each.role == "preservation":
                found.check(each.settings.max_bad_fraction)
                if not problems:
                    scans["train"] = with_preserved(scans["train"], found, each.share)
                continue
            if "train" in scans:
                found = replace(
                    found, warnings=[*found.warnings, *overlap(each.role, scans["train"].samples, found.samples)]
                )
            scans[each.name] = found
            found.check(each.settings.max_bad_fraction)
        except DataError as error:
            problems.extend(prefixed(f"dataset {each.name}: ", problem) for problem in error.problems)
    if problems:
        raise RefusedData(problems, scans)
    return with_shared(scans, {each.name: each.role for each in datasets})


def with_shared(scans: Mapping[str, Scan], roles: Mapping[str, str]) -> dict[str, Scan]:
    """Return the scans with warnings of retention sets about images that are in a validation set, too."""
    found = dict(scans)
    for kept in (name for name in scans if roles[name] == "retention"):
        for learned in (name for name in scans if roles[name] == "validation" and name != "train"):
            known = {sample.picture.sha256 for sample in scans[learned].samples}
            shared = [sample.picture for sample in scans[kept].samples if sample.picture.sha256 in known]
            if files := list(dict.fromkeys(str(picture.path) for picture in shared)):
                text = (
                    f"{count(len(files), 'image is', 'images are')} in the evaluation set {learned} too, such as "
                    f"{files[0]}: what is learned of them counts as drift, and hides what is forgotten; remove them "
                    "from one of the two"
                )
                warning = Listing(text, files, num_shown=0)
                found[kept] = replace(found[kept], warnings=[*found[kept].warnings, warning])
    return found


def with_preserved(train: Scan, preserved: Scan, share: float) -> Scan:
    """Return the training set with the pictures that keep the base, as often as is their share of all samples."""
    first = 1 + max(sample.directory for sample in train.samples)
    part = exact(share)
    factor = part / (1 - part) * sum(sample.repeats for sample in train.samples) / len(preserved.samples)
    added = [
        replace(
            sample, id=f"preservation/{sample.options.kind}/{sample.id.partition('/')[2]}",
            directory=first + sample.directory, repeat_factor=factor, is_preserved=True,
        )
        for sample in preserved.samples
    ]  # fmt: skip
    return replace(train, samples=[*train.samples, *added], warnings=[*train.warnings, *preserved.warnings])


def overlap(role: Role, train: Iterable[Sample], evaluation: Iterable[Sample]) -> list[str]:
    """Return a warning if images of an evaluation set are in the training set, or are not, against the set's role.

    Images are compared by content, whatever the files are called.

    Raises:
        DataError: images that are to show what is forgotten are trained.
    """
    trained = {sample.picture.sha256 for sample in train}
    paths: dict[bool, dict[object, None]] = {True: {}, False: {}}
    for sample in evaluation:
        paths[sample.picture.sha256 in trained][sample.picture.path] = None
    wrong = list(paths[role != "train"])
    if not wrong:
        return []
    text, files = f"{count(len(wrong), 'image')} {'is' if len(wrong) == 1 else 'are'} ", list(map(str, wrong))
    if role == "train":
        text += f'not in the training set, such as {wrong[0]}: role = "train" is for images that are'
        return [Listing(text, files, num_shown=0)]
    text += f"in the training set too, such as {wrong[0]}"
    if role == "retention":
        text += '; role = "retention" is for images that have nothing to do with it: remove them there'
        raise DataError(Listing(text, files, num_shown=0))
    return [Listing(f"{text}; the loss on them shows memory, not quality", files, num_shown=0)]
