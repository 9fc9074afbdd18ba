"""Cache entries written behind the encoder, by a thread of its own."""

import collections
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from torch import Tensor

from anima_train.core.background import BackgroundThread
from anima_train.core.transfers import HostCopy
from anima_train.data.cache import CacheFile, write_files
from anima_train.data.loader import Entry
from anima_train.data.samples import View

MAX_WAITING = 8  # batches: a slow disk holds the encoder up instead of filling the memory
PATIENCE = 5.0  # seconds that Ctrl-C waits for files that are being written
NAMES = {"latent": "latents", "mask": "masks", "text": "texts"}  # of what is counted


@dataclass(frozen=True)
class Made:
    """The values of a batch of entries, perhaps still on their way from the device."""

    entries: Sequence[Entry[View] | Entry[str]]
    values: Sequence[Mapping[str, Tensor]]  # of each entry, on the host
    copy: HostCopy | None = None  # that they are views of; None: they are there

    def files(self, made: Counter[str]) -> Iterator[CacheFile]:
        """Wait for the values and yield what is to be written; latents that are not finite are rejected.

        Args:
            made: counts the entries of each kind.
        """
        if self.copy is not None:
            self.copy.wait()
        for entry, tensors in zip(self.entries, self.values, strict=True):
            if entry.kind == "latent" and not bool(tensors["latents"].isfinite().all()):
                yield entry.cache.rejection_file(entry.key, "its latents are not finite")
            else:
                yield entry.cache.entry_file(entry.kind, entry.key, tensors)
                made[NAMES[entry.kind]] += 1


@dataclass(frozen=True)
class Rejected:
    """An entry that cannot be made; see `Cache.rejection_file`."""

    entry: Entry[View]
    reason: str
    for_now: bool

    def files(self, made: Counter[str]) -> Iterator[CacheFile]:
        """Yield the file that says so."""
        yield self.entry.cache.rejection_file(self.entry.key, self.reason, self.for_now)


class EntryWriter(BackgroundThread):
    """The thread that writes entries, so that the encoder never waits for the disk.

    Whatever waits is written together, for one wait for the disk (`write_files`): the slower the disk, the more at
    once. A failure ends the filling: it is raised by the next `put`, or on leaving, and nothing is written after it.
    On leaving, everything is written; after Ctrl-C only what is being written.
    """

    def __init__(self) -> None:
        super().__init__("cache writer", MAX_WAITING)
        self.waiting: collections.deque[Made | Rejected] = collections.deque()
        self.made: Counter[str] = Counter()  # entries of each kind that are written
        self.has_failed = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not issubclass(kind, Exception):
            self.waiting.clear()
            self.close(PATIENCE)
        super().__exit__(kind, error, trace)

    def put(self, batch: Made | Rejected) -> None:
        """Have a batch written; wait if too many are waiting.

        Raises:
            SpaceError: a batch before it could not be written.
        """
        self.check()
        self.waiting.append(batch)
        self.submit(self.write)

    def write(self) -> None:
        """Write all that waits, together; nothing once a write has failed."""
        batches = []
        while self.waiting:
            batches.append(self.waiting.popleft())
        if not batches or self.has_failed:
            return
        made: Counter[str] = Counter()
        try:
            write_files([file for batch in batches for file in batch.files(made)])
        except BaseException:
            self.has_failed = True
            raise
        self.made += made
