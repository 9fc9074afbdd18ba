"""T5's encoder, whose states are the context that Cosmos-Predict2 reads: the first T5 ("t5-11b"), not v1.1."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights

from anima_train.core.errors import ModelFileError
from anima_train.core.text_batch import EncodedText
from anima_train.model.file_kinds import validate_kind
from anima_train.model.safetensors_io import TensorFile, count_blocks, match_keys
from anima_train.model.text import TextEncoder, Tokenizers, Tokens, merge, open_shards
from anima_train.model.text_quantized import TextQuantization, with_weights

if TYPE_CHECKING:
    from transformers import T5Config, T5EncoderModel

SLOT = "t5"
SHARED, EMBEDDING = "shared.weight", "encoder.embed_tokens.weight"  # the same tensor; files may have both


class T5Encoder(TextEncoder):
    """T5's encoder as it is used here: token ids with `</s>` in, last hidden states out, in float32."""

    def encode(self, tokens: Sequence[Tokens]) -> list[EncodedText]:
        """Encode captions in one right-padded batch."""
        ids = [torch.tensor(item.t5_ids, dtype=torch.int64) for item in tokens]
        return [EncodedText(*both) for both in zip(self.states(ids), ids, strict=True)]

    def encode_prompt(self, tokens: Tokens, weights: Sequence[float]) -> tuple[EncodedText, list[float]]:
        """Encode a prompt with its weights as ComfyUI has it: away from the states of the empty prompt, a single row.

        Nothing is left for the context to be multiplied by.
        """
        text, empty = self.encode([tokens, Tokens([], tokens.t5_ids[-1:])])
        base = F.pad(empty.source, (0, 0, 0, len(weights) - 1))
        source = torch.lerp(base, text.source, torch.tensor(weights)[:, None])  # exact where the weight is 1
        return EncodedText(source, text.t5_ids), [1.0] * len(weights)


def load_t5(
    path: Path, tokenizers: Tokenizers, device: torch.device, quantization: TextQuantization | None = None
) -> T5Encoder:
    """Load T5's encoder in float32, whatever dtype the file has; arguments and errors as of `load_text_encoder`."""
    files, model = empty_t5(path, tokenizers)
    used = [file.without(is_unused) for file in files]
    model = with_weights(model, used, {EMBEDDING: SHARED}, device, quantization)
    return T5Encoder(model, tokenizers.t5.pad_token_id)


def empty_t5(path: Path, tokenizers: Tokenizers) -> tuple[list[TensorFile], "T5EncoderModel"]:
    """Return the headers of a T5 encoder's files, and the model without its weights, to which they fit.

    Raises:
        ModelFileError: another kind of model, or tensors missing, unexpected or misshapen, or too few embeddings.
    """
    from transformers import T5EncoderModel  # takes long to import

    files = open_shards(path, SLOT)
    merged = merge(path, files, SLOT)
    validate_kind(merged, SLOT)
    config = t5_config(merged)
    if len(tokenizers.t5) > config.vocab_size:
        raise ModelFileError(
            f"model.t5_path: {path} has embeddings for {config.vocab_size:,} tokens, but the tokenizer of "
            f"model.t5_tokenizer_path has {len(tokenizers.t5):,}; they belong to different models"
        )
    with init_empty_weights():
        model = T5EncoderModel(config)
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name != EMBEDDING}
    match_keys(merged.without(is_unused).entries, wanted, f"model.t5_path: {path}")
    return files, model


def t5_config(file: TensorFile) -> "T5Config":
    """Return the dimensions of T5, read off its tensors; all that they cannot tell is the same in every first T5."""
    from transformers import T5Config

    first = "encoder.block.0.layer"
    vocab_size, width = file.entries[SHARED].shape
    num_buckets, num_heads = file.entries[f"{first}.0.SelfAttention.relative_attention_bias.weight"].shape
    return T5Config(
        vocab_size=vocab_size,
        d_model=width,
        d_kv=file.entries[f"{first}.0.SelfAttention.q.weight"].shape[0] // num_heads,
        d_ff=file.entries[f"{first}.1.DenseReluDense.wi.weight"].shape[0],
        num_layers=count_blocks(file.entries, "encoder.block"),
        num_heads=num_heads,
        relative_attention_num_buckets=num_buckets,
        feed_forward_proj="relu",
    )


def is_unused(name: str) -> bool:
    """Return True for what a file of T5 may have beside its encoder."""
    return name == EMBEDDING or name.startswith("decoder.")


def check_t5(path: Path) -> None:
    """Check the header of the encoder's file, or those of its folder.

    Raises:
        ModelFileError: another kind of model.
    """
    validate_kind(merge(path, open_shards(path, SLOT), SLOT), SLOT)


def open_t5(path: Path) -> TensorFile:
    """Return the headers of the T5 encoder in a file or folder as one, without what is not read."""
    return merge(path, open_shards(path, SLOT), SLOT).without(is_unused)
