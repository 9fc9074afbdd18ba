"""The data of a run, ready before its model is loaded: images looked at, everything in the cache."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from accelerate import Accelerator

from anima_train.caching.entries import needed_entries, text_identity, vae_identity, without_rejected
from anima_train.caching.fill import Share, fill_cache, verify_cache
from anima_train.caching.repair import Repair
from anima_train.caching.text_encoding import (
    LiveTexts,
    has_live_texts,
    live_encoder,
    report_truncated,
    text_device,
)
from anima_train.config.load import Dataset, LoadedConfig
from anima_train.config.model_files import find_model_files
from anima_train.core.device import DTYPES
from anima_train.core.errors import DataError
from anima_train.core.format import count, listed, printable
from anima_train.data.cache import SCHEMA, Cache
from anima_train.data.loader import CachedData
from anima_train.data.samples import Sample
from anima_train.data.scan import Scan, scan
from anima_train.distributed.consistency import check_same_data
from anima_train.evaluation.evaluate import EvalSet
from anima_train.model.loading import ModelFiles
from anima_train.model.text import count_tokens
from anima_train.training.build import first_files
from anima_train.training.costs import cache_suggestions
from anima_train.training.memory import MemoryContext, memory_errors
from anima_train.training.summary import data_text


@dataclass(frozen=True)
class Prepared:
    """The data of a run: everything in the cache."""

    files: ModelFiles
    train: CachedData
    evals: list[EvalSet]
    warnings: list[str]  # about images and captions
    repair: Repair


def prepare_data(
    loaded: LoadedConfig, accelerator: Accelerator, prune: bool = False, verify: bool = False, trains: bool = False
) -> Prepared:
    """Find the model's files, look at the images, and fill the cache.

    Args:
        loaded: the configuration.
        accelerator: device and processes.
        prune: remove from the cache what this configuration does not need, first.
        verify: read every entry, and rebuild those that are damaged.
        trains: whether a run follows, whose first files must have room beside the cache.
    """
    config = loaded.config
    with accelerator.main_process_first():  # one process downloads and reads the images, the others find it done
        files = find_model_files(loaded)
        files.check_headers()
        scans = scan_all(loaded, write=accelerator.is_main_process)
        if accelerator.is_main_process:
            for cache in caches_of(loaded):
                cache.retry()
    warnings: list[str] = []
    for name, found in scans.items():
        accelerator.print("\n".join(data_text(name, found)))
        bad = [f"cannot be used: {line}" for line in listed(found.bad)]
        warnings.extend(f"dataset {name}: {line}" for line in (*bad, *found.warnings))

    def warn(line: str) -> None:
        accelerator.print(line)
        warnings.append(line)

    check_same_data(scans, accelerator)
    for cache in caches_of(loaded):
        if (newest := cache.newest_schema()) > SCHEMA:
            accelerator.print(
                f"note: {printable(str(cache.folder))} holds entries of a newer anima-train (schema {newest}, this one "
                f"writes {SCHEMA}); they are ignored, and left alone"
            )
    vae_id = vae_identity(files)
    dtype = DTYPES[config.model.dtype]
    text_id = text_identity(files, config.learning_rates().by_component["llm_adapter"] == 0, dtype)
    train = scans["train"].samples
    needed = needed_entries(
        train,
        [sample for name, found in scans.items() if name != "train" for sample in found.samples],
        vae_id,
        text_id,
        config.seed,
        config.uncond_fraction > 0,
        config.model.cache_text_embeddings,
    )
    share = Share(accelerator.process_index, accelerator.num_processes, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if prune and accelerator.is_main_process:
        keys = needed.by_cache()
        removed = [cache.prune({entry.key for entry in keys.get(cache.folder, [])}) for cache in caches_of(loaded)]
        num_files, num_bytes = map(sum, zip(*removed, strict=True))
        accelerator.print(f"cache: {count(num_files, 'file')} removed, {num_bytes:,} bytes freed")
    if verify:
        num_read, num_damaged = verify_cache(needed, share)
        # Not `accelerator.print`: each process has read others.
        print(f"cache: {count(num_read, 'entry', 'entries')} read, {num_damaged:,} damaged and removed to be rebuilt")
    with memory_errors(accelerator.device, MemoryContext("filling the cache"), lambda _: cache_suggestions(config)):
        done = fill_cache(
            needed,
            files,
            bool(text_id.adapter),
            share,
            accelerator.device,
            text_device(config, accelerator.device),
            dtype,
            config.caching_batch_size,
            accelerator.is_main_process,
            accelerator.print,
            first_files(loaded, files) if trains and accelerator.is_main_process else [],
        )
    accelerator.wait_for_everyone()  # soon: no process comes here before all entries are there
    print(f"cache: {done.num_latents:,} latents, {done.num_masks:,} masks and {done.num_texts:,} texts added")
    repair = Repair(files, bool(text_id.adapter), dtype)
    bad_fractions = {dataset.name: dataset.settings.max_bad_fraction for dataset in (loaded.train, *loaded.evals)}
    data = {
        name: CachedData(
            usable(name, found, bad_fractions[name], vae_id, warn),
            vae_id,
            text_id,
            config.seed,
            config.model.cache_text_embeddings,
            remake=repair,
        )
        for name, found in scans.items()
    }
    evals = [EvalSet(dataset.name, data[dataset.name], config.eval_batch_sizes()) for dataset in loaded.evals]
    return Prepared(files, data["train"], evals, warnings, repair)


def caches_of(loaded: LoadedConfig) -> list[Cache]:
    """The caches of all datasets, each once."""
    datasets = (loaded.train, *loaded.evals)
    return list({cache.folder: cache for dataset in datasets for cache in dataset.caches}.values())


def with_live_texts(data: Prepared, loaded: LoadedConfig, accelerator: Accelerator) -> Prepared:
    """The data with a text encoder for those captions that are not in the cache, if there are any."""
    config, samples = loaded.config, data.train.samples
    if not has_live_texts(config, samples):
        return data
    encoder = live_encoder(loaded, data.files, accelerator.device)
    accelerator.print(f"captions are encoded during training, on {encoder.device}")
    if accelerator.is_main_process:
        live = [each for each in samples if each.options.draws_tags or not config.model.cache_text_embeddings]
        captions = sorted({caption for sample in live for caption in sample.captions(config.seed)})
        report_truncated(count_tokens(encoder.tokenizers, captions), print)
    encode = LiveTexts(encoder)
    evals = [replace(eval_set, data=replace(eval_set.data, encode=encode)) for eval_set in data.evals]
    return replace(data, train=replace(data.train, encode=encode), evals=evals)


def usable(name: str, found: Scan, max_bad_fraction: float, vae_id: str, warn: Callable[[str], None]) -> list[Sample]:
    """The samples whose latents could be made; there is a warning for each of the others.

    Raises:
        DataError: too many could not, or none is left.
    """
    kept, bad = without_rejected(found.samples, vae_id)
    for line in listed(bad):
        warn(f"dataset {name}: cannot be used: {line}")
    try:
        Scan(kept, found.num_images, found.bad + bad, found.skipped).check(max_bad_fraction)
    except DataError as error:
        raise DataError([f"dataset {name}: {problem}" for problem in error.problems]) from None
    return kept


def scan_dataset(dataset: Dataset, seed: int, write: bool) -> Scan:
    """Look at every image of a dataset; see `data.scan.scan`."""
    return scan(dataset.settings, dataset.folders, dataset.masks, dataset.caches, seed, write, dataset.offline)


def scan_all(loaded: LoadedConfig, write: bool) -> dict[str, Scan]:
    """Look at every image of the training set and the evaluation sets.

    Raises:
        DataError: a set is empty, or too many of its images are bad; for all sets at once.
    """
    scans = {}
    problems: list[str] = []
    for dataset in (loaded.train, *loaded.evals):
        try:
            scans[dataset.name] = scan_dataset(dataset, loaded.config.seed, write)
            scans[dataset.name].check(dataset.settings.max_bad_fraction)
        except DataError as error:
            problems.extend(f"dataset {dataset.name}: {problem}" for problem in error.problems)
    if problems:
        raise DataError(problems)
    train = scans[loaded.train.name]
    for dataset in loaded.evals:
        found = scans[dataset.name]
        scans[dataset.name] = replace(found, warnings=[*found.warnings, *overlap(train.samples, found.samples)])
    return scans


def overlap(train: Iterable[Sample], evaluation: Iterable[Sample]) -> list[str]:
    """A warning if images are in the training set and in an evaluation set, whatever the files are called."""
    trained = {sample.picture.sha256 for sample in train}
    both = list(dict.fromkeys(sample.picture.path for sample in evaluation if sample.picture.sha256 in trained))
    if not both:
        return []
    are = "is" if len(both) == 1 else "are"
    return [
        f"{count(len(both), 'image')} {are} in the training set too, such as {both[0]}; the loss on them shows memory, "
        "not quality"
    ]
