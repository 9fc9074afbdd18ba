"""Captions to conditions: in batches for the cache, and one at a time, ahead of use, for captions drawn at random."""

import contextlib
import functools
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from anima_train.core.errors import ModelFileError
from anima_train.core.text_batch import pad_states
from anima_train.data.samples import Sample
from anima_train.model.loading import ModelSpec, load_llm_adapter
from anima_train.model.text import MAX_TOKENS, TokenCounts, Tokenizers, load_text_encoder, tokenize

logger = logging.getLogger(__name__)

NUM_REMEMBERED = 64  # conditions of captions; two resolutions of an image often want the same


class CaptionEncoder:
    """The text encoder and, where it is frozen, the LLM adapter, both in float32.

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
        self.text_encoder = load_text_encoder(model.files.llm, tokenizers, self.device, model.text_quantization)
        self.llm_adapter = (
            None if model.trains_llm_adapter else load_llm_adapter(model.files, torch.float32, self.device).eval()
        )

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """Return the conditions of these captions as they are cached: unpadded, on the CPU.

        Raises:
            ModelFileError: a caption is encoded to NaN.
        """
        encoded = self.text_encoder.encode([tokenize(self.tokenizers, caption) for caption in captions])
        if self.llm_adapter is None:
            tensors = [{"qwen": text.qwen.to(self.dtype), "t5_ids": text.t5_ids} for text in encoded]
        else:
            states = pad_states(encoded).to(self.device)
            contexts = self.llm_adapter(states.qwen, states.t5_ids, states.qwen_mask, states.t5_mask).cpu()
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


def warn_of_truncated(lengths: Mapping[str, TokenCounts]) -> None:
    """Warn of captions that are longer than the model reads."""
    lost = {caption: length.lost for caption, length in lengths.items() if length.lost}
    if lost:
        first = next(iter(lost))
        logger.warning(
            f"{len(lost):,} of {len(lengths):,} captions are longer than {MAX_TOKENS} tokens and lose their end "
            f"(up to {max(lost.values()):,} tokens), such as {first[:60]!r}"
        )
