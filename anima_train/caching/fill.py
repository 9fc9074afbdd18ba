"""Fills the cache: latents and masks of every sample, conditions of every caption.

The VAE and the text encoder are loaded only if something is missing, and freed before the transformer is loaded. The
processes of a run share the work: each makes every n-th missing entry. Runs that need the same cache take turns, by its
lock, so that each finds what the one before it has made.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from anima_train.caching.batches import (
    Decoded,
    batches_of_one_size,
    caption_batch_size,
    encoded,
    image_batch_size,
    num_pixels,
)
from anima_train.caching.entries import CacheEntries, missing_entries
from anima_train.caching.sizes import TextFormat, cache_needs, view_bytes
from anima_train.caching.text_encoding import CaptionEncoder, truncated
from anima_train.caching.writer import EntryWriter, Made, Rejected
from anima_train.core.device import release_memory
from anima_train.core.errors import SpaceError
from anima_train.core.files import DiskRequirement, require_space
from anima_train.core.transfers import HostCopy, to_device
from anima_train.data.cache import Cache, DamagedEntry
from anima_train.data.decoding import mask, num_decoding_threads, pixels
from anima_train.data.image_headers import BadImage, Unreadable
from anima_train.data.loader import Entry, read_ahead
from anima_train.data.samples import View
from anima_train.model.loading import ModelSpec
from anima_train.model.text import TokenCounts, Tokenizers, count_tokens
from anima_train.model.vae import load_vae, to_pixels

logger = logging.getLogger(__name__)

ENCODING = "cache: encoding %s, up to %d at once"
CACHE_REMEDY = "free some space, or set cache_dir and output_dir to folders of larger disks that can be written"

Decode = Callable[[View], np.ndarray]


@dataclass(frozen=True)
class RankInfo:
    """The place of this process among those of its run."""

    rank: int
    world_size: int
    local_rank: int  # on this machine
    local_world_size: int

    @property
    def is_main(self) -> bool:
        """True for the process that speaks, and takes locks, for all."""
        return self.rank == 0


def fill_cache(
    needed: CacheEntries, model: ModelSpec, ranks: RankInfo, batch_size: int | None, meet: Callable[[], None],
    first_files: Sequence[DiskRequirement] = (),
) -> Counter[str]:  # fmt: skip
    """Make every missing entry, together with the other processes of the run; return when none is missing.

    Args:
        needed: from `needed_entries`.
        model: the VAE computes in its dtype, latents are float32.
        ranks: of this process.
        batch_size: images and captions at once; None: chosen for the device.
        meet: returns when all processes of the run have called it.
        first_files: that will be written after it, and must have room beside it.

    Returns:
        The number of "latents", "masks" and "texts" that this process has made.

    Raises:
        SpaceError: a disk will not hold it, and nothing is encoded; or the cache cannot be written.
    """
    if ranks.is_main:  # before any process of the run writes
        for cache in needed.caches():
            cache.remove_unfinished()
    missing = missing_entries(needed)
    tokenizers = model.files.load_tokenizers() if missing.texts else None
    if ranks.is_main:
        for message in truncated(require_room(missing, model, tokenizers, first_files), missing.owners):
            logger.warning(message)
    made: Counter[str] = Counter()
    with contextlib.ExitStack() as locks, name_missing_latents(missing.latents):
        if ranks.is_main:
            lock_all(missing.caches(), locks)
        # After the first turn a process still misses what others have made on a disk that it does not see, on another
        # machine. All look before one makes anything, so that all who see the same disk share the same list.
        for index, number in ((ranks.rank, ranks.world_size), (ranks.local_rank, ranks.local_world_size)):
            meet()
            missing = missing_entries(missing)
            meet()
            made += make_entries(missing.share(index, number), model, tokenizers, ranks, batch_size)
        meet()
    return made


def require_room(
    missing: CacheEntries, model: ModelSpec, tokenizers: Tokenizers | None, first_files: Sequence[DiskRequirement]
) -> Mapping[str, TokenCounts]:
    """Check that the disks have room for missing entries, and return the lengths of their captions.

    Args:
        missing: the entries.
        model: that makes them.
        tokenizers: its own; None where no caption is missing.
        first_files: that will be written after them, and must have room beside them.

    Raises:
        SpaceError: a disk will not hold it.
    """
    texts = (entry.source for entry in missing.texts)
    lengths = {} if tokenizers is None else count_tokens(tokenizers, texts, model.max_tokens)
    require_space([*cache_needs(missing, lengths, TextFormat.of(model)), *first_files], CACHE_REMEDY)
    return lengths


def lock_all(caches: Iterable[Cache], locks: contextlib.ExitStack) -> None:
    """Take the locks of these caches, in the same order everywhere, so that no two runs wait for each other.

    Raises:
        SpaceError: a cache cannot be written.
    """
    by_folder = {cache.folder.resolve(): cache for cache in caches}  # two links to one folder are one lock
    for _, cache in sorted(by_folder.items(), key=lambda item: item[0]):
        locks.enter_context(cache.locked())


@contextlib.contextmanager
def name_missing_latents(latents: Sequence[Entry[View]]) -> Iterator[None]:
    """Add to a `SpaceError` how many bytes the latents that are still missing need."""
    try:
        yield
    except SpaceError as error:
        num_bytes = sum(view_bytes(entry) for entry in latents if not entry.is_done)
        if num_bytes == 0:
            raise
        raise SpaceError([*error.problems, f"the latents that are missing need about {num_bytes:,} bytes"]) from error


def make_entries(
    entries: CacheEntries, model: ModelSpec, tokenizers: Tokenizers | None, ranks: RankInfo, batch_size: int | None
) -> Counter[str]:
    """Make these entries, and return the number of each kind; all are on the disk then.

    Raises:
        SpaceError: the cache cannot be written.
    """
    for cache in entries.caches():
        with contextlib.suppress(SpaceError):  # what is to be written next will tell it better
            cache.note_schema()
    num_threads = num_decoding_threads(ranks.local_world_size)
    progress = ranks.is_main and logger.isEnabledFor(logging.INFO)
    with EntryWriter() as writer:
        if entries.latents:
            encode_latents(entries.latents, model, batch_size, num_threads, progress, writer)
            release_memory(model.device)
        if entries.masks:
            store_masks(entries.masks, num_threads, writer)
        if entries.texts:
            assert tokenizers is not None
            encode_texts(entries.texts, model, tokenizers, batch_size, progress, writer)
            release_memory(model.text_device)
    return writer.made


def decoded(
    entries: Iterable[Entry[View]], decode: Decode, num_threads: int, writer: EntryWriter, batch_size: int = 1
) -> Iterator[Decoded]:
    """Yield entries, in order, with what threads decode for them; reject those whose image cannot be used.

    A rejected entry is tried again by the next run if its file could not be read, or has changed.

    Args:
        entries: latents or masks.
        decode: `pixels` or `mask`.
        num_threads: that decode.
        writer: writes why an entry is rejected.
        batch_size: a batch is decoded ahead.
    """

    def attempt(entry: Entry[View]) -> tuple[Entry[View], np.ndarray | BadImage]:
        try:
            return entry, decode(entry.source)
        except BadImage as error:
            return entry, error

    for entry, found in read_ahead(entries, attempt, num_threads=num_threads, num_ahead=batch_size):
        if isinstance(found, BadImage):
            writer.put(Rejected(entry, str(found), isinstance(found, Unreadable)))
        else:
            yield entry, found


def encode_latents(
    entries: Sequence[Entry[View]], model: ModelSpec, batch_size: int | None, num_threads: int, progress: bool,
    writer: EntryWriter,
) -> None:  # fmt: skip
    """Encode these latents and have them written; images that cannot be used are rejected with the reason."""
    device = model.device
    vae = load_vae(model.files.vae, model.dtype, device)
    at_once = image_batch_size(batch_size, device, vae.encoder.conv_in.out_channels, model.dtype.itemsize)
    sizes = {entry.source.sample.size for entry in entries}
    most = max(at_once.number(each.width * each.height) for each in sizes)
    logger.info(ENCODING, "latents", most)

    def encode(batch: Sequence[Decoded]) -> HostCopy:
        stacked = to_device(torch.from_numpy(np.stack([value for _, value in batch])), device)
        return HostCopy(vae.encode(to_pixels(stacked)))

    with tqdm(entries, desc="latents", unit="image", disable=not progress) as bar:
        for batch in batches_of_one_size(decoded(bar, pixels, num_threads, writer, most), at_once):
            for part, latents in encoded(batch, encode, at_once, device, num_pixels(batch[0][1])):
                made = [{"latents": each} for each in latents.values]
                writer.put(Made([entry for entry, _ in part], made, latents))


def store_masks(entries: Sequence[Entry[View]], num_threads: int, writer: EntryWriter) -> None:
    """Have these masks written; a mask that cannot be decoded rejects its image."""
    for entry, value in decoded(entries, mask, num_threads, writer):
        writer.put(Made([entry], [{"mask": torch.from_numpy(value)}]))


def encode_texts(
    entries: Sequence[Entry[str]], model: ModelSpec, tokenizers: Tokenizers, batch_size: int | None, progress: bool,
    writer: EntryWriter,
) -> None:  # fmt: skip
    """Encode these captions and have their conditions written."""
    device = model.text_device
    encoder = CaptionEncoder(model, tokenizers)
    at_once = caption_batch_size(batch_size, device, model.files.caption_bytes(model.max_tokens))
    logger.info(ENCODING, "captions", at_once.number())

    def encode(batch: Sequence[Entry[str]]) -> list[dict[str, Tensor]]:
        return encoder.encode([entry.source for entry in batch])

    with tqdm(total=len(entries), desc="captions", unit="caption", disable=not progress) as bar:
        for part, made in encoded(entries, encode, at_once, device):
            writer.put(Made(part, made))
            bar.update(len(part))


def verify_cache(needed: CacheEntries, ranks: RankInfo) -> tuple[int, int]:
    """Read this process's share of the entries, remove those that are damaged, and return the numbers of both.

    Raises:
        SpaceError: a damaged one cannot be removed.
    """
    num_read = num_damaged = 0
    for entry in needed.share(ranks.rank, ranks.world_size).entries:
        path = entry.cache.path(entry.kind, entry.key)
        if not path.exists():
            continue
        num_read += 1
        try:
            entry.cache.load(entry.kind, entry.key)
        except DamagedEntry:
            num_damaged += 1
            try:
                entry.cache.remove(entry.kind, entry.key)
            except OSError as error:
                raise SpaceError(f"cache folder {entry.cache.folder}: {path} could not be removed: {error}") from error
    return num_read, num_damaged
