"""Fills the cache: latents and masks of every sample, conditions of every caption.

The VAE and the text encoder are loaded only when something is missing, and freed before the transformer is loaded.
Processes that fill one cache, ranks or not, share the work by claims: each begins elsewhere, makes what nobody has
claimed, and waits at the end only for what another live process is making.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from anima_train.caching.entries import (
    Needed,
    is_damaged,
    missing,
)
from anima_train.caching.sizes import (
    cache_needs,
    text_bytes,
    view_bytes,
)
from anima_train.caching.text_encoding import ConditionEncoder, Say, report_truncated
from anima_train.core.device import free
from anima_train.core.errors import SpaceError
from anima_train.core.files import DiskRequirement, require_space
from anima_train.data.cache import Claims
from anima_train.data.images import (
    BadImage,
    Unreadable,
)
from anima_train.data.loader import Entry, Source, read_ahead
from anima_train.data.samples import View
from anima_train.data.sources.archive import Stored
from anima_train.data.workers import MaskWork, PixelWork, Workers, num_workers
from anima_train.model.llm_adapter import LLMAdapterShape
from anima_train.model.loading import ModelFiles
from anima_train.model.text import (
    count_tokens,
    load_tokenizers,
)
from anima_train.model.vae import load_vae, to_pixels

POLL = 0.5  # seconds between looks at what other processes are making
MESSAGE_EVERY = 60.0  # seconds

CACHE_REMEDY = "free some space, or set cache_dir and output_dir to folders of larger disks that can be written"


@dataclass(frozen=True)
class Share:
    """Which of the processes of a run this one is."""

    rank: int
    world_size: int
    local_world_size: int  # processes on this machine

    def rotated(self, items: Sequence) -> list:
        """All items; each process begins at another one."""
        start = len(items) * self.rank // self.world_size
        return [*items[start:], *items[:start]]


@dataclass(frozen=True)
class Encoded:
    """What filling the cache did."""

    num_latents: int
    num_masks: int
    num_texts: int


def share_out(
    entries: Sequence[Entry[Source]], make: Callable[[Iterator[Entry[Source]]], None], claims: Claims, say: Say
) -> None:
    """Have every entry made: those that nobody has claimed by `make`, the others by whoever does.

    Nothing waits for another process while this one has claimed anything, so that no two wait for each other.

    Raises:
        SpaceError: the cache cannot be written; says what is still needed.
    """
    pending = list(entries)
    while pending:
        busy: list[Entry[Source]] = []
        try:
            make(claimed(pending, busy, claims))
        except SpaceError as error:
            problems = list(error.problems)
            if size := sum(view_bytes(entry) for entry in entries if not entry.is_done):
                problems.append(f"the latents that are missing need about {size:,} bytes")
            raise SpaceError(problems) from error
        pending = wait_for_others(busy, say)


def claimed(entries: Iterable[Entry[Source]], busy: list[Entry[Source]], claims: Claims) -> Iterator[Entry[Source]]:
    """The entries that could be claimed; those that another process is making go to `busy`."""
    for entry in entries:
        if entry.is_done:
            continue
        if not claims.take(entry.cache, entry.key):
            busy.append(entry)
        elif entry.is_done:  # its maker finished between the two looks
            claims.release(entry.cache, entry.key)
        else:
            yield entry


def wait_for_others(busy: Sequence[Entry[Source]], say: Say) -> list[Entry[Source]]:
    """Wait until all these are done, and return none; or until one is given up, and return what is not done."""
    last_message = time.monotonic()
    while left := [entry for entry in busy if not entry.is_done]:
        makers = {entry.cache.claimant(entry.key) for entry in left}
        if None in makers:
            return left
        if time.monotonic() - last_message >= MESSAGE_EVERY:
            last_message = time.monotonic()
            names = ", ".join(sorted(name for name in makers if name is not None))
            say(f"waiting for {len(left):,} cache entries that {names} is making")
        time.sleep(POLL)
    return []


def content_or_path(file: Path | Stored) -> Path | bytes:
    """What a worker process reads itself, or what it is given."""
    return file if isinstance(file, Path) else file.read()


def pixels(view: View, workers: Workers) -> np.ndarray | BadImage:
    """A view's pixels, (h, w, 3) uint8, or the reason why there are none."""
    picture = view.sample.picture
    try:
        return workers.run(PixelWork(view.sample.id, content_or_path(picture.source), picture.sha256, view.crop))
    except BadImage as error:
        return error


def mask(view: View, workers: Workers) -> np.ndarray | BadImage:
    """A view's mask, (1, h // 8, w // 8) float32, or the reason why there is none."""
    sample = view.sample
    picture = sample.picture
    try:
        work = MaskWork(
            name=sample.id,
            mask=None if picture.mask_source is None else content_or_path(picture.mask_source),
            image=content_or_path(picture.source) if sample.masks_alpha else None,
            mask_sha256=picture.mask_sha256,
            image_sha256=picture.sha256,
            image_size=(picture.width, picture.height),
            crop=view.crop,
        )
        return workers.run(work)
    except BadImage as error:
        return error


def reject(entry: Entry[View], error: BadImage) -> None:
    """Remember why an entry cannot be made: for this run, if a later one may read its file."""
    entry.cache.reject(entry.key, str(error), for_now=isinstance(error, Unreadable))


def encode_latents(
    missing: Sequence[Entry[View]], path: Path, device: torch.device, dtype: torch.dtype, batch_size: int,
    progress: bool, workers: Workers, claims: Claims, say: Say,
) -> int:  # fmt: skip
    """Encode and store these latents; images that cannot be decoded are rejected with the reason. Returns how many."""
    if not missing:
        return 0
    num_encoded = 0
    load = functools.cache(lambda: load_vae(path, dtype, device))  # not at all if others make everything
    bar = tqdm(total=len(missing), desc="latents", unit="image", disable=not progress)

    def store(batch: Sequence[tuple[Entry[View], np.ndarray]]) -> None:
        nonlocal num_encoded
        stacked = torch.from_numpy(np.stack([value for _, value in batch])).to(device)
        for (entry, _), latents in zip(batch, load().encode(to_pixels(stacked)).cpu(), strict=True):
            if bool(latents.isfinite().all()):
                entry.cache.save("latent", entry.key, {"latents": latents.clone()})
                num_encoded += 1
            else:
                entry.cache.reject(entry.key, "its latents are not finite")
            claims.release(entry.cache, entry.key)

    def make(entries: Iterator[Entry[View]]) -> None:
        batch: list[tuple[Entry[View], np.ndarray]] = []
        for entry, value in decoded(entries, pixels, workers, batch_size):
            bar.update()
            if isinstance(value, BadImage):
                reject(entry, value)
                claims.release(entry.cache, entry.key)
                continue
            if batch and (len(batch) == batch_size or batch[0][0].source.sample.size != entry.source.sample.size):
                store(batch)
                batch = []
            batch.append((entry, value))
        if batch:
            store(batch)

    share_out(missing, make, claims, say)
    bar.close()
    load.cache_clear()
    free(device)
    return num_encoded


def decoded(
    entries: Iterator[Entry[View]], work: Callable[[View, Workers], np.ndarray | BadImage], workers: Workers,
    batch_size: int = 1,
) -> Iterator[tuple[Entry[View], np.ndarray | BadImage]]:  # fmt: skip
    """Entries with what workers make of their views, in order; a batch and more is ready ahead."""
    num_threads = max(workers.num_threads, batch_size)
    return read_ahead(entries, lambda entry: (entry, work(entry.source, workers)), num_threads=num_threads)


def encode_masks(missing: Sequence[Entry[View]], workers: Workers, claims: Claims, say: Say) -> int:
    """Store these masks; a mask that cannot be decoded rejects its image. Returns how many."""
    num_stored = 0

    def make(entries: Iterator[Entry[View]]) -> None:
        nonlocal num_stored
        for entry, value in decoded(entries, mask, workers):
            if isinstance(value, BadImage):
                reject(entry, value)
            else:
                entry.cache.save("mask", entry.key, {"mask": torch.from_numpy(value)})
                num_stored += 1
            claims.release(entry.cache, entry.key)

    share_out(missing, make, claims, say)
    return num_stored


def encode_texts(
    missing: Sequence[Entry[str]], load: Callable[[], ConditionEncoder], device: torch.device, batch_size: int,
    progress: bool, claims: Claims, say: Say,
) -> int:  # fmt: skip
    """Encode and store these captions' conditions. Returns how many."""
    num_encoded = 0
    load = functools.cache(load)  # not at all if others make everything
    bar = tqdm(total=len(missing), desc="captions", unit="caption", disable=not progress)

    def make(entries: Iterator[Entry[str]]) -> None:
        nonlocal num_encoded
        while chunk := list(islice(entries, batch_size)):
            for entry, tensors in zip(chunk, load().encode([entry.source for entry in chunk]), strict=True):
                entry.cache.save("text", entry.key, tensors)
                claims.release(entry.cache, entry.key)
                num_encoded += 1
            bar.update(len(chunk))

    share_out(missing, make, claims, say)
    bar.close()
    load.cache_clear()
    free(device)
    return num_encoded


def fill_cache(
    needed: Needed, files: ModelFiles, with_adapter: bool, share: Share, device: torch.device,
    text_device: torch.device, dtype: torch.dtype, batch_size: int, progress: bool, say: Say,
    also: Sequence[DiskRequirement] = (),
) -> Encoded:  # fmt: skip
    """Make every missing entry, together with all other processes that do so; returns when none is missing.

    Args:
        needed: from `needed_entries`.
        files: the model's files.
        with_adapter: whether texts are the LLM adapter's output.
        share: which process this is.
        device: where the VAE runs.
        text_device: where the text encoder runs.
        dtype: what the VAE computes in, and conditions are stored in; latents are float32.
        batch_size: images and captions at once.
        progress: whether to show bars.
        say: gets a line about truncated captions.
        also: what will be written after it, and must have room beside it.

    Raises:
        SpaceError: a disk will not hold it; nothing is encoded.
    """
    # Captions of similar length together: little padding.
    texts = sorted(missing(needed.texts), key=lambda entry: len(entry.source))
    tokenizers = load_tokenizers(files.tokenizer, files.t5_tokenizer) if texts else None
    lengths = {}
    if tokenizers is not None and share.rank == 0:
        lengths = count_tokens(tokenizers, (entry.source for entry in texts))
    latents = sorted(missing(needed.latents), key=lambda entry: entry.source.sample.size)  # batches have one size
    masks = missing(needed.masks)
    if share.rank == 0:  # right after the looks: the other processes begin to write
        shape = LLMAdapterShape.of(files.adapter_header.entries)
        widths = (shape.source_width, shape.target_width)
        sizes = [(entry, view_bytes(entry)) for entry in (*latents, *masks)]
        text_sizes = [
            (entry, text_bytes(lengths[entry.source], with_adapter, *widths, dtype.itemsize)) for entry in texts
        ]
        require_space([*cache_needs([*sizes, *text_sizes]), *also], CACHE_REMEDY)
    if latents or masks or texts:
        for cache in needed.caches():
            with contextlib.suppress(SpaceError):  # what is to be written next will tell it better
                cache.note_schema()
    number = num_workers(len(latents) + len(masks), share.local_world_size)
    with Claims() as claims, Workers(number) as workers:
        num_latents = encode_latents(
            share.rotated(latents), files.vae, device, dtype, batch_size, progress, workers, claims, say
        )
        num_masks = encode_masks(share.rotated(masks), workers, claims, say)
        num_texts = 0
        if tokenizers is not None:
            if share.rank == 0:
                report_truncated(lengths, say)
            num_texts = encode_texts(
                share.rotated(texts), lambda: ConditionEncoder(files, with_adapter, tokenizers, text_device, dtype),
                text_device, batch_size, progress, claims, say,
            )  # fmt: skip
    return Encoded(num_latents, num_masks, num_texts)


def verify_cache(needed: Needed, share: Share) -> tuple[int, int]:
    """Read this process's share of the entries and remove those that are damaged; returns how many of each."""
    num_read = num_damaged = 0
    with Claims() as claims:
        for entry in needed.entries[share.rank :: share.world_size]:
            if not entry.cache.path(entry.kind, entry.key).exists():
                continue
            num_read += 1
            if not is_damaged(entry):
                continue
            num_damaged += 1
            # Looked at again under a claim: another process may have found and rebuilt it meanwhile.
            if claims.take(entry.cache, entry.key):
                if is_damaged(entry):
                    entry.cache.remove(entry.kind, entry.key)
                claims.release(entry.cache, entry.key)
    return num_read, num_damaged
