"""Captions to conditions: in batches for the cache, and one at a time, ahead of use, for captions drawn at random."""

import contextlib
import functools
import logging
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from anima_train.core.errors import ModelFileError
from anima_train.core.format import Listing, count
from anima_train.core.text_batch import pad_states
from anima_train.data.samples import Sample
from anima_train.model.loading import ModelSpec
from anima_train.model.text import TokenCounts, Tokenizers, tokenize

logger = logging.getLogger(__name__)

NUM_REMEMBERED = 64  # conditions of captions; two resolutions of an image often want the same


class CaptionEncoder:
    """The text encoder and, where it is frozen, what makes contexts of its states (the LLM adapter), both in float32.

    Args:
        model: to be loaded.
        tokenizers: of the model.

    Raises:
        ModelFileError: a file cannot be loaded.
    """

    def __init__(self, model: ModelSpec, tokenizers: Tokenizers) -> None:
        self.path = model.files.llm
        self.tokenizers = tokenizers
        self.device = model.text_device
        self.dtype = model.dtype
        self.max_tokens = model.max_tokens
        self.text_encoder = model.files.load_text_encoder(tokenizers, self.device, model.text_quantization)
        self.conditioner = (
            None if model.trains_llm_adapter else model.files.load_conditioner(torch.float32, self.device)
        )

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """Return the conditions of these captions as they are cached: unpadded, on the CPU.

        Raises:
            ModelFileError: a caption is encoded to NaN.
        """
        encoded = self.text_encoder.encode(
            [tokenize(self.tokenizers, caption, self.max_tokens) for caption in captions]
        )
        if self.conditioner is None:
            tensors = [{"qwen": text.source.to(self.dtype), "t5_ids": text.t5_ids} for text in encoded]
        else:
            states = pad_states(encoded).to(self.device)
            contexts = self.conditioner(states.source, states.t5_ids, states.source_mask, states.t5_mask).cpu()
            rows = zip(contexts, encoded, strict=True)
            tensors = [{"context": row[: len(text.t5_ids)].to(self.dtype)} for row, text in rows]
        for caption, entry in zip(captions, tensors, strict=True):
            if not all(bool(tensor.isfinite().all()) for tensor in entry.values()):
                raise ModelFileError(f"{self.path}: the caption {caption[:60]!r} is encoded to NaN; the file is broken")
        return tensors


def encodes_online(cache_text_embeddings: bool, samples: Iterable[Sample]) -> bool:
    """Return True if captions are encoded during training."""
    return not cache_text_embeddings or any(sample.options.draws_tags for sample in samples)


class OnlineTextEncoder:
    """A caption encoder that the loader's threads call while the model trains.

    One caption at a time, so that a caption's conditions do not depend on which others are encoded with it: a resumed
    run, or one on more processes, sees the same. On CUDA in a stream of its own, beside the training step.
    """

    def __init__(self, encoder: CaptionEncoder) -> None:
        self.encoder = encoder
        self.lock = threading.Lock()
        self.stream = torch.cuda.Stream(encoder.device) if encoder.device.type == "cuda" else None
        self.remembered = functools.lru_cache(NUM_REMEMBERED)(self.encode)

    def __call__(self, caption: str) -> Mapping[str, Tensor]:
        """Return the conditions of a caption, as they would be cached."""
        with self.lock:
            return self.remembered(caption)

    def encode(self, caption: str) -> Mapping[str, Tensor]:
        """Return the same, without a look at what is remembered."""
        with contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            return self.encoder.encode([caption])[0]


def truncated(lengths: Mapping[str, TokenCounts], owners: Mapping[str, Sequence[Sample]]) -> Iterator[Listing]:
    """Yield, for each folder, a message about its images with captions of which the model reads only a part.

    Args:
        lengths: of the captions.
        owners: the samples that each of them is of.
    """
    found: dict[Path, dict[str, int]] = defaultdict(dict)  # tokens that the image's longest caption loses
    for caption, length in lengths.items():
        for sample in owners.get(caption, ()) if length.lost else ():
            files = found[sample.folder]
            files[sample.file] = max(length.lost, files.get(sample.file, 0))
    for folder, files in found.items():
        most = next(length.max_tokens for length in lengths.values())
        yield Listing.naming_first(
            f"{folder}: images with a caption that is longer than model.max_caption_tokens = {most} and loses its end "
            f"(up to {max(files.values()):,} tokens)",
            [f"{file} ({count(lost, 'token')})" for file, lost in sorted(files.items())],
        )
