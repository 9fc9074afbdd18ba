"""The activations that blocks keep for the backward pass, and what is computed again instead."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from anima_train.core.transfers import pinned_copy
from anima_train.model.dit import Block, RunBlock, run_block

aten = torch.ops.aten

Recompute = Literal["nothing", "selective", "blocks", "offload"]
POLICIES: tuple[Recompute, ...] = get_args(Recompute)  # each keeps less than the one before it, and takes longer

# Kept by "selective": what takes long to compute. `addmm_` adds to what `mm` or `integer_product` gave: both are one
# tensor, and have to be, as an operation in place gives the tensor that it was called with, whatever is kept.
PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.addmm_.default,
    aten.bmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.anima_train.integer_product.default,
}


def keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Return the policy of "selective": products and attention are kept, all else is computed again."""
    return CheckpointPolicy.MUST_SAVE if operation in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def runner(recompute: Recompute) -> RunBlock:
    """Return the way to run a block in training.

    Args:
        recompute: "nothing"; "selective": all but products and attention; "blocks": all but each block's input;
            "offload": the same, for `offloading` around it.
    """
    contexts: dict[str, Any] = {}
    if recompute == "selective":
        # The products' results are added to in place before they are used: that is no mistake here.
        create = partial(create_selective_checkpoint_contexts, keep_products, allow_cache_entry_mutation=True)
        contexts["context_fn"] = create

    def run(block: Block, *inputs: Any) -> Tensor:
        if recompute == "nothing" or not torch.is_grad_enabled():  # without gradients nothing is kept anyway
            return run_block(block, *inputs)
        out: Tensor = checkpoint(run_block, block, *inputs, use_reentrant=False, **contexts)
        return out

    return run


def mixed(first: RunBlock, others: RunBlock, num_first: int) -> RunBlock:
    """Return a way to run a block: one for the first blocks, another for those after them.

    The backward pass reaches the first blocks last, when what the others kept is freed already: so what they compute
    again adds nothing to the peak. Without gradients nothing is kept, and all blocks are run as the others are: what is
    compiled for that is compiled once.
    """

    def run(block: Block, *inputs: Any) -> Tensor:
        is_first = block.index < num_first and torch.is_grad_enabled()
        return (first if is_first else others)(block, *inputs)

    return run


def offloading(run: RunBlock) -> RunBlock:
    """Return a way to run a block that keeps its tokens in the host's memory until the backward pass."""

    def run_kept(block: Block, tokens: Tensor, *inputs: Any) -> Tensor:
        with kept_on_host(tokens):
            return run(block, tokens, *inputs)

    return run_kept


@contextlib.contextmanager
def kept_on_host(tokens: Tensor) -> Iterator[None]:
    """Keep these tokens in the host's memory where they are saved for the backward pass, without a wait for a copy.

    The copies are in the order of the device's other work, so that none of them is read or freed too early.
    """

    storage = tokens.untyped_storage()._cdata  # no more: torch keeps `pack` until the backward pass

    def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if tensor.untyped_storage()._cdata != storage:
            return tensor
        return tensor.device, pinned_copy(tensor) if tensor.is_cuda else tensor.to("cpu", copy=True)

    def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        return host.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
