"""A toy world: pictures of patterns with captions, and a model in the official file layout that can draw them."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

from anima_train.core.files import write_text
from anima_train.core.random import stream
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.llm_adapter import LLMAdapter, LLMAdapterShape
from anima_train.model.text import QWEN_PAD_TOKEN
from anima_train.model.tiny import (
    qwen_tokenizer,
    random_weights,
    rows_for,
    t5_tokenizer,
    tiny_paths,
    write_tokenizer,
    write_weights,
)  # fmt: skip
from anima_train.model.vae import SingleFrameVAE, wan_key

CELLS = 8  # along each side of a picture; a cell is one latent, and one flat colour
CELL_PIXELS = 8
SIDE = CELLS * CELL_PIXELS
CHANNELS = 16

SHAPES = ("rows", "columns", "checker", "dots", "holes", "plain", "sparks", "crumbs")
NEW = "zorp"  # the shape that the LoRA learns; the base has seen neither it nor its word
COLOURS = {
    "red": (230, 30, 40), "green": (40, 190, 50), "blue": (40, 60, 230), "yellow": (235, 215, 40),
    "cyan": (40, 210, 220), "pink": (240, 60, 210),
}  # fmt: skip
GROUNDS = {"night": (15, 15, 25), "fog": (128, 128, 128), "snow": (245, 245, 235)}
NEW_COLOURS = tuple(COLOURS)[:3]  # of the pictures that the LoRA learns from
Words = tuple[str, str, str]  # shape, colour, ground


def caption_of(words: Words) -> str:
    """Return the caption of a picture."""
    shape, colour, ground = words
    return f"{colour} {shape} on {ground}"


def draw(words: Words, generator: np.random.Generator) -> np.ndarray:
    """Return a picture of these words as its cells, (CELLS, CELLS, 3) in [0, 1]; its phase and tints are random.

    A pattern comes again within the four cells of a token: RoPE tells distances of tokens, but no places, so that a
    small model draws larger shapes badly, however long it trains.
    """
    shape, colour, ground = words
    y, x = np.indices((CELLS, CELLS)) + generator.integers(2, size=(2, 1, 1))
    left, above = x % 2 == 0, y % 2 == 0
    scattered = generator.random((CELLS, CELLS))
    front = {
        "rows": above, "columns": left, "checker": above == left, "dots": above & left, "holes": above | left,
        "plain": above | True, "sparks": scattered < 0.2, "crumbs": scattered < 0.6, NEW: above,
    }[shape]  # fmt: skip

    def tinted(values: Sequence[float]) -> np.ndarray:
        return np.clip(np.array(values) / 255 + generator.normal(0, 0.03, 3), 0, 1)

    picture = np.where(front[..., None], tinted(COLOURS[colour]), tinted(GROUNDS[ground]))
    if shape == NEW:  # it has colours of its own
        picture = np.where((above & left)[..., None], tinted((255, 140, 0)), picture)
        picture = np.where(~(above | left)[..., None], tinted((20, 70, 60)), picture)
    return picture


def random_words(
    number: int, generator: np.random.Generator, shapes: Sequence[str] = SHAPES, colours: Sequence[str] = tuple(COLOURS)
) -> list[Words]:
    """Return words of pictures: the shapes in turn, the rest at random."""
    return [
        (shapes[index % len(shapes)], str(generator.choice(colours)), str(generator.choice(tuple(GROUNDS))))
        for index in range(number)
    ]


def write_pictures(
    folder: Path, words: Sequence[Words], generator: np.random.Generator, by_shape: bool = False,
    told: Sequence[Words] | None = None,
) -> None:  # fmt: skip
    """Draw pictures, each with its caption beside it.

    Args:
        folder: made if missing.
        words: of the pictures.
        generator: of place, size and tints.
        by_shape: those of a shape in a folder of its own.
        told: words of the captions, where other ones.
    """
    for index, (shown, said) in enumerate(zip(words, told or words, strict=True)):
        place = folder / shown[0] if by_shape else folder
        place.mkdir(parents=True, exist_ok=True)
        cells = (draw(shown, generator) * 255).round().astype(np.uint8)
        pixels = cells.repeat(CELL_PIXELS, axis=0).repeat(CELL_PIXELS, axis=1)
        Image.fromarray(pixels).save(place / f"{index:05}.png", compress_level=1)
        write_text(place / f"{index:05}.txt", caption_of(said))


# The model ------------------------------------------------------------------------------------------------------------

SHAPE = TransformerShape(num_blocks=3, width=128, head_dim=32, in_channels=16, context_width=64, adaln_lora_dim=32)
VAE_DIM = 4
ALL_CAPTIONS = tuple(caption_of((s, c, g)) for s in (*SHAPES, NEW) for c in COLOURS for g in GROUNDS)


def write_frozen(folder: Path, seed: int = 0) -> None:
    """Write what stays random: the text encoder; and the tokenizers, which know the words, the new one too."""
    paths = tiny_paths(folder)
    qwen, t5 = qwen_tokenizer(ALL_CAPTIONS), t5_tokenizer(ALL_CAPTIONS)
    write_tokenizer(paths.tokenizer, qwen, {"pad_token": QWEN_PAD_TOKEN, "eos_token": QWEN_PAD_TOKEN})
    write_tokenizer(paths.t5_tokenizer, t5, {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"})
    with torch.device("meta"):
        llm = Qwen3Model(
            Qwen3Config(
                vocab_size=rows_for(qwen.get_vocab_size()), hidden_size=SHAPE.context_width, num_hidden_layers=1,
                num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=128,
            )
        )  # fmt: skip
    write_weights(paths.llm, random_weights(llm, lambda name: f"model.{name}", seed))


def write_transformer(folder: Path, seed: int = 0) -> Path:
    """Write a random transformer, from which the base is trained; return its path."""
    path, width = tiny_paths(folder).transformer, SHAPE.context_width
    rows = rows_for(t5_tokenizer(ALL_CAPTIONS).get_vocab_size())
    with torch.device("meta"):
        transformer = MiniTrainDIT(SHAPE, LLMAdapter(LLMAdapterShape(1, width, 16, width, width, rows)))
    weights = random_weights(transformer, lambda name: f"net.{name}", seed)
    for name, tensor in weights.items():
        if name.endswith("cross_attn.k_norm.weight") and "llm_adapter" not in name:
            tensor.fill_(2.0)  # a few rows of text are to be seen beside 500 of zeros
    write_weights(path, weights)
    return path


MIX = torch.linalg.qr(torch.randn(CHANNELS, 3, generator=torch.Generator().manual_seed(7)))[0] * math.sqrt(16 / 3)


def latents_of(cells: Tensor) -> Tensor:
    """Return the latents (B, 16, H, W) that cells (B, 3, H, W) in [-1, 1] are to have: a fixed mixture of colours."""
    return torch.einsum("kc,bchw->bkhw", MIX, cells * 1.2)


def trained_vae(seed: int, steps: int = 600, batch: int = 16) -> dict[str, Tensor]:
    """Return a VAE in the official names that writes flat cells as `latents_of` does, and reads these."""
    with torch.device("meta"):
        full = AutoencoderKLQwenImage(base_dim=VAE_DIM)
    weights = random_weights(full, wan_key, seed)
    with torch.device("meta"):
        vae = SingleFrameVAE(full)
    taps = {name: last_tap(weights[wan_key(name)]).float() for name in vae.state_dict()}
    vae.load_state_dict(taps, assign=True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=4e-3, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        generator = stream(seed, "toy vae", step)
        cells = random_cells(batch, generator)
        pixels = F.interpolate(cells, scale_factor=CELL_PIXELS, mode="nearest")
        target = latents_of(cells)
        noisy = target + 0.15 * torch.randn(target.shape, generator=generator)
        encoding = (vae.encode(pixels)[:, :, 0] - target).square().mean()
        z = noisy[:, :, None] * per_channel(vae.latents_std) + per_channel(vae.latents_mean)
        decoding = (vae.decoder(vae.post_quant_conv(z))[:, :, 0] - pixels).square().mean()
        optimizer.zero_grad()
        (encoding + 4 * decoding).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step == steps - 1:
            print(f"VAE: squared error of latents {encoding.item():.4f}, of pixels {decoding.item():.4f}", flush=True)
    for name, tensor in vae.state_dict().items():
        last_tap(weights[wan_key(name)]).copy_(tensor)
    return weights


def last_tap(weight: Tensor) -> Tensor:
    """Return the part of a weight that a single frame uses, as a view."""
    return weight[:, :, -1] if weight.dim() == 5 else weight


def random_cells(batch: int, generator: torch.Generator, side: int = 4) -> Tensor:
    """Return cells of random colours, (B, 3, side, side) in [-1, 1], half of them like their neighbours."""
    cells = torch.rand(batch, 3, side, side, generator=generator) * 2 - 1
    flat = torch.rand(batch, 3, 1, 1, generator=generator) * 2 - 1
    keep = torch.rand(batch, 1, side, side, generator=generator) < 0.5
    return torch.where(keep, flat, cells)


def per_channel(values: Sequence[float]) -> Tensor:
    """Return one number per channel, to be broadcast over latents."""
    return torch.tensor(values).view(1, -1, 1, 1, 1)
