"""The cache entries that a dataset needs, and those of them that are missing."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from anima_train.core.files import sha256_file
from anima_train.core.text_batch import MAX_TOKENS
from anima_train.data.cache import Cache
from anima_train.data.loader import Entry, Source, TextIdentity
from anima_train.data.preservation import Preservation
from anima_train.data.samples import Sample, View
from anima_train.model.loading import ModelFiles, ModelSpec
from anima_train.model.safetensors_io import fingerprint
from anima_train.model.text import text_encoder_identity, tokenizer_identity
from anima_train.model.text_quantized import TextQuantization


@dataclass(frozen=True)
class CacheEntries:
    """Entries of the cache, each once."""

    latents: list[Entry[View]]
    masks: list[Entry[View]]
    texts: list[Entry[str]]
    owners: Mapping[str, Sequence[Sample]] = field(default_factory=dict)  # the samples that a caption is of

    @property
    def entries(self) -> list[Entry[View] | Entry[str]]:
        """All of them."""
        return [*self.latents, *self.masks, *self.texts]

    def caches(self) -> list[Cache]:
        """Return their caches, each once."""
        return list({entry.cache.folder: entry.cache for entry in self.entries}.values())

    def by_cache(self) -> dict[Path, list[Entry[View] | Entry[str]]]:
        """Return the entries of each cache, by its folder."""
        found: dict[Path, list[Entry[View] | Entry[str]]] = defaultdict(list)
        for entry in self.entries:
            found[entry.cache.folder].append(entry)
        return found

    def share(self, index: int, number: int) -> "CacheEntries":
        """Return every `number`-th entry of each kind, from `index` on."""
        parts = (self.latents[index::number], self.masks[index::number], self.texts[index::number])
        return CacheEntries(*parts, self.owners)


def vae_identity(files: ModelFiles) -> str:
    """Return the hash of what latents depend on beside image and size."""
    return sha256_file(files.vae)


def text_identity(
    files: ModelFiles, apply_llm_adapter: bool, dtype: torch.dtype, quantization: TextQuantization | None = None,
    max_tokens: int = MAX_TOKENS,
) -> TextIdentity:  # fmt: skip
    """Return the hashes of what conditions depend on beside the caption.

    Args:
        files: the model's files.
        apply_llm_adapter: True if the LLM adapter's output is cached, False if what it reads.
        dtype: of the cached values.
        quantization: of the text encoder.
        max_tokens: of a caption that are read.
    """
    return TextIdentity(
        encoder=text_encoder_identity(files.llm) + ("" if quantization is None else f" in {quantization}"),
        tokenizer=tokenizer_identity(files.tokenizer),
        t5_tokenizer=tokenizer_identity(files.t5_tokenizer),
        adapter=fingerprint(files.llm_adapter_header) if apply_llm_adapter else "",
        dtype=str(dtype).removeprefix("torch."),
        max_tokens=max_tokens,
    )


def model_text_identity(spec: ModelSpec) -> TextIdentity:
    """Return `text_identity` of what a model's captions are encoded with."""
    return text_identity(
        spec.files, not spec.trains_llm_adapter, spec.dtype, spec.text_quantization, spec.max_tokens
    )  # fmt: skip


def needed_entries(
    train: Iterable[Sample], evals: Iterable[Sample], vae_id: str, text_id: TextIdentity, seed: int,
    empty_caption: bool, cache_texts: bool, preservation: Preservation | None = None,
) -> CacheEntries:  # fmt: skip
    """Return the entries that these samples need.

    Args:
        train: what is trained: all views, and all captions that are not drawn for a showing.
        evals: what the loss is measured on: one view and one caption each.
        vae_id: of the latents.
        text_id: of the captions.
        seed: of the run.
        empty_caption: True if samples may be trained with the empty caption.
        cache_texts: False if all captions are encoded during training.
        preservation: the captions with which training images keep the base.
    """
    latents: dict[tuple[Path, str], Entry[View]] = {}
    masks: dict[tuple[Path, str], Entry[View]] = {}
    texts: dict[tuple[Path, str], Entry[str]] = {}
    owners: dict[str, list[Sample]] = defaultdict(list)

    def need(sample: Sample, views: Iterable[View], captions: Iterable[str]) -> None:
        cache = sample.cache
        for view in views:
            key = view.latent_key(vae_id)
            latents.setdefault((cache.folder, key), Entry(cache, "latent", key, view))
            if sample.has_mask:
                key = view.mask_key()
                masks.setdefault((cache.folder, key), Entry(cache, "mask", key, view))
        for caption in captions if cache_texts else ():
            key = text_id.key(caption)
            texts.setdefault((cache.folder, key), Entry(cache, "text", key, caption))
            owners[caption].append(sample)

    shared = [""] if empty_caption else []
    for sample in train:
        kept = preservation.captions if preservation is not None and sample.role == "train" else ()
        need(sample, sample.views(), [*sample.fixed_captions(seed), *shared, *kept])
    for sample in evals:
        need(sample, sample.views()[:1], [sample.evaluation_caption().text])
    return CacheEntries(list(latents.values()), list(masks.values()), list(texts.values()), owners)


def missing_entries(needed: CacheEntries) -> CacheEntries:
    """Return the entries that have to be made, in the order in which they are made.

    Latents of one size are together, as those of a batch are; and captions of similar length, so that little is padded.
    """
    return CacheEntries(
        sorted(not_done(needed.latents), key=lambda entry: entry.source.sample.size),
        not_done(needed.masks),
        sorted(not_done(needed.texts), key=lambda entry: len(entry.source)),
        needed.owners,
    )


def not_done(entries: Sequence[Entry[Source]]) -> list[Entry[Source]]:
    """Return the entries that are not there, or shorter or longer than their headers say; not the rejected ones."""
    have: dict[Path, set[str]] = {}
    found = []
    for entry in entries:
        folder = entry.cache.folder
        if folder not in have:
            have[folder] = entry.cache.keys(entry.kind) | set(entry.cache.rejected())
        if entry.key not in have[folder] or not entry.is_done:
            found.append(entry)
    return found


def without_rejected(samples: Sequence[Sample], vae_id: str) -> tuple[list[Sample], list[str]]:
    """Return the samples whose latents exist, and "path: reason" for the others' images, which leave at every size."""
    reasons: dict[Path, dict[str, str]] = {}
    bad: dict[Path, str] = {}
    for sample in samples:
        folder = sample.cache.folder
        if folder not in reasons:
            reasons[folder] = sample.cache.rejected()
        for view in sample.views():
            for key in [view.latent_key(vae_id), *([view.mask_key()] if sample.has_mask else [])]:
                if key in reasons[folder]:
                    bad[sample.picture.path] = reasons[folder][key]
    kept = [sample for sample in samples if sample.picture.path not in bad]
    return kept, [f"{path}: {reason}" for path, reason in bad.items()]
