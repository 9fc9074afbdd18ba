"""A run whose transformer is divided among its processes."""

import logging
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anima_train.core.errors import ConfigError, ModelFileError
from anima_train.core.text_batch import EncodedText, TextStates, pad_states
from anima_train.distributed.consistency import differences
from anima_train.distributed.lockstep import Lockstep
from anima_train.model.dit import MiniTrainDIT
from anima_train.model.lora_linear import DoraLinear
from anima_train.optim.optimizers import AnyOptimizer
from anima_train.training.context import RunContext

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from anima_train.model.sharding import Shards
    from anima_train.training.setup import TrainState

TRANSFORMER, LLM_ADAPTER = 0, 1  # kinds of passes
# Those that treat each weight by itself: an update of some rows is then those rows of the update of all.
ELEMENTWISE = ("adamw", "adamw_optimi")
WHOLE = {"rounding": "stochastic", "moments_device": "cpu", "moments_dtype": "8bit"}  # settings that need whole weights


def divide(run: RunContext, transformer: MiniTrainDIT, compute_dtype: torch.dtype | None) -> "Shards":
    """Divide a transformer among the processes, which have read the same one.

    Args:
        run: the run.
        transformer: with what is trained attached.
        compute_dtype: to which weights are converted to compute; None: they are in it.

    Raises:
        ConfigError: it has DoRA.
        ModelFileError: they have read different ones.
    """
    from anima_train.model.sharding import Shards, checksum  # takes long to import

    if any(isinstance(module, DoraLinear) for module in transformer.modules()):
        raise ConfigError("sharding: excludes adapter.use_dora, whose lengths are of whole rows; remove one of them")

    tensors = dict(transformer.named_parameters())
    if problems := differences(run.accelerator, {"the transformer's weights": checksum(tensors)}):
        raise ModelFileError([*problems, "all processes must read the same model: copy its files to all machines"])
    logger.info("sharding: the model is divided among %d processes (FSDP2)", run.accelerator.num_processes)
    return Shards(transformer, run.device.type, compute_dtype)


def check_can_divide(optimizer: AnyOptimizer, blocks_to_swap: int, quantization: str | None, preserves: bool) -> None:
    """Refuse to divide what an optimizer has to see as a whole, and weights that are not plain ones on the device.

    Raises:
        ConfigError: something of that is configured.
    """
    if preserves:
        raise ConfigError("sharding: excludes [preservation]: a process asks the base alone; remove one of them")
    if blocks_to_swap:
        raise ConfigError("sharding: excludes blocks_to_swap: each weight is in one place alone; remove one of them")
    if quantization is not None:
        raise ConfigError(
            f'sharding: excludes model.transformer_dtype = "{quantization}", whose weights belong to their scales; '
            "remove one of them"
        )
    if optimizer.type not in ELEMENTWISE:
        raise ConfigError(
            f'sharding: optimizer.type "{optimizer.type}" needs whole weights, or a state of them, and each process '
            f"holds some rows of each; use {' or '.join(ELEMENTWISE)}, or start without sharding"
        )
    for key, value in WHOLE.items():
        if getattr(optimizer, key, None) == value:
            raise ConfigError(
                f'sharding: excludes optimizer.{key} = "{value}", as each process holds some rows of each weight; '
                "remove it, or start without sharding"
            )


def divided_passes(run: RunContext, state: "TrainState") -> Lockstep:
    """Return the passes that process 0 leads: of the transformer on a context, and of its LLM adapter."""
    passes = [partial(make, state.transformer, run.device) for make in (transformer_pass, adapter_pass)]
    return Lockstep(run.signals, passes)


def whole_pass(transformer: MiniTrainDIT, device: torch.device) -> Tensor:
    """Run the transformer as on a batch of training, on nothing in particular."""
    if not hasattr(transformer, "llm_adapter"):
        return transformer_pass(transformer, device)
    text = EncodedText(torch.zeros(5, transformer.llm_adapter.shape.source_width), torch.ones(5, dtype=torch.long))
    return transformer_pass(transformer, device, pad_states([text] * 2).to(device))


@torch.no_grad()
def transformer_pass(
    transformer: MiniTrainDIT, device: torch.device, text: Tensor | TextStates | None = None
) -> Tensor:
    """Run the transformer on nothing in particular: no side is 1, and none is like another, see `model.compiled`."""
    shape = transformer.shape
    latents = torch.zeros(2, shape.in_channels, 1, 6, 4, device=device)
    if text is None:
        text = torch.zeros(2, 5, shape.context_width, device=device)
    velocity: Tensor = transformer(latents, torch.zeros(2, 1, device=device), text)
    return velocity


@torch.no_grad()
def adapter_pass(transformer: MiniTrainDIT, device: torch.device) -> Tensor:
    """Run the LLM adapter on nothing in particular."""
    llm_adapter = transformer.llm_adapter
    source = torch.zeros(1, 2, llm_adapter.shape.source_width, device=device)
    context: Tensor = llm_adapter(source, torch.zeros(1, 3, dtype=torch.long, device=device))
    return context
