"""The model's files: checked by their headers, and loaded."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from anima_train.core.errors import ModelFileError
from anima_train.core.text_batch import MAX_TOKENS
from anima_train.model.block_swap import swapped_blocks, swaps
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.file_kinds import LLM_ADAPTER_PREFIX, is_buffer, key_prefix, open_slot, validate_kind
from anima_train.model.llm_adapter import Conditioner, LLMAdapter, LLMAdapterShape
from anima_train.model.quantized import Quantization, quantize_linear
from anima_train.model.safetensors_io import TensorFile, load_into, match_keys, read_tensors
from anima_train.model.t5 import check_t5
from anima_train.model.text import (
    TextEncoder,
    Tokenizers,
    check_text_encoder,
    empty_text_encoder,
    load_text_encoder,
    load_tokenizers,
    num_positions,
    open_text_encoder,
)
from anima_train.model.text_quantized import TextQuantization, stored_bytes
from anima_train.model.vae import open_vae
from anima_train.model.variants import ANIMA, variant_warnings

CAPTION_BYTES = 96 * 2**20  # of Qwen3-0.6B, for MAX_TOKENS


@dataclass(frozen=True)
class ModelFiles:
    """The paths of a model's files on this machine: of Anima's; another family's is a class below it."""

    transformer: Path
    vae: Path
    llm: Path  # the text encoder
    tokenizer: Path
    t5_tokenizer: Path
    llm_adapter: Path | None = None  # instead of the one inside the transformer file

    FAMILY: ClassVar[str] = ANIMA
    SLOTS: ClassVar[tuple[str, str, str]] = ("transformer", "vae", "text_encoder")  # of the first three

    @cached_property
    def transformer_header(self) -> TensorFile:
        """The transformer's tensors, without prefix, LLM adapter and buffers."""
        return self.whole_transformer_header.without(lambda name: name.startswith(LLM_ADAPTER_PREFIX))

    @cached_property
    def whole_transformer_header(self) -> TensorFile:
        """The transformer file's tensors, LLM adapter included, without prefix and buffers."""
        slot = self.SLOTS[0]
        file = open_slot(self.transformer, slot)
        kind = validate_kind(file, slot, *([] if self.llm_adapter is None else ["cosmos"]))
        return file.stripped(key_prefix(file, kind)).without(is_buffer)

    @cached_property
    def llm_adapter_header(self) -> TensorFile:
        """The LLM adapter's tensors, without prefix and buffers, from the file of its own if there is one."""
        if self.llm_adapter is None:
            return self.whole_transformer_header.stripped(LLM_ADAPTER_PREFIX)
        file = open_slot(self.llm_adapter, "llm_adapter")
        kind = validate_kind(file, "llm_adapter", "transformer")
        inside = LLM_ADAPTER_PREFIX if kind == "transformer" else ""
        return file.stripped(key_prefix(file, kind) + inside).without(is_buffer)

    def check_headers(self) -> None:
        """Check every file's header, and that the transformer's has exactly its weights: before anything is cached.

        Raises:
            ModelFileError: every wrong file at once.
        """
        paths = dict(zip(self.SLOTS, (self.transformer, self.vae, self.llm), strict=True))
        if self.llm_adapter is not None:
            paths["llm_adapter"] = self.llm_adapter
        problems = header_problems(paths, self.llm_adapter is not None)
        if problems := problems or list(self.incompatibilities()) or problems_of(self.transformer_checks()):
            raise ModelFileError(problems)

    def check_keys(self, tokenizers: Tokenizers) -> None:
        """Check that each file holds exactly the weights of its part, as loading it would; none is read.

        Raises:
            ModelFileError: every wrong file at once.
        """
        checks = (*self.transformer_checks(), lambda: open_vae(self.vae), lambda: self.check_text_encoder(tokenizers))
        if problems := problems_of(checks):
            raise ModelFileError(problems)

    def transformer_checks(self) -> list[Callable[[], object]]:
        """Return what checks the transformer and what it reads with, each as `check_keys` does."""
        return [lambda: empty_transformer(self), lambda: empty_llm_adapter(self)]

    def check_text_encoder(self, tokenizers: Tokenizers) -> None:
        """Check the text encoder as `check_keys` does."""
        empty_text_encoder(self.llm, tokenizers)

    def load_tokenizers(self) -> Tokenizers:
        """Load the tokenizers."""
        return load_tokenizers(self.tokenizer, self.t5_tokenizer)

    def load_text_encoder(
        self, tokenizers: Tokenizers, device: torch.device, quantization: TextQuantization | None = None
    ) -> TextEncoder:
        """Load the text encoder in float32."""
        return load_text_encoder(self.llm, tokenizers, device, quantization)

    def load_conditioner(self, dtype: torch.dtype, device: torch.device) -> Conditioner:
        """Load what makes contexts of encoded texts, frozen."""
        return load_llm_adapter(self, dtype, device).eval()

    @property
    def text_encoder_header(self) -> TensorFile:
        """The text encoder's tensors."""
        return open_text_encoder(self.llm)

    @property
    def max_tokens(self) -> int:
        """The number of tokens that the text encoder reads of one text."""
        return num_positions(self.llm)

    def caption_bytes(self, max_tokens: int) -> float:
        """Return the bytes of the text encoder's activations for a caption of so many tokens, with some room."""
        return CAPTION_BYTES * max_tokens / MAX_TOKENS

    def metadata(self, is_adapter: bool) -> dict[str, str]:
        """Return the metadata of saved files that are not those of Anima, of an adapter or of a whole model."""
        return {}

    def warnings(self) -> Iterator[str]:
        """Yield what to know before training on these files."""
        yield from variant_warnings(self.transformer, TransformerShape.of(self.transformer_header.entries).num_blocks)

    def incompatibilities(self) -> Iterator[str]:
        """Yield the mistakes of parts that are each right, and of different models."""
        llm_adapter = LLMAdapterShape.of(self.llm_adapter_header.entries)
        transformer = TransformerShape.of(self.transformer_header.entries)
        text_width = self.text_encoder_header.entries["embed_tokens.weight"].shape[1]
        if text_width != llm_adapter.source_width:
            yield (
                f"model.llm_path: {self.llm} gives states of width {text_width:,}, and the LLM adapter reads "
                f"{llm_adapter.source_width:,}; Anima needs Qwen3-0.6B"
            )
        if llm_adapter.target_width != transformer.context_width:
            yield (
                f"model.llm_adapter_path: {self.llm_adapter_header.path} gives a context of width "
                f"{llm_adapter.target_width:,}, and the transformer reads {transformer.context_width:,}"
            )

    def text_bytes(self, trains_llm_adapter: bool, quantization: TextQuantization | None) -> int:
        """Return the bytes in memory of the text encoder and, if it is frozen, the LLM adapter."""
        llm_adapter = 0 if trains_llm_adapter else self.llm_adapter_header.num_values * torch.float32.itemsize
        entries = self.text_encoder_header.entries.items()
        return round(sum(stored_bytes(name, entry, quantization) for name, entry in entries)) + llm_adapter

    def llm_adapter_tensors(self, on_meta: bool) -> dict[str, Tensor]:
        """Return the LLM adapter's weights, or their shapes, under the names they have in a whole transformer."""
        entries = self.llm_adapter_header.entries.items()
        shapes = ((name, torch.empty(entry.shape, dtype=entry.dtype, device="meta")) for name, entry in entries)
        tensors = shapes if on_meta else read_tensors(self.llm_adapter_header)
        return {LLM_ADAPTER_PREFIX + name: tensor for name, tensor in tensors}


@dataclass(frozen=True)
class ModelSpec:
    """The model of a run: its files, and how and where its parts are loaded."""

    files: ModelFiles
    dtype: torch.dtype  # that the model computes in, and of cached conditions
    weights_dtype: torch.dtype  # of the transformer's weights that are not quantised
    trains_llm_adapter: bool  # then it is a part of the transformer, and conditions are what it reads
    device: torch.device  # of the transformer and the VAE
    text_device: torch.device  # of the text encoder and a frozen LLM adapter
    quantization: Quantization | None = None  # of the blocks' linears
    text_quantization: TextQuantization | None = None  # of the text encoder
    max_tokens: int = MAX_TOKENS  # of a caption that are read


TEXT_SLOTS = {"text_encoder": check_text_encoder, "t5": check_t5}  # whose files may be folders


def header_problems(paths: Mapping[str, Path], has_llm_adapter: bool) -> list[str]:
    """Return what is wrong with files by their headers, each looked at by itself.

    Args:
        paths: by slot, as `SLOT_KEYS` has it.
        has_llm_adapter: the LLM adapter has a file of its own, so the transformer's needs none inside.
    """
    others = {"transformer": ["cosmos"] if has_llm_adapter else [], "llm_adapter": ["transformer"]}

    def check(slot: str, path: Path) -> None:
        if slot in TEXT_SLOTS:
            TEXT_SLOTS[slot](path)
        else:
            validate_kind(open_slot(path, slot), slot, *others.get(slot, ()))

    return problems_of(partial(check, slot, path) for slot, path in paths.items())


def problems_of(checks: Iterable[Callable[[], object]]) -> list[str]:
    """Return the problems that checks raise."""
    problems: list[str] = []
    for check in checks:
        try:
            check()
        except ModelFileError as error:
            problems.extend(error.problems)
    return problems


def load_llm_adapter(files: ModelFiles, dtype: torch.dtype, device: torch.device) -> LLMAdapter:
    """Load the LLM adapter, frozen."""
    llm_adapter, header, what = empty_llm_adapter(files)
    load_into(llm_adapter, header, what, dtype, device)
    return llm_adapter


def empty_llm_adapter(files: ModelFiles) -> tuple[LLMAdapter, TensorFile, str]:
    """Return the LLM adapter without its weights, the file that has exactly these, and its name in messages.

    Raises:
        ModelFileError: the file has others.
    """
    header = files.llm_adapter_header
    with torch.device("meta"):
        llm_adapter = LLMAdapter(LLMAdapterShape.of(header.entries))
    what = f"LLM adapter in {header.path}"
    match_keys(header.entries, llm_adapter.state_dict(), what)
    return llm_adapter, header, what


def empty_transformer(files: ModelFiles) -> tuple[MiniTrainDIT, TensorFile, str]:
    """Return the transformer as `empty_llm_adapter` does the LLM adapter."""
    header = files.transformer_header
    with torch.device("meta"):
        transformer = MiniTrainDIT(TransformerShape.of(header.entries))
    what = f"model.transformer_path {header.path}"
    match_keys(header.entries, transformer.state_dict(), what)
    return transformer, header, what


def load_transformer(
    files: ModelFiles, train_llm_adapter: bool, dtype: torch.dtype, device: torch.device,
    quantization: Quantization | None = None, blocks_to_swap: int = 0,
) -> MiniTrainDIT:  # fmt: skip
    """Load the transformer, frozen; with the LLM adapter inside if that trains.

    Weights are quantised one by one on the device, so that no two of them are there in another dtype. Blocks that are
    to be swapped are left in the host's memory, for `BlockSwap`; of these the quantised ones come back at once.
    """
    transformer, header, what = empty_transformer(files)
    swapped = swapped_blocks(len(transformer.blocks), blocks_to_swap)

    def replace(name: str, tensor: Tensor) -> bool:
        if quantization is None or not quantize_linear(transformer, name, tensor.to(device), quantization, dtype):
            return False
        if swaps(name, swapped):
            transformer.get_submodule(name.removesuffix(".weight")).to("cpu")
        return True

    load_into(transformer, header, what, dtype, device, replace, on_host=lambda name: swaps(name, swapped))
    if train_llm_adapter:
        transformer.llm_adapter = load_llm_adapter(files, dtype, device)
    return transformer
