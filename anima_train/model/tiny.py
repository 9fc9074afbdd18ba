"""A random model in the official file layout, made from a seed in seconds: for tests, examples and dry runs.

Nothing in it has learnt anything, but every file has the names and dtypes of the real one, and its shapes scaled down.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import Qwen3Config

from anima_train.core.files import atomic_path, write_text
from anima_train.core.random import stream
from anima_train.core.shapes import LATENT_CHANNELS
from anima_train.model.cosmos import CosmosFiles
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.llm_adapter import LLMAdapter, LLMAdapterShape
from anima_train.model.loading import ModelFiles
from anima_train.model.safetensors_io import write_tensors
from anima_train.model.t5 import EMBEDDING
from anima_train.model.text import QWEN_PAD_TOKEN, T5_END
from anima_train.model.vae import wan_key

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage

QWEN_TOKENS = 400
T5_ROWS = 32128  # of the real LLM adapter's embedding
ROW_MULTIPLE = 32  # embeddings have a few more rows than there are tokens, as the real ones do

CAPTIONS = (
    "1girl, solo, long hair, looking at viewer, smile, blue eyes, school uniform, upper body",
    "1boy, solo, short hair, black hair, brown eyes, jacket, hands in pockets, standing",
    "2girls, multiple girls, holding hands, twintails, ribbon, skirt, outdoors, cherry blossoms",
    "no humans, scenery, mountain, river, sunset, cloudy sky, reflection, horizon",
    "cat, animal focus, sitting, green eyes, window, indoors, sunlight",
    "dog, running, grass, tongue out, outdoors, blue sky, day",
    "masterpiece, best quality, highly detailed, absurdres",
    "worst quality, low quality, blurry, bad hands, jpeg artifacts, watermark, signature",
    "score_9, score_8_up, rating: general, newest, 2024",
    "flat color, simple background, white background, full body, chibi",
    "monochrome, greyscale, sketch, lineart, traditional media",
    "night, city lights, rain, umbrella, neon, from behind, wide shot",
    "sword, armor, knight, cape, castle, dramatic lighting, fantasy",
    "red flower, blue flower, yellow dress, green hat, purple bow, orange hair, pink shirt",
    "@example artist, character name \\(series name\\), safe",
    "A girl with red hair is standing on a bridge and looking at the river below.",
    "A small cat sleeps on a pile of old books beside an open window.",
    "Two friends walk home from school under one umbrella while it rains.",
    "An old wooden house stands alone in a field of tall yellow grass.",
    "The knight raises his sword in front of the burning castle.",
    "A bowl of noodles with an egg and green onions on a wooden table.",
    "A red square on the left, a blue circle on the right, and a white background.",
    'A sign in the shop window says "OPEN" in large letters.',
    "The picture is drawn in a flat style with thick outlines and few colors.",
)


@dataclass(frozen=True)
class TinySize:
    """The dimensions of a tiny model; the vocabularies come from its tokenizers."""

    transformer: TransformerShape
    llm_adapter: Mapping[str, int]  # fields of its shape beside the widths; without vocab_size the tokenizer's
    llm: Mapping[str, int]  # fields of Qwen3Config


SMALL = TinySize(
    transformer=TransformerShape(
        num_blocks=2, width=64, head_dim=16, in_channels=16, context_width=64, adaln_lora_dim=16
    ),
    llm_adapter={"num_blocks": 2, "head_dim": 16},
    llm={"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128},
)
# ComfyUI derives depth and heads from the width alone, and expects the text side at its real size.
COMFY = TinySize(
    transformer=TransformerShape(
        num_blocks=10, width=256, head_dim=16, in_channels=16, context_width=1024, adaln_lora_dim=256
    ),
    llm_adapter={"num_blocks": 6, "head_dim": 64, "vocab_size": T5_ROWS},
    llm={"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072},
)
LLM_LAYERS = 2
VAE_BASE_DIM = 8


def tiny_paths(folder: Path) -> ModelFiles:
    """Return the paths of a tiny model in this folder, written or not."""
    files = folder / "split_files"
    return ModelFiles(
        transformer=files / "diffusion_models" / "anima-tiny.safetensors",
        vae=files / "vae" / "qwen_image_vae.safetensors",
        llm=files / "text_encoders" / "qwen_3_tiny.safetensors",
        tokenizer=folder / "tokenizer",
        t5_tokenizer=folder / "t5_tokenizer",
    )


def write_tiny(folder: Path, seed: int = 0, comfy: bool = False) -> ModelFiles:
    """Write a random model, return its files; the same seed gives the same bytes.

    Args:
        folder: made if missing; files of the same names are replaced.
        seed: of every weight.
        comfy: write the smallest shape that unmodified ComfyUI loads (about 0.4 GB) instead of one of 3 MB.

    Raises:
        SpaceError: the disk is full or read-only.
    """
    from transformers import Qwen3Model  # takes seconds to import: who reads one needs it not

    paths = tiny_paths(folder)
    size = COMFY if comfy else SMALL
    width = size.transformer.context_width
    qwen, t5_rows = qwen_tokenizer(), write_shared(paths, seed)
    write_tokenizer(paths.tokenizer, qwen, {"pad_token": QWEN_PAD_TOKEN, "eos_token": QWEN_PAD_TOKEN})

    with torch.device("meta"):
        fields = {"vocab_size": t5_rows, **size.llm_adapter}
        llm_adapter = LLMAdapter(LLMAdapterShape(width=width, source_width=width, target_width=width, **fields))
        transformer = MiniTrainDIT(size.transformer, llm_adapter)
        rows = rows_for(qwen.get_vocab_size())
        llm = Qwen3Model(Qwen3Config(vocab_size=rows, hidden_size=width, num_hidden_layers=LLM_LAYERS, **size.llm))
    write_weights(paths.transformer, random_weights(transformer, lambda name: f"net.{name}", seed))
    write_weights(paths.llm, random_weights(llm, lambda name: f"model.{name}", seed))
    return paths


def write_shared(paths: ModelFiles, seed: int) -> int:
    """Write T5's tokenizer and the VAE, which all families have; return the rows of an embedding of the tokens."""
    from diffusers import AutoencoderKLQwenImage  # takes seconds to import

    t5 = t5_tokenizer()
    write_tokenizer(paths.t5_tokenizer, t5, {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"})
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage(base_dim=VAE_BASE_DIM)
    write_weights(paths.vae, calibrated(vae, random_weights(vae, wan_key, seed), seed))
    return rows_for(t5.get_vocab_size())


def tiny_cosmos_paths(folder: Path) -> CosmosFiles:
    """Return the paths of a tiny Cosmos-Predict2 in this folder, written or not."""
    files, t5_tokenizer = folder / "split_files", folder / "t5_tokenizer"
    return CosmosFiles(
        transformer=files / "diffusion_models" / "cosmos-predict2-tiny.safetensors",
        vae=files / "vae" / "wan_2.1_vae.safetensors",
        llm=files / "text_encoders" / "oldt5_tiny.safetensors",
        tokenizer=t5_tokenizer,
        t5_tokenizer=t5_tokenizer,
    )


def write_tiny_cosmos(folder: Path, seed: int = 0) -> CosmosFiles:
    """Write a random Cosmos-Predict2 as `write_tiny` does."""
    from transformers import T5Config, T5EncoderModel  # takes seconds to import

    paths = tiny_cosmos_paths(folder)
    rows, width = write_shared(paths, seed), SMALL.transformer.context_width
    fields = {"d_kv": 16, "d_ff": 128, "num_heads": 4, "num_layers": LLM_LAYERS, "feed_forward_proj": "relu"}
    with torch.device("meta"):
        transformer = MiniTrainDIT(SMALL.transformer)
        t5 = T5EncoderModel(T5Config(vocab_size=rows, d_model=width, **fields))
    write_weights(paths.transformer, random_weights(transformer, lambda name: f"net.{name}", seed))
    weights = random_weights(t5, lambda name: name, seed)
    del weights[EMBEDDING]  # ComfyUI's file has it once
    write_weights(paths.llm, weights)
    return paths


# Standard deviations, where not one over the root of the inputs; the first pattern found in a tensor's name counts.
DEVIATIONS: tuple[tuple[str, float], ...] = (
    (r"\.embed(_tokens)?\.weight$", 1.0),
    (r"(adaln_modulation\w*\.2|t_embedder\.1\.linear_2)\.weight$", 0.05),  # small gates, but every path is alive
    (r"final_layer\.linear\.weight$", 0.02),
    (r"\.bias$", 0.02),
)


def random_weights(module: nn.Module, file_name: Callable[[str], str], seed: int) -> dict[str, Tensor]:
    """Return random weights in bfloat16 for a module on the meta device, under the names `file_name` gives them."""
    return {
        (key := file_name(name)): random_tensor(key, tensor.shape, seed) for name, tensor in module.state_dict().items()
    }


def random_tensor(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Return one tensor: ones for norms, else normal numbers of a generator of its own."""
    if re.search(r"(norm\w*\.weight|\.gamma)$", name):
        return torch.ones(shape, dtype=torch.bfloat16)
    usual = 1 / math.sqrt(math.prod(shape[1:]))  # one over the root of the number of inputs
    deviation = next((value for pattern, value in DEVIATIONS if re.search(pattern, name)), usual)
    return (torch.randn(shape, generator=stream(seed, "tiny", name)) * deviation).bfloat16()


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file."""
    with atomic_path(path) as temporary:
        write_tensors(temporary, tensors, {"format": "pt"})


def rows_for(num_tokens: int) -> int:
    """Return the embedding rows for this many tokens: the next multiple of `ROW_MULTIPLE` above."""
    return (num_tokens // ROW_MULTIPLE + 1) * ROW_MULTIPLE


def calibrated(vae: "AutoencoderKLQwenImage", weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return weights with the last encoder convolution scaled so that images give latents of mean 0 and deviation 1.

    That is after the normalisation with the real VAE's 16 constants, so that training on them is like the real thing.
    """
    vae.load_state_dict({name: weights[wan_key(name)].float() for name in vae.state_dict()}, assign=True)
    with torch.no_grad():
        modes = vae.encode(smooth_images(seed).unsqueeze(2)).latent_dist.mode()  # (B, 16, 1, H, W)
    deviation, mean = torch.std_mean(modes, dim=(0, 2, 3, 4))
    scale = torch.tensor(vae.config.latents_std) / deviation
    # Rounded, so that the last bits of a sum, which depend on the machine, do not reach the file.
    scale = scale.double().mul(100).round().div(100)
    shift = (torch.tensor(vae.config.latents_mean) - scale * mean).double().mul(100).round().div(100)

    weight, bias = weights["conv1.weight"].double(), weights["conv1.bias"].double()  # of mean and log-variance
    weight[:LATENT_CHANNELS] *= scale[:, None, None, None, None]
    bias[:LATENT_CHANNELS] = bias[:LATENT_CHANNELS] * scale + shift
    return {**weights, "conv1.weight": weight.bfloat16(), "conv1.bias": bias.bfloat16()}


def smooth_images(seed: int, number: int = 16, side: int = 64) -> Tensor:
    """Return pictures of a kind, (B, 3, side, side) in [-1, 1]: smooth colours, every other one with hard edges."""
    colours = torch.randn(number, 3, side // 16, side // 16, generator=stream(seed, "tiny", "images")) / 2
    smooth = F.interpolate(colours[::2], size=(side, side), mode="bicubic", align_corners=False)
    edged = F.interpolate(colours[1::2], size=(side, side), mode="nearest")
    return torch.cat((smooth, edged)).clamp(-1, 1)


def qwen_tokenizer(captions: Sequence[str] = CAPTIONS) -> Tokenizer:
    """Return a byte-level BPE tokenizer like Qwen3's, trained on captions; it knows every string."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=QWEN_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[QWEN_PAD_TOKEN],
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer


def t5_tokenizer(captions: Sequence[str] = CAPTIONS) -> Tokenizer:
    """Return a unigram tokenizer like T5's from the words and characters of captions; it ends texts with `</s>`.

    Its scores are counted, not trained: the library's training depends on the order of its hash tables.
    """
    text = " ".join(captions)
    counts = Counter(text.replace(" ", "▁"))
    counts.update("▁" + word for word in re.findall(r"\w{2,}", text))
    pieces = sorted(counts, key=lambda piece: (-counts[piece], piece))
    scores = [(piece, round(math.log(counts[piece] / counts.total()), 4)) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *scores], unk_id=2))
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", T5_END)])
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer, special_tokens: Mapping[str, str]) -> None:
    """Write a tokenizer in transformers' layout."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special_tokens}
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
