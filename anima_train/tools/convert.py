"""The conversion of a model's files to the folder that diffusers' `AnimaModularPipeline` loads.

Tensors keep their values and, unless told otherwise, their dtypes; only names change. One component is in memory at a
time.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from anima_train.adapters.names import cosmos_key
from anima_train.core.errors import ConfigError, ModelFileError
from anima_train.core.files import atomic_folder
from anima_train.core.shapes import LATENT_CHANNELS
from anima_train.core.text_batch import CONTEXT_ROWS
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.llm_adapter import LLMAdapter, LLMAdapterShape
from anima_train.model.loading import ModelFiles
from anima_train.model.safetensors_io import TensorFile, match_keys, read_tensors, write_tensors
from anima_train.model.text import Tokenizers, load_text_encoder, load_tokenizers, open_text_encoder
from anima_train.model.vae import open_vae

SHIFT = 3.0  # of the noise levels, as the model is sampled
INDEX = "modular_model_index.json"
COMPONENTS: Mapping[str, tuple[str, str]] = {  # folder -> library and class, as the pipeline asks for them
    "transformer": ("diffusers", "CosmosTransformer3DModel"),
    "text_conditioner": ("diffusers", "AnimaTextConditioner"),
    "vae": ("diffusers", "AutoencoderKLQwenImage"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "Qwen3Model"),
    "tokenizer": ("transformers", "Qwen2Tokenizer"),
    "t5_tokenizer": ("transformers", "T5TokenizerFast"),
}


def expect_new(folder: Path) -> None:
    """Raise ConfigError if the folder that is to be made, or anything of its name, exists."""
    if folder.exists() or folder.is_symlink():
        raise ConfigError(f"{folder} already exists; give a folder that does not, or remove it")


def to_diffusers(files: ModelFiles, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a model as a diffusers pipeline; the folder appears when everything in it is on disk.

    Args:
        files: of the model.
        folder: to be made.
        dtype: of every tensor. None: of each as it is in its file.

    Raises:
        ConfigError: the folder is already there.
        ModelFileError: a file is missing, damaged, or of a model that the pipeline cannot run.
        SpaceError: the disk is full or read-only.
    """
    expect_new(folder)
    if not files.llm_adapter_header.entries:
        raise ModelFileError(
            f"{files.transformer} has no LLM adapter: a pipeline of diffusers is made of Anima alone; diffusers' own "
            "scripts/convert_cosmos_to_diffusers.py makes one of Cosmos-Predict2"
        )
    tokenizers = load_tokenizers(files.tokenizer, files.t5_tokenizer)
    with atomic_folder(folder) as temporary:
        write_transformer(temporary / "transformer", files.transformer_header, dtype)
        write_text_conditioner(temporary / "text_conditioner", files.llm_adapter_header, dtype)
        write_vae(temporary / "vae", files.vae, dtype)
        write_text_encoder(temporary / "text_encoder", files.llm, tokenizers, dtype)
        tokenizers.qwen.save_pretrained(temporary / "tokenizer")
        tokenizers.t5.save_pretrained(temporary / "t5_tokenizer")
        FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(temporary / "scheduler")
        write_json(temporary / INDEX, index())


def index() -> dict[str, Any]:
    """Return the index, by which diffusers knows the pipeline and the classes of its parts.

    It names no place: diffusers (from 0.41) looks for the parts beside the index, so the folder may be moved.
    """
    nowhere = {"pretrained_model_name_or_path": None, "variant": None, "revision": None}
    parts = {
        name: (library, kind, {"type_hint": (library, kind), "subfolder": name, **nowhere})
        for name, (library, kind) in COMPONENTS.items()
    }
    return {**model_facts("AnimaModularPipeline"), "_blocks_class_name": "AnimaAutoBlocks", **parts}


def write_transformer(folder: Path, file: TensorFile, dtype: torch.dtype | None) -> None:
    """Write the transformer as `CosmosTransformer3DModel`."""
    shape = TransformerShape.of(file.entries)
    if shape.in_channels != LATENT_CHANNELS:
        raise ModelFileError(
            f"model.transformer_path: {file.path} reads {shape.in_channels} channels, and diffusers' Anima pipeline "
            f"gives {LATENT_CHANNELS}; models with a mask channel cannot be converted"
        )
    with torch.device("meta"):
        match_keys(file.entries, MiniTrainDIT(shape).state_dict(), f"model.transformer_path: {file.path}")
    config = {
        "in_channels": shape.in_channels,
        "out_channels": LATENT_CHANNELS,
        "num_attention_heads": shape.width // shape.head_dim,
        "attention_head_dim": shape.head_dim,
        "num_layers": shape.num_blocks,
        "mlp_ratio": 4.0,
        "text_embed_dim": shape.context_width,
        "adaln_lora_dim": shape.adaln_lora_dim,
        "max_size": (128, 240, 240),
        "patch_size": (1, 2, 2),
        "rope_scale": (1.0, 4.0, 4.0),
        "concat_padding_mask": True,
        "extra_pos_embed_type": None,
    }
    tensors = {cosmos_key(name): tensor.to(dtype or tensor.dtype) for name, tensor in read_tensors(file)}
    write_model(folder, model_facts("CosmosTransformer3DModel") | config, tensors)


def write_text_conditioner(folder: Path, file: TensorFile, dtype: torch.dtype | None) -> None:
    """Write the LLM adapter as `AnimaTextConditioner`, which has the same names."""
    shape = LLMAdapterShape.of(file.entries)
    with torch.device("meta"):
        match_keys(file.entries, LLMAdapter(shape).state_dict(), f"LLM adapter in {file.path}")
    config = {
        "source_dim": shape.source_width,
        "target_dim": shape.target_width,
        "model_dim": shape.width,
        "num_layers": shape.num_blocks,
        "num_attention_heads": shape.width // shape.head_dim,
        "mlp_ratio": 4.0,
        "target_vocab_size": shape.vocab_size,
        "use_self_attention": True,
        "use_layer_norm": False,
        "min_sequence_length": CONTEXT_ROWS,
    }
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in read_tensors(file)}
    write_model(folder, model_facts("AnimaTextConditioner") | config, tensors)


def write_vae(folder: Path, path: Path, dtype: torch.dtype | None) -> None:
    """Write the VAE, with what only video uses of it."""
    file, vae, wan_names = open_vae(path)
    names = {wan_name: name for name, wan_name in wan_names.items()}
    tensors = {names[wan_name]: tensor.to(dtype or tensor.dtype) for wan_name, tensor in read_tensors(file)}
    write_model(folder, json.loads(vae.to_json_string()), tensors)


def write_text_encoder(folder: Path, path: Path, tokenizers: Tokenizers, dtype: torch.dtype | None) -> None:
    """Write Qwen3 in transformers' layout."""
    model = load_text_encoder(path, tokenizers, torch.device("cpu")).model  # in float32, which rounds nothing
    entries = open_text_encoder(path).entries
    tensors = {name: tensor.to(dtype or entries[name].dtype) for name, tensor in model.state_dict().items()}
    model.config.architectures = ["Qwen3Model"]
    model.config.dtype = tensors["embed_tokens.weight"].dtype
    write_model(folder, model.config.to_dict(), tensors, "model.safetensors")


def model_facts(kind: str) -> dict[str, Any]:
    """Return the first keys of every config of diffusers: the class, and the version."""
    return {"_class_name": kind, "_diffusers_version": diffusers.__version__}


def write_model(
    folder: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor],
    name: str = "diffusion_pytorch_model.safetensors",
) -> None:  # fmt: skip
    """Write one component into a new folder: its configuration and its weights."""
    folder.mkdir()
    write_json(folder / "config.json", fields)
    write_tensors(folder / name, tensors, {"format": "pt"})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
