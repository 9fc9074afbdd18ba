"""What a run costs in disk and memory: the cache's tensors to the byte, the device's memory as an estimate."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from anima_train.adapters.full import Full
from anima_train.config.config import Config
from anima_train.data.buckets import Size
from anima_train.data.samples import Sample
from anima_train.model.dit import TransformerShape
from anima_train.model.text import MAX_TOKENS
from anima_train.model.vae import LATENT_CHANNELS
from anima_train.optim.optimizers import AnyOptimizer
from anima_train.tools.report_captions import Length

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
PIXELS_PER_LATENT = 8  # along a side
# Values kept for the backward pass per image token, block and channel: 16 GiB for one image of 1024 pixels in the 28
# blocks of width 2048 of Anima, what trainers that recompute nothing need.
KEPT_VALUES = 36
KEPT_VALUES_CHECKPOINTED = 1  # the block's input; one block at a time is recomputed


@dataclass(frozen=True)
class ModelFacts:
    """What the costs depend on, read off the headers."""

    transformer: TransformerShape
    num_weights: int  # in memory while training, without what an adapter adds
    num_trained: int
    source_width: int  # of the Qwen3 states
    context_width: int  # of the LLM adapter's output


@dataclass(frozen=True)
class CacheCost:
    """Entries of one kind in the cache."""

    kind: str
    number: int
    num_bytes: int  # of the tensors


def cache_costs(
    config: Config, samples: Iterable[tuple[Sample, Sequence[str]]], lengths: Mapping[str, Length], model: ModelFacts
) -> list[CacheCost]:
    """What the whole cache holds for these samples, of all datasets, each with its captions.

    The VAE does not matter: it is the same for all.
    """
    latents: dict[tuple, int] = {}
    masks: dict[tuple, int] = {}
    texts: dict[tuple, int] = {}
    for sample, captions in samples:
        folder = sample.cache.folder
        num_places = (sample.size.width // PIXELS_PER_LATENT) * (sample.size.height // PIXELS_PER_LATENT)
        for view in sample.views():
            latents[folder, view.latent_key("")] = LATENT_CHANNELS * num_places * DTYPE_BYTES["float32"]
            if sample.has_mask:
                masks[folder, view.mask_key()] = num_places * DTYPE_BYTES["float32"]
        for caption in [*captions, *([""] if config.uncond_fraction else [])]:
            texts[folder, caption] = text_bytes(config, lengths[caption], model)
    kinds = {"latents": latents, "masks": masks, "captions": texts}
    return [CacheCost(kind, len(entries), sum(entries.values())) for kind, entries in kinds.items()]


def text_bytes(config: Config, length: Length, model: ModelFacts) -> int:
    """Bytes of a caption's tensors: the LLM adapter's output, or what a trained adapter reads."""
    value = DTYPE_BYTES[config.model.dtype]
    rows = min(length.t5, MAX_TOKENS)
    if config.learning_rates().by_component["llm_adapter"] == 0:
        return rows * model.context_width * value
    num_id_bytes = 8
    return min(length.qwen, MAX_TOKENS) * model.source_width * value + rows * num_id_bytes


@dataclass(frozen=True)
class MemoryCost:
    """Bytes on the device during a step."""

    weights: int
    trained: int  # gradients and the optimizer's state, and the weights that a LoRA adds
    kept: int  # activations for the backward pass

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.trained + self.kept


def memory_cost(config: Config, model: ModelFacts, size: Size, batch_size: int) -> MemoryCost:
    """The estimate for one micro-batch of a bucket."""
    weights_dtype = config.model.transformer_dtype or config.model.dtype
    if isinstance(config.adapter, Full):
        trained = gradient_and_state_bytes(config.optimizer, weights_dtype)
    else:  # a LoRA is float32, and comes on top of the weights
        trained = DTYPE_BYTES["float32"] + gradient_and_state_bytes(config.optimizer, "float32")
    shape = model.transformer
    per_block = batch_size * size.num_tokens * shape.width * DTYPE_BYTES[config.model.dtype]
    if config.activation_checkpointing:
        kept = per_block * (shape.num_blocks * KEPT_VALUES_CHECKPOINTED + KEPT_VALUES)
    else:
        kept = per_block * shape.num_blocks * KEPT_VALUES
    return MemoryCost(model.num_weights * DTYPE_BYTES[weights_dtype], model.num_trained * trained, kept)


def gradient_and_state_bytes(optimizer: AnyOptimizer, dtype: str) -> int:
    """Bytes per trained parameter of this dtype: the gradient, two moments, the Kahan compensation of bf16."""
    value = DTYPE_BYTES[dtype]
    if optimizer.type == "adamw_optimi":
        return value + 2 * DTYPE_BYTES[optimizer.moments_dtype] + (value if dtype == "bfloat16" else 0)
    return value + 2 * value


def readable(num_bytes: float) -> str:
    """1536 as 1.5 KiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def total_bytes(costs: Iterable[CacheCost]) -> int:
    """Bytes of all kinds."""
    return sum(cost.num_bytes for cost in costs)
