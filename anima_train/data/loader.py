"""Batches: cached latents and text with the noise and t of their address, read ahead by threads."""

import concurrent.futures
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Generic, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from anima_train.core.errors import DataError
from anima_train.core.random import stream, uniform
from anima_train.core.shapes import LATENT_PIXELS
from anima_train.core.tensor_fields import TensorFields
from anima_train.core.text_batch import (
    MAX_TOKENS,
    EncodedText,
    TextContext,
    TextStates,
    fold_rows,
    pad_states,
    row_bias,
)
from anima_train.data.cache import Cache, DamagedEntry, Kind, entry_key
from anima_train.data.plan import MicroBatch, SampleRef
from anima_train.data.preservation import Preservation
from anima_train.data.samples import EMPTY, ROLES, Caption, Sample, View

NUM_THREADS = 2
READ_AHEAD = 4  # items

Item = TypeVar("Item")
Result = TypeVar("Result")
Source = TypeVar("Source", View, str)


@dataclass(frozen=True)
class Batch(TensorFields):
    """The samples that the loss is computed on."""

    latents: Float[Tensor, "B 16 1 H W"]  # normalised, float32
    noise: Float[Tensor, "B 16 1 H W"]
    t: Float[Tensor, " B"]
    text: TextContext | TextStates  # the context, or what a trained LLM adapter reads
    mask: Float[Tensor, "B 1 1 H W"] | None
    names: tuple[str, ...]  # of the samples, for messages
    is_padding: bool = False  # True: repeats another one, to keep processes in step, and has no weight
    roles: Int[Tensor, " B"] | None = None  # indices into `ROLES`, where they matter
    preserved: Int[Tensor, " P"] | None = None  # the samples whose target is the base's velocity; None: no sample
    base_velocity: Float[Tensor, "P 16 1 H W"] | None = None  # theirs, once it is known
    weights: Float[Tensor, " B"] | None = None  # of the samples' losses; None: 1

    @property
    def size(self) -> int:
        """The number of samples in the batch."""
        return self.latents.shape[0]

    def at(self, rows: Int[Tensor, " P"]) -> "Batch":
        """Return these samples, as far as the model sees them; the rows are on the device of the batch."""
        latents, noise, t = (each.index_select(0, rows) for each in (self.latents, self.noise, self.t))
        return Batch(latents, noise, t, self.text.changed(lambda each: each.index_select(0, rows)), None, self.names)


@dataclass(frozen=True)
class TextIdentity:
    """All that a caption's cache entry depends on beside the caption."""

    encoder: str  # hash of the weights, and how they are quantised
    tokenizer: str
    t5_tokenizer: str
    adapter: str  # hash of the frozen adapter's weights; "" where it trains, and Qwen states are cached
    dtype: str
    max_tokens: int = MAX_TOKENS  # of a caption that are read

    def key(self, caption: str) -> str:
        """Return the cache key of a caption; the default is left out, so that older entries stay valid."""
        parts = {name: value for name, value in asdict(self).items() if (name, value) != ("max_tokens", MAX_TOKENS)}
        return entry_key("text", caption=caption, **parts)


Encode = Callable[[str], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Entry(Generic[Source]):
    """An entry that the data needs, and its source: a view of a picture, or a caption."""

    cache: Cache
    kind: Kind
    key: str
    source: Source

    @property
    def is_done(self) -> bool:
        """True if it is in the cache, or known to be impossible."""
        return self.cache.is_done(self.kind, self.key)

    @property
    def described(self) -> str:
        """Its image or caption, for messages."""
        if isinstance(self.source, View):
            return f"the image {self.source.sample.id}"
        return f"the caption {self.source[:60]!r}"


@dataclass(frozen=True)
class CachedData:
    """The samples of a dataset, everything of them in the cache but captions that are drawn anew for each repeat."""

    samples: Sequence[Sample]
    vae_identity: str
    text_identity: TextIdentity
    seed: int
    caches_texts: bool = True  # False: every caption is encoded when it is needed
    encode: Encode | None = None  # for captions that are not in the cache
    preservation: Preservation | None = None  # the samples whose target is the base's velocity; None: there are none

    def read(self, entry: Entry) -> dict[str, Tensor]:
        """Return an entry's tensors; remove a damaged one, so that the next start makes it again.

        Raises:
            DataError: it is damaged.
        """
        try:
            return entry.cache.load(entry.kind, entry.key)
        except DamagedEntry as error:
            try:
                entry.cache.remove(entry.kind, entry.key)
                remedy = "it was removed: start"
            except OSError as failure:
                remedy = f"it could not be removed ({failure.strerror}): remove it, then start"
            raise DataError(
                f"cache entry damaged: {error}; it is of {entry.described}; {remedy} again with the same command, "
                "which makes it again and resumes the run"
            ) from error

    def latents(self, view: View) -> Float[Tensor, "16 1 H W"]:
        """Return the latents of a view, float32."""
        return self.read(Entry(view.sample.cache, "latent", view.latent_key(self.vae_identity), view))["latents"]

    def masks(self, views: Sequence[View]) -> Float[Tensor, "B 1 1 H W"] | None:
        """Return the views' masks; ones where only some have one, None where none has."""
        if not any(view.sample.has_mask for view in views):
            return None
        return torch.stack([self.mask(view) for view in views])

    def mask(self, view: View) -> Float[Tensor, "1 1 H W"]:
        """Return a view's mask, ones without one."""
        sample = view.sample
        if not sample.has_mask:
            return torch.ones(1, 1, sample.size.height // LATENT_PIXELS, sample.size.width // LATENT_PIXELS)
        return self.read(Entry(sample.cache, "mask", view.mask_key(), view))["mask"][:, None]

    def weights(self, roles: Sequence[str]) -> Float[Tensor, " B"] | None:
        """Return the weights of samples, by their roles; None where all are 1."""
        if self.preservation is None or self.preservation.weight == 1:
            return None
        return torch.tensor([self.preservation.weight if role == "preservation" else 1.0 for role in roles])

    def text(self, captions: Sequence[tuple[Cache, Caption]]) -> TextContext | TextStates:
        """Return the captions' conditions, padded to a batch."""
        entries = [self.text_entry(cache, caption) for cache, caption in captions]
        if self.text_identity.adapter:
            contexts = [entry["context"] for entry in entries]
            return fold_rows(pad_sequence(contexts, batch_first=True), row_bias([len(each) for each in contexts]))
        return pad_states([EncodedText(entry["qwen"], entry["t5_ids"]) for entry in entries])

    def text_entry(self, cache: Cache, caption: Caption) -> Mapping[str, Tensor]:
        """Return a caption's conditions, cached or encoded now; which, does not depend on what is in the cache."""
        if caption.is_fixed and self.caches_texts:
            return self.read(Entry(cache, "text", self.text_identity.key(caption.text), caption.text))
        assert self.encode is not None
        return self.encode(caption.text)

    def batch(
        self,
        views: Sequence[View],
        captions: Sequence[Caption],
        t: Sequence[float],
        noise: Sequence[torch.Generator],
        is_padding: bool = False,
        keeps: Sequence[bool] = (),
    ) -> Batch:
        """Return a batch with these captions, noise levels and generators of the noise, one for each view.

        Args:
            views: of the samples.
            captions: as they are conditioned on.
            t: noise levels.
            noise: generators of it.
            is_padding: as in `Batch`.
            keeps: of each, True if its target is the base's velocity, whatever the sample is for; (): of none.
        """
        roles = [
            "preservation" if kept else view.sample.role
            for view, kept in zip(views, keeps or [False] * len(views), strict=True)
        ]
        preserved = [index for index, role in enumerate(roles) if role == "preservation"]
        mask = self.masks(views)
        if mask is not None and preserved:
            mask[preserved] = 1
        latents = torch.stack([self.latents(view) for view in views])
        samples = [view.sample for view in views]
        return Batch(
            latents=latents,
            noise=torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in noise]),
            t=torch.tensor(t, dtype=torch.float32),
            text=self.text([(sample.cache, caption) for sample, caption in zip(samples, captions, strict=True)]),
            mask=mask,
            names=tuple(sample.id for sample in samples),
            is_padding=is_padding,
            roles=torch.tensor([ROLES.index(role) for role in roles]),
            preserved=torch.tensor(preserved) if preserved else None,
            weights=self.weights(roles) if preserved else None,
        )

    def training_batch(
        self,
        micro_batch: MicroBatch,
        epoch: int,
        is_padding: bool,
        timestep: Callable[[float, int], float],
        uncond_fraction: float,
    ) -> Batch:
        """Return the batch of a planned micro-batch: everything random addressed by (epoch, sample, repeat).

        Args:
            micro_batch: from the plan.
            epoch: 0 the first.
            is_padding: as in `Batch`.
            timestep: (quantile, image tokens) -> t.
            uncond_fraction: share of the captions replaced by the empty one.
        """

        def address(kind: str, ref: SampleRef) -> tuple[str, int, str, int]:
            return kind, epoch, self.samples[ref.sample].id, ref.repeat

        def kept_caption(ref: SampleRef) -> Caption | None:
            if self.preservation is None:
                return None
            return self.preservation.caption(self.samples[ref.sample], self.seed, ref.repeat)

        kept = [kept_caption(ref) for ref in micro_batch.refs]

        def caption(ref: SampleRef) -> Caption:
            dropped = uniform(self.seed, *address("uncond", ref)) < uncond_fraction
            return EMPTY if dropped else self.samples[ref.sample].caption(self.seed, ref.repeat)

        return self.batch(
            [self.samples[ref.sample].view(self.seed, ref.repeat) for ref in micro_batch.refs],
            [own or caption(ref) for ref, own in zip(micro_batch.refs, kept, strict=True)],
            [timestep(uniform(self.seed, *address("t", ref)), micro_batch.size.num_tokens) for ref in micro_batch.refs],
            [stream(self.seed, *address("noise", ref)) for ref in micro_batch.refs],
            is_padding,
            [own is not None for own in kept],
        )


def read_ahead(
    items: Iterable[Item],
    make: Callable[[Item], Result],
    *,
    num_threads: int = NUM_THREADS,
    num_ahead: int = READ_AHEAD,
) -> Generator[Result, None, None]:
    """Yield `map(make, items)` in order, some results computed ahead by threads.

    Args:
        items: taken by the caller's thread.
        make: called by the threads.
        num_threads: 0: results are computed when they are wanted.
        num_ahead: results computed ahead, and at least two for each thread.
    """
    if num_threads == 0:
        yield from map(make, items)
        return
    ahead = max(num_ahead, 2 * num_threads)  # so that one slow item does not stop all threads
    pool = concurrent.futures.ThreadPoolExecutor(num_threads)
    pending: list[concurrent.futures.Future[Result]] = []
    try:
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) > ahead:
                yield pending.pop(0).result()
        while pending:
            yield pending.pop(0).result()
    finally:
        pool.shutdown(cancel_futures=True)
