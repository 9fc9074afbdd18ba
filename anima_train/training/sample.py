"""Pictures from prompts: one part of the model after the other in memory."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anima_train.adapters.read import Updates, merge_loras, read_lora
from anima_train.config.load import LoadedModel
from anima_train.core.files import sha256_file
from anima_train.model.text import load_text_encoder, load_tokenizers
from anima_train.model.vae import load_vae
from anima_train.model.weights import ADAPTER_PREFIX
from anima_train.sampling.generate import Request, decode, generate
from anima_train.sampling.pictures import Sources, UsedLora, save_picture
from anima_train.sampling.prompts import encode_prompt
from anima_train.training.encode import free
from anima_train.training.model import DTYPES, ModelFiles, find_model_files, load_llm_adapter, load_transformer
from anima_train.training.texts import text_device


@dataclass(frozen=True)
class ChosenLora:
    """A LoRA and how strongly it is applied: 1 as it was trained, 0 not at all, negative the other way."""

    path: Path
    strength: float = 1.0


def sample(
    loaded: LoadedModel, loras: Sequence[ChosenLora], requests: Sequence[Request], folder: Path, device: torch.device
) -> Iterator[Path]:
    """Draw each request and write it into the folder; yields the paths.

    The text encoder is freed before the transformer is loaded, which stays beside the VAE until the end.

    Raises:
        ModelFileError: a file is missing, damaged, or does not fit; before anything large is loaded.
        ConfigError: a prompt cannot be read.
        NumericError: a picture became NaN; those before it are written.
        SpaceError: the disk is full.
    """
    files = find_model_files(loaded)
    files.check_headers()
    shapes = linear_shapes(files)
    merged = [(read_lora(lora.path, shapes), lora.strength) for lora in loras]
    used = [UsedLora(lora.path.stem, lora.strength, sha256_file(lora.path)) for lora in loras]
    sources = Sources(files.transformer.stem, used)

    contexts = encode_all(files, merged, texts_of(requests), text_device(loaded.config, device))
    dtype = DTYPES[loaded.config.model.dtype]
    transformer = load_transformer(files, with_adapter=False, dtype=dtype, device=device).eval()
    merge_loras(transformer, merged)
    vae = load_vae(files.vae, dtype, device)
    for request in requests:
        context, negative = contexts[request.prompt], contexts.get(request.negative_prompt)
        latents = generate(transformer, request, context, negative, device, dtype)
        yield save_picture(folder, decode(vae, latents), request, sources)


def texts_of(requests: Iterable[Request]) -> list[str]:
    """Every prompt and negative prompt that counts, once."""
    texts = [text for r in requests for text in (r.prompt, *([r.negative_prompt] if r.is_guided else []))]
    return list(dict.fromkeys(texts))


def linear_shapes(files: ModelFiles) -> dict[str, tuple[int, ...]]:
    """The shape of every weight a LoRA can change, by the full name of its module."""
    entries = {
        **files.transformer_header.entries,
        **{ADAPTER_PREFIX + name: entry for name, entry in files.adapter_header.entries.items()},
    }
    return {
        name.removesuffix(".weight"): entry.shape
        for name, entry in entries.items()
        if name.endswith(".weight") and len(entry.shape) == 2
    }


def encode_all(
    files: ModelFiles, loras: Sequence[tuple[Updates, float]], texts: Sequence[str], device: torch.device
) -> Mapping[str, Tensor]:
    """The context of each text, in float32 on the CPU; what it took is freed."""
    tokenizers = load_tokenizers(files.tokenizer, files.t5_tokenizer)
    text_encoder = load_text_encoder(files.llm, tokenizers, device)
    adapter = load_llm_adapter(files, torch.float32, device).eval()
    merge_loras(adapter, loras, ADAPTER_PREFIX)
    contexts = {text: encode_prompt(text, tokenizers, text_encoder, adapter) for text in texts}
    del text_encoder, adapter
    free(device)
    return contexts
