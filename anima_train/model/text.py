"""The encoding of captions: Qwen3's hidden states and T5's token ids.

The model's class is imported where one is made (it takes seconds): a run with a whole cache needs none.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config

from anima_train.core.errors import ModelFileError
from anima_train.core.files import sha256_file
from anima_train.core.text_batch import MAX_TOKENS, QWEN_POSITIONS, EncodedText, length_mask
from anima_train.model.file_kinds import SHARD, SLOT_KEYS, identify, is_buffer, open_slot, validate_kind
from anima_train.model.hub import PICKLES
from anima_train.model.safetensors_io import Entry, TensorFile, count_blocks, match_keys, open_header
from anima_train.model.text_quantized import TextQuantization, with_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Qwen3Model

T5_END = 1  # </s>
# `verbose` would have transformers log that a caption is long.
AS_TRAINED = {"add_special_tokens": False, "truncation": False, "padding": False, "verbose": False}
CHUNK = 1000  # captions counted at once
QWEN_PAD_TOKEN = "<|endoftext|>"
ROPE_THETA = 1e6  # of every Qwen3, as is the next; a file of tensors tells neither
RMS_EPS = 1e-6
KEY = "model.llm_path"  # which messages name

# The keys of a config.json that are read. Not its other keys: attn_implementation, for one, can name code on the Hub.
CONFIG_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "attention_bias"),
    *("rope_parameters", "rope_theta", "rope_scaling", "tie_word_embeddings"),
    *("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
)

# Any one of the first group makes a folder a tokenizer; the second group changes what it does.
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "spiece.model")
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers of Qwen3 and T5; where no part of a model reads Qwen3's ids, T5's stands for both."""

    qwen: PreTrainedTokenizerFast
    t5: PreTrainedTokenizerFast


def load_tokenizers(qwen_folder: Path, t5_folder: Path) -> Tokenizers:
    """Load both tokenizers from local folders; nothing is downloaded and no code from the folders is run.

    Raises:
        ModelFileError: a folder is missing, holds no tokenizer, a damaged one, or another model's.
    """
    key = "model.tokenizer_path"
    qwen = load_tokenizer(qwen_folder, key, "vocab.json and merges.txt with tokenizer_config.json, or tokenizer.json")
    if qwen.pad_token != QWEN_PAD_TOKEN:
        raise ModelFileError(
            f"{key}: {qwen_folder} is not Qwen3's tokenizer: its padding token is {qwen.pad_token!r}, "
            f"expected {QWEN_PAD_TOKEN!r}"
        )
    return Tokenizers(qwen, load_t5_tokenizer(t5_folder))


def load_t5_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load T5's tokenizer as `load_tokenizers` does."""
    key = "model.t5_tokenizer_path"
    t5 = load_tokenizer(folder, key, "tokenizer.json")
    if (ids := t5("")["input_ids"]) != [T5_END]:
        raise ModelFileError(
            f"{key}: {folder} is not T5's tokenizer: the empty caption gives the ids {ids}, expected [{T5_END}]"
        )
    return t5


def load_tokenizer(folder: Path, key: str, files: str) -> PreTrainedTokenizerFast:
    """Load one tokenizer; `key` is the setting to name in errors and `files` what the folder should hold."""
    if not folder.is_dir():
        raise ModelFileError(f"{key}: {folder}: there is no such folder; expected a folder with {files}")
    if not holds_tokenizer(folder):
        raise ModelFileError(f"{key}: {folder} holds no tokenizer; expected {files} in it")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception for a damaged file
        raise ModelFileError(
            f"{key}: {folder}: its tokenizer files are incomplete or damaged ({type(error).__name__}: {error}); "
            f"expected {files}; download them again"
        ) from error


def holds_tokenizer(folder: Path) -> bool:
    """Return True if the folder has a vocabulary in it."""
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def find_tokenizer_folder(name: str, llm_path: Path) -> Path | None:
    """Return the tokenizer folder that came with a text encoder, or None.

    It is a sub-folder `name` that holds a tokenizer, of the text encoder's folder or one of the two above it.

    Args:
        name: "tokenizer" (Qwen3) or "t5_tokenizer".
        llm_path: the text encoder, a file or a folder. A folder with Qwen3's tokenizer right in it is one too.
    """
    start = llm_path.absolute()  # not resolved: a download cache links each file to a folder of its own
    if not start.is_dir():
        start = start.parent
    places = [start, *start.parents][:3]
    candidates = [place / name for place in places]
    if name == "tokenizer" and llm_path.is_dir():
        candidates.insert(1, start)
    return next((folder for folder in candidates if holds_tokenizer(folder)), None)


def tokenizer_identity(folder: Path) -> str:
    """Return the SHA-256 over names and bytes of the tokenizer files in the folder; other files do not count."""
    return files_identity(folder / name for name in TOKENIZER_FILES)


def files_identity(paths: Iterable[Path]) -> str:
    """Return the SHA-256 over names and bytes of those files that exist, in order of name."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        if path.is_file():
            digest.update(f"{path.name}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Tokens:
    """The token ids of a caption or prompt, from both tokenizers."""

    qwen_ids: list[int]  # empty for the empty caption
    t5_ids: list[int]  # ends with </s>


def tokenize(tokenizers: Tokenizers, caption: str, max_tokens: int = MAX_TOKENS) -> Tokens:
    """Return both streams of a raw caption, each cut at `max_tokens`; nothing is added but T5's `</s>`."""
    qwen_ids, t5_ids = token_ids(tokenizers.qwen, caption), token_ids(tokenizers.t5, caption)
    return Tokens(qwen_ids[:max_tokens], [*t5_ids[: max_tokens - 1], T5_END])


def token_ids(tokenizer: PreTrainedTokenizerFast, caption: str) -> list[int]:
    """Return the caption's own tokens, all of them."""
    ids: list[int] = tokenizer(caption, **AS_TRAINED)["input_ids"]
    return ids


@dataclass(frozen=True)
class TokenCounts:
    """The numbers of a caption's tokens, those that are cut off included."""

    qwen: int
    t5: int  # with the final </s>
    has_unknown: bool = False  # T5 reads a part of the caption as <unk>
    max_tokens: int = MAX_TOKENS  # that are read of either

    @property
    def lost(self) -> int:
        """The tokens cut off, of the stream that loses more."""
        return max(0, self.qwen - self.max_tokens, self.t5 - self.max_tokens)


def count_tokens(
    tokenizers: Tokenizers, captions: Iterable[str], max_tokens: int = MAX_TOKENS
) -> dict[str, TokenCounts]:
    """Count the tokens of every caption once, those of many captions at a time; `max_tokens` of each are read."""
    counts = {}
    different = list(dict.fromkeys(captions))
    for start in range(0, len(different), CHUNK):
        chunk = different[start : start + CHUNK]
        qwen, t5 = (each(chunk, **AS_TRAINED)["input_ids"] for each in (tokenizers.qwen, tokenizers.t5))
        for caption, qwen_ids, t5_ids in zip(chunk, qwen, t5, strict=True):
            has_unknown = tokenizers.t5.unk_token_id in t5_ids
            counts[caption] = TokenCounts(len(qwen_ids), len(t5_ids) + 1, has_unknown, max_tokens)
    return counts


class TextEncoder:
    """The Qwen3 model as it is used here: token ids in, last hidden states out, in float32."""

    def __init__(self, model: "PreTrainedModel", pad_id: int) -> None:
        self.model = model
        self.pad_id = pad_id

    def encode(self, tokens: Sequence[Tokens]) -> list[EncodedText]:
        """Encode captions in one right-padded batch; empty captions never reach the model and get no rows."""
        sequences = [torch.tensor(item.qwen_ids) for item in tokens if item.qwen_ids]
        states = iter(self.states(sequences)) if sequences else iter(())
        nothing = torch.empty(0, self.model.config.hidden_size)
        return [
            EncodedText(next(states) if item.qwen_ids else nothing, torch.tensor(item.t5_ids, dtype=torch.int64))
            for item in tokens
        ]

    def encode_prompt(self, tokens: Tokens, weights: Sequence[float]) -> tuple[EncodedText, list[float]]:
        """Encode a prompt, and return the weights of T5's tokens that its context is still to be multiplied by: all."""
        return self.encode([tokens])[0], list(weights)

    @torch.no_grad()
    def states(self, sequences: Sequence[Int[Tensor, " S"]]) -> list[Float[Tensor, "S D"]]:
        """Return the states of each sequence of ids, none of them empty."""
        ids = pad_sequence(list(sequences), batch_first=True, padding_value=self.pad_id)  # (B, S)
        lengths = [len(sequence) for sequence in sequences]
        mask = length_mask(lengths, ids)
        device = self.model.device
        output = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        hidden = output.last_hidden_state.cpu()
        # Cloned, or each caption would keep the whole padded batch alive.
        return [row[:length].clone() for row, length in zip(hidden, lengths, strict=True)]


def load_text_encoder(
    path: Path, tokenizers: Tokenizers, device: torch.device, quantization: TextQuantization | None = None
) -> TextEncoder:
    """Load Qwen3 in float32 (as ComfyUI runs it), whatever dtype the file has.

    Args:
        path: a safetensors file, its keys with or without `model.`; or a folder of them with `config.json`.
        tokenizers: for the padding id, and to check that every token has an embedding.
        device: of the weights and the computation.
        quantization: of the linears' weights; the computation stays in float32.

    Raises:
        ConfigError: the library that quantises is missing.
        ModelFileError: missing or damaged file, another kind of model, or tensors missing, unexpected or misshapen.
    """
    files, model = empty_text_encoder(path, tokenizers)
    return TextEncoder(with_weights(model, files, {}, device, quantization), tokenizers.qwen.pad_token_id)


def empty_text_encoder(path: Path, tokenizers: Tokenizers) -> tuple[list[TensorFile], "Qwen3Model"]:
    """Return the headers of a text encoder's files, and the model without its weights, to which they fit.

    Raises:
        ModelFileError: as `load_text_encoder`.
    """
    from transformers import Qwen3Model

    files = open_shards(path)
    merged = merge(path, files)
    validate_kind(merged, "text_encoder")
    config = read_config(path / "config.json") if path.is_dir() else infer_config(merged)
    if len(tokenizers.qwen) > config.vocab_size:
        raise ModelFileError(
            f"{KEY}: {path} has embeddings for {config.vocab_size:,} tokens, but the tokenizer of model.tokenizer_path "
            f"has {len(tokenizers.qwen):,}; they belong to different models"
        )
    try:
        with init_empty_weights(include_buffers=False):  # buffers are not in the file: `inv_freq` has to be computed
            model = Qwen3Model(config)
    except (LookupError, ArithmeticError, RuntimeError, ValueError, TypeError) as error:  # numbers without sense
        raise ModelFileError(f"{KEY}: no Qwen3 model can be built as {path} describes it ({error})") from error
    match_keys(merged.entries, model.state_dict(), f"{KEY}: {path}")
    return files, model


def check_text_encoder(path: Path) -> None:
    """Check the header of the text encoder's file, or those of its folder, and the folder's `config.json`.

    Raises:
        ModelFileError: another kind of model, or a folder without settings, with the file to give instead of it.
    """
    if not path.is_dir():
        validate_kind(open_slot(path, "text_encoder"), "text_encoder")
        return
    config = path / "config.json"
    if not config.exists() and (inside := whole_text_encoders(path)):  # a folder of many models, as ComfyUI has it
        raise ModelFileError(f"{KEY}: {path} has no config.json; give the file in it: {' or '.join(map(str, inside))}")
    validate_kind(open_text_encoder(path), "text_encoder")
    read_config(config)


def whole_text_encoders(folder: Path) -> list[Path]:
    """Return the files in the folder that are a Qwen3 text encoder each."""
    whole = [path for path in weight_files(folder) if not SHARD.search(path.name)]
    return [path for path in whole if identify(open_header(path)) == "text_encoder"]


def open_text_encoder(path: Path) -> TensorFile:
    """Return the headers of the text encoder in a file or folder as one."""
    return merge(path, open_shards(path))


def open_shards(path: Path, slot: str = "text_encoder") -> list[TensorFile]:
    """Return the header of the file, or of each file in the folder, with keys as transformers' models name them."""
    if not path.is_dir():
        return [without_prefix(open_slot(path, slot))]
    return [without_prefix(open_header(file)) for file in weight_files(path, slot)]


def weight_files(path: Path, slot: str = "text_encoder") -> list[Path]:
    """Return all safetensors files in the folder."""
    if files := sorted(path.glob("*.safetensors")):
        return files
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
    found = f"{pickles[0]} is a pickle, which can run code when opened and is never loaded; " if pickles else ""
    raise ModelFileError(
        f"{SLOT_KEYS[slot]}: the folder {path} holds no .safetensors file; {found}expected config.json and "
        ".safetensors files"
    )


def without_prefix(file: TensorFile) -> TensorFile:
    """Return the header as transformers names its keys, without buffers and the output head (tied to the embedding)."""
    model = file.without(is_buffer).without(lambda name: name == "lm_head.weight")
    entries = {name.removeprefix("model."): entry for name, entry in model.entries.items()}
    return TensorFile(file.path, entries, file.metadata)


def merge(path: Path, files: Sequence[TensorFile], slot: str = "text_encoder") -> TensorFile:
    """Return all shards' entries as one header, for checks; no tensor may come twice."""
    entries: dict[str, Entry] = {}
    for file in files:
        if twice := sorted(entries.keys() & file.entries.keys()):
            raise ModelFileError(
                f"{SLOT_KEYS[slot]}: {path} holds {len(twice)} tensors more than once, among them {twice[0]} in "
                f"{file.path.name}; leave only one set of weights in the folder"
            )
        entries.update(file.entries)
    return TensorFile(path, entries, {})


def read_config(path: Path) -> Qwen3Config:
    """Return the model's dimensions from the `config.json` of a folder in transformers' layout."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{KEY}: {path} cannot be read ({error}); a folder needs it beside the weights") from error
    found = fields.get("model_type") if isinstance(fields, dict) else None
    if found != "qwen3":
        raise ModelFileError(f'{KEY}: {path}: model_type is {json.dumps(found)}, expected "qwen3"')
    try:
        return Qwen3Config(**{key: fields[key] for key in CONFIG_KEYS if key in fields})
    except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ModelFileError(
            f"{KEY}: {path} does not describe a Qwen3 model ({' '.join(str(error).split())})"
        ) from error


def infer_config(file: TensorFile) -> Qwen3Config:
    """Return the dimensions of Qwen3, read off its tensors; all that they cannot tell is the same in every Qwen3."""
    entries = file.entries
    vocab_size, hidden_size = entries["embed_tokens.weight"].shape
    head_dim = entries["layers.0.self_attn.q_norm.weight"].shape[0]
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=entries["layers.0.mlp.gate_proj.weight"].shape[0],
        num_hidden_layers=count_blocks(entries, "layers"),
        num_attention_heads=entries["layers.0.self_attn.q_proj.weight"].shape[0] // head_dim,
        num_key_value_heads=entries["layers.0.self_attn.k_proj.weight"].shape[0] // head_dim,
        head_dim=head_dim,
        rms_norm_eps=RMS_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
    )


def num_positions(path: Path) -> int:
    """Return the number of tokens that a text encoder reads of one text."""
    return read_config(path / "config.json").max_position_embeddings if path.is_dir() else QWEN_POSITIONS


def text_encoder_identity(path: Path) -> str:
    """Return the SHA-256 of the file, or over a folder's weights and config."""
    return files_identity([*path.glob("*.safetensors"), path / "config.json"]) if path.is_dir() else sha256_file(path)
