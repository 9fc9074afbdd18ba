"""Damaged cache entries are made again while the run that reads them goes on."""

import threading
from collections import deque

import torch
from tqdm import tqdm

from anima_train.caching.entries import is_damaged
from anima_train.caching.fill import encode_latents, encode_masks, encode_texts
from anima_train.caching.text_encoding import ConditionEncoder
from anima_train.core.errors import DataError, SpaceError
from anima_train.core.format import printable
from anima_train.data.cache import Claims
from anima_train.data.loader import Entry
from anima_train.data.samples import View
from anima_train.data.workers import Workers
from anima_train.model.loading import ModelFiles
from anima_train.model.text import load_tokenizers

ATTEMPTS = 3  # a disk that damages an entry again and again ends the run
CPU = torch.device("cpu")  # the device's memory belongs to the training


class Repair:
    """Makes an entry again, on the CPU: where the cache was filled on another device, equal up to rounding.

    Any thread of any process may call it; one at a time works, as it is rare.

    Args:
        files: of the model.
        with_adapter: whether texts are the LLM adapter's output.
        dtype: of the model, as in filling the cache.
    """

    def __init__(self, files: ModelFiles, with_adapter: bool, dtype: torch.dtype) -> None:
        self.files = files
        self.with_adapter = with_adapter
        self.dtype = dtype
        self.lock = threading.Lock()
        self.warnings: deque[str] = deque()  # of this process, that nobody has taken yet

    def __call__(self, entry: Entry, reason: str) -> None:
        """Make an entry again that is damaged; `reason` says how.

        Raises:
            DataError: its image is gone, or is another one.
            SpaceError: the cache cannot be written.
        """
        cache, key = entry.cache, entry.key
        name = entry.source.sample.id if isinstance(entry.source, View) else entry.source
        with self.lock, Claims() as claims:
            for _ in range(ATTEMPTS):
                if not is_damaged(entry):
                    return
                try:
                    if claims.take(cache, key):
                        if is_damaged(entry):  # still: another process may have made it just now
                            cache.remove(entry.kind, key)
                        claims.release(cache, key)
                    num_made = self.make(entry, claims)  # or waits for the process that makes it
                except (SpaceError, OSError) as error:
                    raise SpaceError(f"cache entry damaged: {reason}; it cannot be made again: {error}") from error
                if cache.rejection(key).exists():
                    why = f"{name}: {cache.rejected()[key]}"
                    raise DataError(f"cache entry damaged: {reason}; it cannot be made again: {why}")
                if num_made:
                    self.warn(f"cache entry damaged: {reason}; made again, of {name[:60]!r}")

    def make(self, entry: Entry, claims: Claims) -> int:
        """Make an entry that is not there; returns how many were made here: another process may be doing so."""
        if entry.kind == "text":
            tokenizers = load_tokenizers(self.files.tokenizer, self.files.t5_tokenizer)
            return encode_texts(
                [entry], lambda: ConditionEncoder(self.files, self.with_adapter, tokenizers, CPU, self.dtype),
                CPU, 1, False, claims, self.warn,
            )  # fmt: skip
        with Workers(0) as workers:
            if entry.kind == "mask":
                return encode_masks([entry], workers, claims, self.warn)
            return encode_latents([entry], self.files.vae, CPU, self.dtype, 1, False, workers, claims, self.warn)

    def warn(self, warning: str) -> None:
        """Tell it now, and keep it."""
        tqdm.write(printable(f"warning: {warning}"))
        self.warnings.append(warning)

    def take(self) -> list[str]:
        """The warnings since the last call; none is lost that another thread adds meanwhile."""
        return [self.warnings.popleft() for _ in range(len(self.warnings))]
