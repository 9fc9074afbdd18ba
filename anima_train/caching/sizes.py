"""The bytes that cache entries take."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from anima_train.caching.entries import CacheEntries
from anima_train.core.files import BLOCK, DiskRequirement, on_disk
from anima_train.core.format import count
from anima_train.core.shapes import LATENT_CHANNELS, LATENT_PIXELS
from anima_train.data.loader import Entry
from anima_train.data.samples import View
from anima_train.model.dit import TransformerShape
from anima_train.model.llm_adapter import LLMAdapterShape
from anima_train.model.loading import ModelSpec
from anima_train.model.text import TokenCounts

ENTRY_HEADER = 256  # bytes of an entry beside its tensors, at most
NUM_OTHER_FILES = 2  # in a cache beside its entries: the lock, and that of its schema


@dataclass(frozen=True)
class TextFormat:
    """The format in which conditions are cached, as far as their size depends on it."""

    apply_llm_adapter: bool  # True: what the transformer reads; False: what a trained LLM adapter reads
    source_width: int  # of the Qwen3 states, where these are cached
    context_width: int  # of what the transformer reads
    value_bytes: int  # of each number

    @classmethod
    def of(cls, model: ModelSpec) -> "TextFormat":
        """Return the format of a model's conditions."""
        context_width = TransformerShape.of(model.files.transformer_header.entries).context_width
        trains, entries = model.trains_llm_adapter, model.files.llm_adapter_header.entries
        return cls(
            not trains, LLMAdapterShape.of(entries).source_width if trains else 0, context_width, model.dtype.itemsize
        )

    def num_bytes(self, length: TokenCounts) -> int:
        """Return the bytes of the tensors of a caption of this length."""
        rows = min(length.t5, length.max_tokens)
        if self.apply_llm_adapter:
            return rows * self.context_width * self.value_bytes
        return min(length.qwen, length.max_tokens) * self.source_width * self.value_bytes + rows * torch.int64.itemsize


@dataclass(frozen=True)
class CacheCost:
    """The entries of one kind in the cache."""

    kind: str
    number: int
    num_bytes: int  # of the tensors


def view_bytes(entry: Entry[View]) -> int:
    """Return the bytes of a latent's or mask's tensor: one float32 for each place of the latent and each channel."""
    size = entry.source.sample.size
    channels = LATENT_CHANNELS if entry.kind == "latent" else 1
    return channels * (size.width // LATENT_PIXELS) * (size.height // LATENT_PIXELS) * torch.float32.itemsize


def entry_bytes(entry: Entry[View] | Entry[str], lengths: Mapping[str, TokenCounts], texts: TextFormat) -> int:
    """Return the bytes of an entry's tensors; arguments as of `cache_costs`."""
    if isinstance(entry.source, str):
        return texts.num_bytes(lengths[entry.source])
    return view_bytes(entry)


def cache_costs(entries: CacheEntries, lengths: Mapping[str, TokenCounts], texts: TextFormat) -> list[CacheCost]:
    """Return the number and bytes of the entries of each kind.

    Args:
        entries: of any model.
        lengths: of all their captions.
        texts: the format of their conditions.
    """
    kinds = (("latents", entries.latents), ("masks", entries.masks), ("captions", entries.texts))
    return [
        CacheCost(kind, len(found), sum(entry_bytes(entry, lengths, texts) for entry in found)) for kind, found in kinds
    ]


def cache_needs(missing: CacheEntries, lengths: Mapping[str, TokenCounts], texts: TextFormat) -> list[DiskRequirement]:
    """Return the room on the disk that missing entries need, for each cache; arguments as of `cache_costs`."""
    needs = []
    for folder, entries in missing.by_cache().items():
        folders = {entry.cache.path(entry.kind, entry.key).parent for entry in entries}
        num_bytes = sum(on_disk(entry_bytes(entry, lengths, texts) + ENTRY_HEADER) for entry in entries)
        num_bytes += (len(folders) + NUM_OTHER_FILES) * BLOCK
        what = count(len(entries), "missing cache entry", "missing cache entries")
        needs.append(DiskRequirement(folder, num_bytes, what))
    return needs
