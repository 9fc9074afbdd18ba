"""A transformer divided among the processes of a run, by torch's FSDP2.

Each process holds some rows of every weight. A block's weights are gathered while the block is computed, forward and
backward, and its gradients are summed and divided as soon as they are there. Optimizer, average and clipping know
nothing of it: they work on this process's rows, which are parameters of their own.
"""

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from anima_train.core.divided import local
from anima_train.model.dit import Block, MiniTrainDIT, RunBlock
from anima_train.model.modulations import modulation_of, split_modulations


class Shards:
    """The rows of a divided transformer's trained parameters that this process holds.

    Args:
        transformer: with what is trained attached, the same on all processes; it is divided.
        device_type: of its weights.
        compute_dtype: to which weights are converted as they are gathered; None: they are in it. Their gradients are
            summed in float32 then.
    """

    def __init__(self, transformer: MiniTrainDIT, device_type: str, compute_dtype: torch.dtype | None = None) -> None:
        self.mesh = init_device_mesh(device_type, (torch.distributed.get_world_size(),))
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # t is float32
        if compute_dtype is not None:
            policy = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
        divide = partial(fully_shard, mesh=self.mesh, mp_policy=policy, reshard_after_forward=True)
        for block in transformer.blocks:
            assert isinstance(block, Block)
            divide(block)
            # What gathers the weights runs around `forward`: a compiled or recomputed block has to be inside of it.
            block.forward = partial(run_with_modulations, transformer.run_block, block)  # type: ignore[method-assign]
        if hasattr(transformer, "llm_adapter"):
            divide(transformer.llm_adapter)
        # Divided again after the forward pass, too, as a pass without gradients is followed by other weights.
        divide(transformer)
        transformer.run_block = call_block
        transformer.modulation_batches = None
        transformer.blocks_modulate = True
        self.parameters: dict[str, nn.Parameter] = {}  # trained, this process's rows, by name
        self.shapes: dict[str, torch.Size] = {}  # of the whole parameters
        for name, parameter in transformer.named_parameters():
            if parameter.requires_grad:
                assert isinstance(parameter, DTensor)
                rows = nn.Parameter(local(parameter))
                parameter.register_post_accumulate_grad_hook(partial(hand_over, rows))  # type: ignore[no-untyped-call]
                self.parameters[name] = rows
                self.shapes[name] = parameter.shape

    def rows(self, tensor: Tensor) -> Tensor:
        """Return the rows of a whole tensor that this process holds, without the others; a number as it is."""
        return rows_of(tensor, self.mesh.get_local_rank(), self.mesh.size())

    def divided(self, name: str, rows: Tensor) -> Tensor:
        """Return the tensor of which this process has these rows, as a parameter's; a number as it is.

        Args:
            name: of the parameter.
            rows: of it, or of a tensor of its shape.
        """
        if rows.ndim == 0:
            return rows
        shape = self.shapes[name]
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(rows.detach(), self.mesh, [Shard(0)], shape=shape, stride=stride)


def rows_of(tensor: Tensor, rank: int, num_ranks: int) -> Tensor:
    """Return a copy of the rows that a process holds, as `torch.chunk` divides them; a number as it is."""
    if tensor.ndim == 0:
        return tensor
    size = -(-len(tensor) // num_ranks)  # of all but the last
    start = min(rank * size, len(tensor))
    return tensor[start : start + size].clone()


def call_block(block: Block, *inputs: Any) -> Tensor:
    """Run a divided block, its weights gathered around it."""
    out: Tensor = block(*inputs)
    return out


def run_with_modulations(
    run: RunBlock, block: Block, tokens: Tensor, sources: tuple[Tensor, Tensor, Tensor | None], *inputs: Any
) -> Tensor:
    """Run a block, whose modulations are made while its weights are there.

    Args:
        run: the way to run a block.
        block: its weights gathered.
        tokens: before it.
        sources: what its modulations read (B, D), what they add (B, 3D), and t for updates with limits.
        inputs: the others of `Block.forward`.
    """
    emb, shared, t = sources
    made = torch.stack([modulation_of(pair, emb, t) for pair in block.modulations])
    (modulations,) = split_modulations(made + shared)
    return run(block, tokens, modulations, *inputs)


def hand_over(rows: nn.Parameter, parameter: DTensor) -> None:
    """Give a gradient to the parameter that the optimizer updates, added to those of earlier micro-batches."""
    assert isinstance(parameter.grad, DTensor)
    gradient = parameter.grad.to_local()
    parameter.grad = None
    if rows.grad is None:
        rows.grad = gradient
    else:
        rows.grad += gradient


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest that differs where any bit of any tensor does, as sums of integers: the same on all devices."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total = tensor.detach().view(integers[tensor.element_size()]).sum(dtype=torch.int64)
        digest.update(f"{name} {tuple(tensor.shape)} {int(total)}".encode())
    return digest.hexdigest()
