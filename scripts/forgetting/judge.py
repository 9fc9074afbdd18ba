"""A look at pictures: those that a model draws from captions, and a small network that reads their shape."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from anima_train.adapters.applied import merge, read_any
from anima_train.core.random import stream
from anima_train.core.text_batch import fold_rows, pad_states
from anima_train.model.file_kinds import LLM_ADAPTER_PREFIX
from anima_train.model.loading import ModelFiles, load_llm_adapter, load_transformer
from anima_train.model.text import load_text_encoder, load_tokenizers
from anima_train.sampling.generate import guided
from anima_train.sampling.noise_schedules import Simple
from anima_train.sampling.prompts import prompt_states
from anima_train.sampling.samplers import Euler
from forgetting.toy import CELLS, CHANNELS, NEW, NEW_COLOURS, SHAPES, Words, caption_of, draw, latents_of, random_words

CPU = torch.device("cpu")
STEPS = 16
SHIFT = 3.0
CLASSES = (*SHAPES, NEW)


@torch.no_grad()
def drawn_latents(files: ModelFiles, captions: Sequence[str], lora: Path | None, strength: float, seed: int) -> Tensor:
    """Return the latents (B, 16, 1, H, W) that the model draws from captions, without guidance, by Euler's steps."""
    tokenizers = load_tokenizers(files.tokenizer, files.t5_tokenizer)
    text_encoder = load_text_encoder(files.llm, tokenizers, CPU)
    transformer = load_transformer(files, False, torch.float32, CPU).eval()
    llm_adapter = load_llm_adapter(files, torch.float32, CPU).eval()
    if lora is not None:
        update = [(read_any(lora, files), strength)]
        merge(transformer, update)
        merge(llm_adapter, update, LLM_ADAPTER_PREFIX)
    texts = pad_states([prompt_states(caption, tokenizers, text_encoder).text for caption in captions])
    context = fold_rows(llm_adapter(texts.source, texts.t5_ids, texts.source_mask, texts.t5_mask), texts.bias)
    noise = torch.randn(len(captions), CHANNELS, 1, CELLS, CELLS, generator=stream(seed, "toy", "drawn"))
    velocity = guided(transformer, context, None, 1.0, torch.float32)
    return Euler().sample(velocity, noise, Simple().sigmas(STEPS, SHIFT), SHIFT, lambda: noise)


class Judge(nn.Module):
    """A small convolutional network from latents to the shape in them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(CHANNELS, 48, 3, padding=1), nn.GELU(), nn.Conv2d(48, 64, 3, 2, 1), nn.GELU(),
            nn.Conv2d(64, 96, 3, 2, 1), nn.GELU(), nn.Flatten(), nn.Linear(96 * (CELLS // 4) ** 2, len(CLASSES)),
        )  # fmt: skip

    def forward(self, latents: Tensor) -> Tensor:
        """Return a logit for each of `CLASSES`, (B, K), of latents (B, 16, H, W)."""
        return self.layers(latents)

    @torch.no_grad()
    def read(self, latents: Tensor) -> list[str]:
        """Return the shape that is seen in each of the latents (B, 16, 1, H, W)."""
        return [CLASSES[index] for index in self(latents[:, :, 0]).argmax(dim=1)]


def latents_for(words: Sequence[Words], generator: np.random.Generator) -> Tensor:
    """Return latents of drawings, (B, 16, H, W), as an ideal VAE would give them."""
    cells = np.stack([draw(each, generator) for each in words])
    return latents_of(torch.tensor(cells, dtype=torch.float32).permute(0, 3, 1, 2) * 2 - 1)


def trained_judge(path: Path, steps: int = 800, batch: int = 64) -> Judge:
    """Return the judge, trained if the file is missing, and print how often it is right on drawings."""
    torch.manual_seed(0)
    judge = Judge()
    if path.is_file():
        judge.load_state_dict(load_file(path))
        return judge.eval()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    for step in range(steps):
        generator, noise = np.random.default_rng([1, step]), stream(0, "toy judge", step)
        words = random_words(batch, generator, CLASSES)
        latents = latents_for(words, generator)
        level = 0.5 * torch.rand(batch, 1, 1, 1, generator=noise)
        logits = judge(latents + level * torch.randn(latents.shape, generator=noise))
        loss = F.cross_entropy(logits, torch.tensor([CLASSES.index(each[0]) for each in words]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    generator = np.random.default_rng(2)
    words = random_words(40 * len(CLASSES), generator, CLASSES)
    found = judge.read(latents_for(words, generator)[:, :, None])
    print(f"the judge reads {share(found, words):.0%} of the shapes in drawings right")
    save_file(judge.state_dict(), path)
    return judge.eval()


def share(found: Sequence[str], words: Sequence[Words]) -> float:
    """Return the share of pictures whose shape is the one that was asked for."""
    return sum(seen == each[0] for seen, each in zip(found, words, strict=True)) / len(words)


def look(
    judge: Judge, files: ModelFiles, lora: Path | None = None, strength: float = 1.0, number: int = 24
) -> dict[str, float]:
    """Draw old and new shapes; return the shares of right ones, and of old ones that became the new one."""
    generator = np.random.default_rng(3)
    old, new = random_words(2 * number, generator), random_words(number, generator, [NEW], NEW_COLOURS)
    latents = drawn_latents(files, [caption_of(each) for each in (*old, *new)], lora, strength, seed=3)
    found = judge.read(latents)
    seen_old, seen_new = found[: len(old)], found[len(old) :]
    return {
        "old right": share(seen_old, old),
        "old as new": seen_old.count(NEW) / len(old),
        "new right": share(seen_new, new),
    }
