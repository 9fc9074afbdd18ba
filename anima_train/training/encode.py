"""Fills the cache: latents and masks of every sample, conditions of every caption.

The VAE and the text encoder are loaded only when something is missing, and freed before the transformer is loaded.
With several processes each encodes its share.
"""

import gc
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from anima_train.core.conditions import pad_states
from anima_train.core.errors import ModelFileError
from anima_train.core.files import sha256_file
from anima_train.data.buckets import Size
from anima_train.data.cache import Cache
from anima_train.data.images import BadImage, cover_and_crop, decode, decode_mask, mask_to_latent, to_pixels
from anima_train.data.loader import TextIdentity, read_ahead
from anima_train.data.sources import Sample
from anima_train.model.llm_adapter import LLMAdapter
from anima_train.model.text import (
    Tokenizers,
    load_text_encoder,
    load_tokenizers,
    text_encoder_identity,
    tokenize,
    tokenizer_identity,
)
from anima_train.model.vae import load_vae
from anima_train.training.model import ModelFiles, load_llm_adapter

Say = Callable[[str], None]


@dataclass(frozen=True)
class Share:
    """Which part of the work is this process's."""

    rank: int
    world_size: int

    def of(self, items: Sequence) -> list:
        """Every n-th item."""
        return list(items[self.rank :: self.world_size])


@dataclass(frozen=True)
class Encoded:
    """What filling the cache did."""

    num_latents: int
    num_masks: int
    num_texts: int


def vae_identity(files: ModelFiles) -> str:
    """Hash of what latents depend on beside image and size."""
    return sha256_file(files.vae)


def text_identity(files: ModelFiles, cache_output: bool, dtype: torch.dtype) -> TextIdentity:
    """Hashes of what conditions depend on beside the caption.

    Args:
        files: the model's files.
        cache_output: whether the adapter's output is cached, not what it reads.
        dtype: of the cached values.
    """
    return TextIdentity(
        encoder=text_encoder_identity(files.llm),
        tokenizer=tokenizer_identity(files.tokenizer),
        t5_tokenizer=tokenizer_identity(files.t5_tokenizer),
        adapter=files.adapter_fingerprint() if cache_output else "",
        dtype=str(dtype).removeprefix("torch."),
    )


def missing_latents(samples: Sequence[Sample], identity: str) -> list[Sample]:
    """One sample for each latent that is not in its cache, without those that were rejected."""
    have: dict[Path, set[str]] = {}
    wanted: dict[tuple[Path, str], Sample] = {}
    for sample in samples:
        folder = sample.cache.folder
        if folder not in have:
            have[folder] = sample.cache.keys("latent") | set(sample.cache.rejected())
        key = sample.latent_key(identity)
        if key not in have[folder]:
            wanted[folder, key] = sample
    return list(wanted.values())


def missing_masks(samples: Sequence[Sample]) -> list[Sample]:
    """One sample for each mask that is not in its cache."""
    have: dict[Path, set[str]] = {}
    wanted: dict[tuple[Path, str], Sample] = {}
    for sample in samples:
        if sample.picture.mask is None:
            continue
        folder = sample.cache.folder
        if folder not in have:
            have[folder] = sample.cache.keys("mask") | set(sample.cache.rejected())
        if sample.mask_key() not in have[folder]:
            wanted[folder, sample.mask_key()] = sample
    return list(wanted.values())


def missing_texts(samples: Sequence[Sample], identity: TextIdentity, seed: int, empty: bool) -> list[tuple[Cache, str]]:
    """(cache, caption) of every caption that is not in its cache.

    Args:
        samples: of all datasets.
        identity: of the encoder.
        seed: of the run, for shuffled variants.
        empty: whether the empty caption is needed whatever the samples' captions are.
    """
    have: dict[Path, set[str]] = {}
    wanted: dict[tuple[Path, str], tuple[Cache, str]] = {}
    for sample in samples:
        folder = sample.cache.folder
        if folder not in have:
            have[folder] = sample.cache.keys("text")
        for caption in [*sample.captions(seed), *([""] if empty else [])]:
            key = identity.key(caption)
            if key not in have[folder]:
                wanted[folder, key] = (sample.cache, caption)
    return list(wanted.values())


def encode_latents(
    samples: Sequence[Sample], identity: str, path: Path, device: torch.device, dtype: torch.dtype, batch_size: int,
    progress: bool,
) -> int:  # fmt: skip
    """Encode and store these latents; images that cannot be decoded are rejected with the reason. Returns how many."""
    if not samples:
        return 0
    vae = load_vae(path, dtype, device)
    groups: dict[Size, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.size].append(sample)
    batches = [
        group[start : start + batch_size]
        for _, group in sorted(groups.items())
        for start in range(0, len(group), batch_size)
    ]

    def pixels(sample: Sample) -> np.ndarray | str:
        try:
            image = decode(sample.picture.path)
            if sha256_file(sample.picture.path) != sample.picture.sha256:
                return "changed while the run was starting"
            return to_pixels(cover_and_crop(image, sample.size.width, sample.size.height))
        except (BadImage, OSError) as error:
            return str(error)

    num_encoded = 0
    bar = tqdm(total=len(samples), desc="latents", unit="image", disable=not progress)
    decoded = read_ahead([sample for batch in batches for sample in batch], lambda sample: (sample, pixels(sample)))
    for batch in batches:
        good = []
        for _ in batch:
            sample, value = next(decoded)
            if isinstance(value, str):
                sample.cache.reject(sample.latent_key(identity), value)
            else:
                good.append((sample, value))
        if good:
            stacked = torch.from_numpy(np.stack([value for _, value in good])).to(device)
            for (sample, _), latents in zip(good, vae.encode(stacked).cpu(), strict=True):
                if bool(latents.isfinite().all()):
                    sample.cache.save("latent", sample.latent_key(identity), {"latents": latents.clone()})
                    num_encoded += 1
                else:
                    sample.cache.reject(sample.latent_key(identity), "its latents are not finite")
        bar.update(len(batch))
    bar.close()
    del vae
    free(device)
    return num_encoded


def encode_masks(samples: Sequence[Sample]) -> int:
    """Store these masks; a mask that cannot be decoded rejects its image. Returns how many."""
    for sample in samples:
        picture = sample.picture
        assert picture.mask is not None
        try:
            mask = decode_mask(picture.mask, (picture.width, picture.height))
        except (BadImage, OSError) as error:
            sample.cache.reject(sample.mask_key(), f"its mask {picture.mask.name}: {error}")
            continue
        values = torch.from_numpy(mask_to_latent(mask, sample.size.width, sample.size.height))
        sample.cache.save("mask", sample.mask_key(), {"mask": values})
    return len(samples)


def encode_texts(
    texts: Sequence[tuple[Cache, str]], identity: TextIdentity, files: ModelFiles, tokenizers: Tokenizers,
    device: torch.device, dtype: torch.dtype, batch_size: int, progress: bool,
) -> int:  # fmt: skip
    """Encode and store these captions' conditions, in float32 until they are stored. Returns how many."""
    if not texts:
        return 0
    encoder = load_text_encoder(files.llm, tokenizers, device)
    adapter: LLMAdapter | None = None
    if identity.adapter:
        adapter = load_llm_adapter(files, torch.float32, device).eval()
    # Captions of similar length together: little padding.
    ordered = sorted(texts, key=lambda item: len(item[1]))
    bar = tqdm(total=len(ordered), desc="captions", unit="caption", disable=not progress)
    for start in range(0, len(ordered), batch_size):
        chunk = ordered[start : start + batch_size]
        encoded = encoder.encode([tokenize(tokenizers, caption) for _, caption in chunk])
        contexts = None
        if adapter is not None:
            states = pad_states(encoded).to(device)
            with torch.no_grad():
                contexts = adapter(states.qwen, states.t5_ids, states.qwen_mask, states.t5_mask)
        for row, ((cache, caption), text) in enumerate(zip(chunk, encoded, strict=True)):
            if contexts is not None:
                tensors = {"context": contexts[row, : len(text.t5_ids)].to(dtype)}
            else:
                tensors = {"qwen": text.qwen.to(dtype), "t5_ids": text.t5_ids}
            if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
                raise ModelFileError(f"{files.llm}: the caption {caption[:60]!r} is encoded to NaN; the file is broken")
            cache.save("text", identity.key(caption), tensors)
        bar.update(len(chunk))
    bar.close()
    del encoder, adapter
    free(device)
    return len(texts)


def truncated_captions(captions: Iterable[str], tokenizers: Tokenizers) -> Iterator[tuple[str, int]]:
    """(caption, tokens lost) for every caption longer than the model reads."""
    for caption in captions:
        tokens = tokenize(tokenizers, caption)
        if lost := max(tokens.qwen_lost, tokens.t5_lost):
            yield caption, lost


def fill_cache(
    samples: Sequence[Sample], files: ModelFiles, vae_id: str, text_id: TextIdentity, seed: int, empty_caption: bool,
    share: Share, device: torch.device, dtype: torch.dtype, batch_size: int, progress: bool, say: Say,
) -> Encoded:  # fmt: skip
    """Make every missing entry that is this process's share.

    Args:
        samples: of all datasets.
        files: the model's files.
        vae_id: from `vae_identity`.
        text_id: from `text_identity`.
        seed: of the run.
        empty_caption: whether the empty caption is needed.
        share: this process's part.
        device: where the VAE and the text encoder run.
        dtype: what the VAE computes in, and conditions are stored in; latents are float32.
        batch_size: images and captions at once.
        progress: whether to show bars.
        say: gets a line about truncated captions.
    """
    latents = share.of(missing_latents(samples, vae_id))
    num_latents = encode_latents(latents, vae_id, files.vae, device, dtype, batch_size, progress)
    num_masks = encode_masks(share.of(missing_masks(samples)))
    texts = share.of(missing_texts(samples, text_id, seed, empty_caption))
    num_texts = 0
    if texts:
        tokenizers = load_tokenizers(files.tokenizer, files.t5_tokenizer)
        lost = list(truncated_captions((caption for _, caption in texts), tokenizers))
        if lost:
            worst = max(number for _, number in lost)
            say(
                f"warning: {len(lost):,} of {len(texts):,} captions are longer than 512 tokens and lose their end "
                f"(up to {worst:,} tokens), such as {lost[0][0][:60]!r}"
            )
        num_texts = encode_texts(texts, text_id, files, tokenizers, device, dtype, batch_size, progress)
    return Encoded(num_latents, num_masks, num_texts)


def without_rejected(samples: Sequence[Sample], vae_id: str) -> tuple[list[Sample], list[str]]:
    """The samples whose latents exist, and "path: reason" for the images of the others, which leave at every size."""
    reasons: dict[Path, dict[str, str]] = {}
    bad: dict[Path, str] = {}
    for sample in samples:
        folder = sample.cache.folder
        if folder not in reasons:
            reasons[folder] = sample.cache.rejected()
        keys = [sample.latent_key(vae_id)] + ([sample.mask_key()] if sample.picture.mask else [])
        for key in keys:
            if key in reasons[folder]:
                bad[sample.picture.path] = reasons[folder][key]
    kept = [sample for sample in samples if sample.picture.path not in bad]
    return kept, [f"{path}: {reason}" for path, reason in bad.items()]


def free(device: torch.device) -> None:
    """Give memory of deleted modules back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
