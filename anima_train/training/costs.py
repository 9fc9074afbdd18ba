"""The costs of a run: the device's memory as an estimate or as measured, and the time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from anima_train.adapters.choice import AnyAdapter
from anima_train.adapters.full import Full
from anima_train.adapters.lora import Lora
from anima_train.config.config import Config
from anima_train.core.device import DTYPES
from anima_train.core.format import format_bytes
from anima_train.data.buckets import Size
from anima_train.model.block_swap import num_swapped_values, saved_bytes
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.loading import ModelSpec
from anima_train.model.recompute import Recompute
from anima_train.optim.optimizers import AnyOptimizer
from anima_train.optim.state_shapes import optimizer_state

# Values kept on the device for the backward pass per image token, block and channel, by what trains and whether float32
# weights run under autocast. Counted on blocks of Anima's width at 1024 pixels, 96 tokens of text, rank 32, not
# compiled; `tests/training/test_costs.py` counts them again. Left out, as it is little: 512 tokens of text are 5 % more
# at 512 pixels and 1 % at 1024, rank 128 is 4 % more; the layers around the blocks keep 0.04 GiB for such an image, and
# an LLM adapter that trains at most 0.4 GiB for a caption (96 tokens: 0.05).
Kind = Literal["lora", "dora", "lokr", "loha", "full"]
KEPT_VALUES: dict[tuple[Kind, bool], dict[Recompute, float]] = {
    ("lora", False): {"nothing": 26.6, "selective": 14.3, "blocks": 1.1, "offload": 0.1},
    ("dora", False): {"nothing": 37.6, "selective": 14.6, "blocks": 1.1, "offload": 0.1},
    ("lokr", False): {"nothing": 26.2, "selective": 14.1, "blocks": 1.0, "offload": 0.0},
    ("loha", False): {"nothing": 26.2, "selective": 14.1, "blocks": 1.0, "offload": 0.0},
    ("full", False): {"nothing": 26.2, "selective": 14.1, "blocks": 1.0, "offload": 0.0},
    ("lora", True): {"nothing": 31.9, "selective": 14.8, "blocks": 1.6, "offload": 0.6},
    ("dora", True): {"nothing": 42.9, "selective": 15.3, "blocks": 1.7, "offload": 0.7},
    ("lokr", True): {"nothing": 45.5, "selective": 37.8, "blocks": 1.6, "offload": 0.6},
    ("loha", True): {"nothing": 57.6, "selective": 42.9, "blocks": 3.7, "offload": 2.7},
    ("full", True): {"nothing": 33.7, "selective": 14.8, "blocks": 1.8, "offload": 0.8},
}
# At the peak, in the backward pass, these come on top, per image token and channel, however many blocks there are: what
# the layers around the blocks keep, gradients that are at work, and under autocast copies of weights. Counted in the
# same test: with them the estimate is within 0.07 GiB of a step's peak, under autocast within 4 %.
TEMPORARY_VALUES: dict[tuple[Kind, bool], float] = {
    ("lora", False): 6.0, ("dora", False): 12.0, ("lokr", False): 14.0, ("loha", False): 6.0, ("full", False): 9.0,
    ("lora", True): 16.0, ("dora", True): 16.0, ("lokr", True): 18.0, ("loha", True): 18.0, ("full", True): 9.0,
}  # fmt: skip
TEMPORARY_INT8 = 17.0  # of a LoRA on weights in int8: sums of integers have 4 bytes
LOHA_BYTES = 24  # per element of the largest matrix: its update, the two that it is made of, and their gradients
# Bytes per element of the largest matrix while it is updated: an update in the backward pass adds to the peak of that.
# Counted for Kahan AdamW on CUDA tensors without values: 0.31 GiB.
UPDATE_BYTES = 20


@dataclass(frozen=True)
class ModelStats:
    """The numbers that the costs depend on, read off the headers."""

    transformer: TransformerShape
    num_weights: int  # in memory while training, without what an adapter adds
    num_trained: int
    text_bytes: int = 0  # of what encodes captions on the device during training


def model_stats(
    adapter: AnyAdapter, spec: ModelSpec, transformer: MiniTrainDIT, has_text_encoder: bool
) -> ModelStats:  # fmt: skip
    """Return what the costs depend on, of a transformer with this adapter attached."""
    files, parameters = spec.files, list(transformer.parameters())
    num_trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    num_all = sum(parameter.numel() for parameter in parameters)
    return ModelStats(
        TransformerShape.of(files.transformer_header.entries),
        num_weights=num_all if isinstance(adapter, Full) else num_all - num_trained,
        num_trained=num_trained,
        text_bytes=files.text_bytes(spec.trains_llm_adapter, spec.text_quantization) if has_text_encoder else 0,
    )


@dataclass(frozen=True)
class MemoryCost:
    """Bytes on the device during a step."""

    weights: int
    trained: int  # gradients and the optimizer's state, and the weights that a LoRA adds
    activations: int  # kept for the backward pass, what one block at a time computes again, and temporary ones
    kept_values: Mapping[Recompute, float]  # of one block, per image token and channel, by policy

    @property
    def total(self) -> int:
        """The sum of all."""
        return self.weights + self.trained + self.activations


def memory_cost(config: Config, model: ModelStats, size: Size, batch_size: int) -> MemoryCost:
    """Estimate the memory of one micro-batch of a bucket."""
    weights_dtype = config.model.weights_dtype
    if isinstance(config.adapter, Full):
        trained = gradient_and_state_bytes(config.optimizer, weights_dtype)
    else:  # a LoRA comes on top of the weights, in a dtype of its own
        dtype = config.adapter.dtype
        trained = DTYPES[dtype].itemsize + gradient_and_state_bytes(config.optimizer, dtype)
    if config.ema is not None:
        trained += torch.float32.itemsize
    shape = model.transformer
    trains_all, uses_autocast = isinstance(config.adapter, Full), config.model.uses_autocast
    is_dora = isinstance(config.adapter, Lora) and config.adapter.use_dora
    kind: tuple[Kind, bool] = "dora" if is_dora else config.adapter.type, uses_autocast
    values = KEPT_VALUES[kind]
    whole = min(config.checkpointed_blocks, shape.num_blocks - 1)  # keep their input alone
    num_values = values[config.recompute] * (shape.num_blocks - 1 - whole) + values["blocks"] * whole
    num_values += values["nothing"]  # of the block that is at work
    num_values += TEMPORARY_INT8 if config.model.quantization == "int8" else TEMPORARY_VALUES[kind]
    per_value = batch_size * size.num_tokens * shape.width * DTYPES[config.model.dtype].itemsize
    weight_bytes = DTYPES[weights_dtype].itemsize
    # Autocast keeps its copies of what trains for the forward pass, and each as long as a linear needs it.
    if uses_autocast and (trains_all or config.recompute == "nothing"):
        weight_bytes += DTYPES[config.model.dtype].itemsize
    weights = model.num_weights * weight_bytes + model.text_bytes
    swapped = num_swapped_values(shape) * weight_bytes
    if config.model.quantization is not None:  # a byte for each of these instead
        weights -= shape.num_quantizable * (weight_bytes - 1)
        swapped -= shape.num_quantizable // shape.num_blocks * (weight_bytes - 1)
    weights -= saved_bytes(swapped, config.blocks_to_swap)
    update = 4 * shape.width**2 * UPDATE_BYTES if trains_all and config.optimizer.releases_gradients else 0
    activations = round(per_value * num_values)
    if config.adapter.type == "loha" and not uses_autocast:
        activations += 4 * shape.width**2 * LOHA_BYTES
    return MemoryCost(weights, round(model.num_trained * trained) + update, activations, values)


def gradient_and_state_bytes(optimizer: AnyOptimizer, dtype: str) -> float:
    """Return the bytes per trained parameter of this dtype: its gradient, and what the optimizer keeps on the device.

    Of a large matrix: there, scales of blocks, sums of rows and counts of steps are next to nothing.
    """
    weight = torch.empty(2**10, 2**10, dtype=DTYPES[dtype], device="meta")
    (state,) = optimizer_state(optimizer, [weight], on_device=True)
    gradient = 0 if optimizer.releases_gradients else weight.nbytes
    return (gradient + sum(tensor.nbytes for tensor in state.values() if tensor.ndim)) / weight.numel()


@dataclass(frozen=True)
class Measured:
    """The measured cost of a training step on micro-batches of one bucket."""

    size: Size
    batch_size: int
    seconds_per_step: float | None  # with all micro-batches of the step; None: memory ran out
    peak_bytes: int  # held at once; where memory ran out, until then

    @property
    def described(self) -> str:
        """The time of a step, or that there was none, in words."""
        if self.seconds_per_step is None:
            return f"out of memory with {format_bytes(self.peak_bytes)} in use"
        return f"{self.seconds_per_step:.3g} s"


def estimated_seconds(
    measured: Sequence[Measured], micro_batches_per_step: int, num_steps: int, num_tokens: int
) -> float | None:
    """Estimate the seconds that a run takes.

    A step's time is linear in its image tokens, and constant outside of what was measured.

    Args:
        measured: of one or more buckets.
        micro_batches_per_step: in each measured step.
        num_steps: of the run.
        num_tokens: image tokens in all steps of the run.

    Returns:
        None where nothing was measured, or memory ran out.
    """
    points = sorted(
        (each.batch_size * each.size.num_tokens * micro_batches_per_step, each.seconds_per_step)
        for each in measured
        if each.seconds_per_step is not None
    )
    if not points or len(points) < len(measured):
        return None
    tokens, seconds = zip(*points, strict=True)
    # The sum of a linear function over all steps is that of their mean.
    return num_steps * float(np.interp(num_tokens / num_steps, tokens, seconds))
