"""Captions to conditions: in batches for the cache, and one at a time, ahead of use, for captions drawn at random."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from anima_train.config.config import Config
from anima_train.config.load import LoadedConfig, ModelPart
from anima_train.core.device import DTYPES
from anima_train.core.errors import ModelFileError
from anima_train.core.text_batch import pad_states
from anima_train.data.samples import Sample
from anima_train.model.loading import ModelFiles, load_llm_adapter
from anima_train.model.text import (
    MAX_TOKENS,
    TokenCounts,
    Tokenizers,
    load_text_encoder,
    load_tokenizers,
    tokenize,
)

Say = Callable[[str], None]

NUM_REMEMBERED = 64  # conditions of captions; two resolutions of an image often want the same


class ConditionEncoder:
    """The text encoder and, where it is frozen, the LLM adapter, both in float32.

    Args:
        files: the model's files.
        with_adapter: whether conditions are the LLM adapter's output, or what a trained one reads.
        tokenizers: of the model.
        device: where both run.
        dtype: of the conditions.

    Raises:
        ModelFileError: a file cannot be loaded.
    """

    def __init__(
        self, files: ModelFiles, with_adapter: bool, tokenizers: Tokenizers, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.path = files.llm
        self.tokenizers = tokenizers
        self.device = device
        self.dtype = dtype
        self.text_encoder = load_text_encoder(files.llm, tokenizers, device)
        self.adapter = load_llm_adapter(files, torch.float32, device).eval() if with_adapter else None

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """The conditions of these captions as they are cached: unpadded, on the CPU.

        Raises:
            ModelFileError: a caption is encoded to NaN.
        """
        encoded = self.text_encoder.encode([tokenize(self.tokenizers, caption) for caption in captions])
        if self.adapter is None:
            tensors = [{"qwen": text.qwen.to(self.dtype), "t5_ids": text.t5_ids} for text in encoded]
        else:
            states = pad_states(encoded).to(self.device)
            contexts = self.adapter(states.qwen, states.t5_ids, states.qwen_mask, states.t5_mask).cpu()
            rows = zip(contexts, encoded, strict=True)
            tensors = [{"context": row[: len(text.t5_ids)].to(self.dtype)} for row, text in rows]
        for caption, entry in zip(captions, tensors, strict=True):
            if not all(bool(tensor.isfinite().all()) for tensor in entry.values()):
                raise ModelFileError(f"{self.path}: the caption {caption[:60]!r} is encoded to NaN; the file is broken")
        return tensors


def has_live_texts(config: Config, samples: Iterable[Sample]) -> bool:
    """Whether captions are encoded during training."""
    return not config.model.cache_text_embeddings or any(sample.options.draws_tags for sample in samples)


def text_device(config: Config | ModelPart, device: torch.device) -> torch.device:
    """Where captions are encoded, if the transformer is on this device."""
    return device if config.model.text_encoder_device == "training" else torch.device("cpu")


def live_encoder(loaded: LoadedConfig, files: ModelFiles, device: torch.device) -> ConditionEncoder:
    """What encodes captions during training on this device.

    Raises:
        ModelFileError: a file cannot be loaded.
    """
    config = loaded.config
    tokenizers = load_tokenizers(files.tokenizer, files.t5_tokenizer)
    caches_output = config.learning_rates().by_component["llm_adapter"] == 0
    dtype = DTYPES[config.model.dtype]
    return ConditionEncoder(files, caches_output, tokenizers, text_device(config, device), dtype)


class LiveTexts:
    """Encodes captions when the loader's threads ask for them, while the model trains.

    One caption at a time, so that a caption's conditions do not depend on which others are encoded with it: a resumed
    run, or one on more processes, sees the same. On CUDA in a stream of its own, beside the training step.
    """

    def __init__(self, encoder: ConditionEncoder) -> None:
        self.encoder = encoder
        self.lock = threading.Lock()
        self.stream = torch.cuda.Stream(encoder.device) if encoder.device.type == "cuda" else None
        self.remembered = functools.lru_cache(NUM_REMEMBERED)(self.encode)

    def __call__(self, caption: str) -> Mapping[str, Tensor]:
        """The conditions of a caption, as they would be cached."""
        with self.lock:
            return self.remembered(caption)

    def encode(self, caption: str) -> Mapping[str, Tensor]:
        """The same, without a look at what is remembered."""
        with contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            return self.encoder.encode([caption])[0]


def report_truncated(lengths: Mapping[str, TokenCounts], say: Say) -> None:
    """Warn about captions that are longer than the model reads."""
    lost = {caption: length.lost for caption, length in lengths.items() if length.lost}
    if lost:
        first = next(iter(lost))
        say(
            f"warning: {len(lost):,} of {len(lengths):,} captions are longer than {MAX_TOKENS} tokens and lose their "
            f"end (up to {max(lost.values()):,} tokens), such as {first[:60]!r}"
        )
