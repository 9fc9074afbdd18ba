"""The bytes that cache entries take."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch

from anima_train.core.files import BLOCK, DiskRequirement, on_disk
from anima_train.core.format import count
from anima_train.core.shapes import LATENT_CHANNELS, LATENT_PIXELS
from anima_train.data.buckets import Size
from anima_train.data.loader import Entry
from anima_train.data.samples import View
from anima_train.model.text import (
    MAX_TOKENS,
    TokenCounts,
)

ENTRY_HEADER = 256  # bytes of an entry beside its tensors, at most
NUM_CLAIMS = 32  # files that may lie in a cache while it is filled, beside its entries


def latent_bytes(size: Size) -> int:
    """Bytes of a latent's tensor."""
    return LATENT_CHANNELS * mask_bytes(size)


def mask_bytes(size: Size) -> int:
    """Bytes of a mask's tensor: one float32 for each place of the latent."""
    return (size.width // LATENT_PIXELS) * (size.height // LATENT_PIXELS) * torch.float32.itemsize


def text_bytes(length: TokenCounts, with_adapter: bool, source_width: int, context_width: int, value_bytes: int) -> int:
    """Bytes of a caption's tensors.

    Args:
        length: of the caption.
        with_adapter: whether they are the LLM adapter's output, or what a trained one reads.
        source_width: of the Qwen3 states.
        context_width: of the LLM adapter's output.
        value_bytes: of each number.
    """
    rows = min(length.t5, MAX_TOKENS)
    if with_adapter:
        return rows * context_width * value_bytes
    num_id_bytes = 8
    return min(length.qwen, MAX_TOKENS) * source_width * value_bytes + rows * num_id_bytes


def view_bytes(entry: Entry) -> int:
    """Bytes of a latent's or mask's tensor; 0 for a caption."""
    if not isinstance(entry.source, View):
        return 0
    size = entry.source.sample.size
    return latent_bytes(size) if entry.kind == "latent" else mask_bytes(size)


def cache_needs(sizes: Iterable[tuple[Entry, int]]) -> list[DiskRequirement]:
    """What missing entries will take of the disk, for each cache.

    Args:
        sizes: entries, with the bytes of their tensors.
    """
    num_bytes: dict[Path, int] = defaultdict(int)
    numbers: dict[Path, int] = defaultdict(int)
    folders: dict[Path, set[Path]] = defaultdict(set)
    for entry, size in sizes:
        cache = entry.cache
        num_bytes[cache.folder] += on_disk(size + ENTRY_HEADER)
        numbers[cache.folder] += 1
        folders[cache.folder].add(cache.path(entry.kind, entry.key).parent)
    return [
        DiskRequirement(
            folder,
            num_bytes[folder] + (len(folders[folder]) + NUM_CLAIMS) * BLOCK,
            count(number, "missing cache entry", "missing cache entries"),
        )
        for folder, number in numbers.items()
    ]
