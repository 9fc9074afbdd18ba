"""Cosmos-Predict2, text to image: Anima's transformer, of 2B or 14B, that reads T5's states without LLM adapter."""

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor

from anima_train.core.shapes import LATENT_CHANNELS
from anima_train.core.text_batch import MAX_TOKENS, T5_TOKENS
from anima_train.model.dit import TransformerShape
from anima_train.model.llm_adapter import Conditioner
from anima_train.model.loading import ModelFiles, empty_transformer
from anima_train.model.safetensors_io import TensorFile
from anima_train.model.t5 import SHARED, empty_t5, load_t5, open_t5
from anima_train.model.text import TextEncoder, Tokenizers, load_t5_tokenizer
from anima_train.model.text_quantized import TextQuantization
from anima_train.model.variants import COSMOS, FAMILIES, cosmos_architecture

CAPTION_BYTES = 480 * 2**20  # of T5-XXL's activations for MAX_TOKENS: 128 MiB a copy of the logits or the MLP's


class T5Context(Conditioner):
    """The conditioner without weights: T5's states are the context."""

    @property
    def place(self) -> tuple[torch.device, torch.dtype]:
        """The CPU in float32, as the states are."""
        return torch.device("cpu"), torch.float32

    def forward(self, source: Tensor, ids: Tensor, source_mask: Tensor, ids_mask: Tensor) -> Tensor:
        """Return the states as they are, zeros at padding."""
        return source


class CosmosFiles(ModelFiles):
    """The paths of the files of Cosmos-Predict2: `llm` is T5's encoder, and both tokenizers are T5's."""

    FAMILY: ClassVar[str] = FAMILIES[COSMOS]
    SLOTS: ClassVar[tuple[str, str, str]] = ("cosmos", "vae", "t5")

    def transformer_checks(self) -> list[Callable[[], object]]:
        return [lambda: empty_transformer(self)]

    def check_text_encoder(self, tokenizers: Tokenizers) -> None:
        empty_t5(self.llm, tokenizers)

    def load_tokenizers(self) -> Tokenizers:
        t5 = load_t5_tokenizer(self.t5_tokenizer)
        return Tokenizers(t5, t5)

    def load_text_encoder(
        self, tokenizers: Tokenizers, device: torch.device, quantization: TextQuantization | None = None
    ) -> TextEncoder:
        return load_t5(self.llm, tokenizers, device, quantization)

    def load_conditioner(self, dtype: torch.dtype, device: torch.device) -> Conditioner:
        return T5Context()

    @property
    def text_encoder_header(self) -> TensorFile:
        """T5's tensors."""
        return open_t5(self.llm)

    @property
    def max_tokens(self) -> int:
        """The most that a configuration may ask for: T5's positions have no end, memory for its attention has."""
        return T5_TOKENS

    def caption_bytes(self, max_tokens: int) -> float:
        return CAPTION_BYTES * (max_tokens / MAX_TOKENS) ** 2

    def metadata(self, is_adapter: bool) -> dict[str, str]:
        width = TransformerShape.of(self.transformer_header.entries).width
        return {"ss_base_model_version": COSMOS, "modelspec.architecture": cosmos_architecture(width, is_adapter)}

    def warnings(self) -> Iterator[str]:
        yield from ()

    def incompatibilities(self) -> Iterator[str]:
        transformer = TransformerShape.of(self.transformer_header.entries)
        if transformer.in_channels != LATENT_CHANNELS:
            yield (
                f"model.transformer_path: {self.transformer} reads {transformer.in_channels} channels, as "
                "Cosmos-Predict2's Video2World does; expected a Text2Image model, which reads 16"
            )
        text_width = self.text_encoder_header.entries[SHARED].shape[1]
        if text_width != transformer.context_width:
            yield (
                f"model.t5_path: {self.llm} gives states of width {text_width:,}, and the transformer reads "
                f"{transformer.context_width:,}; Cosmos-Predict2 needs the encoder of T5-XXL (t5-11b), of width 1,024"
            )
