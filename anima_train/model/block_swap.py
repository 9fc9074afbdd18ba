"""Blocks whose weights wait in the host's memory, and are on the device only while they are at work.

The weights of each swapped block are one flat buffer in the host's memory, pinned on CUDA. The device has two buffers
of that size, and a block always comes into the same one: its weights have addresses that never change, so that compiled
blocks, autograd and the optimizer see ordinary parameters. Copies are made by a stream of their own, one block ahead of
the forward pass and one ahead of the backward pass; the device waits for them, the host never does.

Modulations, which are computed for all blocks at once, and low-rank updates stay on the device.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from anima_train.core.transfers import CopyStream
from anima_train.model.dit import MiniTrainDIT, RunBlock, TransformerShape

MAX_BUFFERS = 2  # on the device: for the block that is at work, and for the one that follows
ALIGNMENT = 256  # bytes; what torch's own allocator gives, and kernels expect
STAYS = "adaln_modulation"  # in the name of what stays on the device


def swapped_blocks(num_blocks: int, blocks_to_swap: int) -> list[int]:
    """Return the numbers of the blocks that are swapped, spread evenly: between two of them a copy has more time."""
    return [index * num_blocks // blocks_to_swap for index in range(blocks_to_swap)]


def swaps(name: str, blocks: Sequence[int]) -> bool:
    """Return True if a weight of the transformer, by its full name, belongs to these blocks and is swapped."""
    part, _, rest = name.partition(".")
    return part == "blocks" and int(rest.partition(".")[0]) in blocks and STAYS not in rest


def num_swapped_values(shape: TransformerShape) -> int:
    """Return the number of weights of one block that are swapped."""
    width = shape.width
    attention = 6 * width**2 + 2 * width * shape.context_width + 4 * shape.head_dim
    return attention + 8 * width**2


def saved_bytes(num_bytes: int, blocks_to_swap: int) -> int:
    """Return the bytes of the device's memory that swapping saves.

    Args:
        num_bytes: of the swapped weights of one block.
        blocks_to_swap: number of swapped blocks.
    """
    return num_bytes * max(0, blocks_to_swap - MAX_BUFFERS)


def copied_blocks(
    blocks_to_swap: int, num_micro_batches: int, trains_blocks: bool, changes_in_backward: bool = False
) -> int:
    """Return how many times an optimizer step copies a block's weights between host and device, at most.

    The blocks at which a pass ends are still there when the next one begins, as that goes the other way. Trained blocks
    are copied back after their update, for which they come once more unless it is a part of the backward pass.

    Args:
        blocks_to_swap: number of swapped blocks.
        num_micro_batches: in the step.
        trains_blocks: True for a full fine-tune.
        changes_in_backward: True if the update is a part of the backward pass.
    """
    moving = max(0, blocks_to_swap - MAX_BUFFERS)
    passes = 2 * num_micro_batches * moving
    if not trains_blocks:
        return passes
    return passes + blocks_to_swap * (1 if changes_in_backward or not moving else 2)


@dataclass
class Buffer:
    """Room on the device for the weights of one block at a time."""

    values: Tensor  # bytes
    block: int | None = None  # whose weights it has, or will have after the last copy
    copied: torch.cuda.Event | None = None  # the end of the last copy into or out of it


class BlockSwap:
    """The swapped blocks of a transformer; their weights are moved into the host's memory at once.

    Whatever a block's modules hold before an adapter is attached is moved, of any dtype: parameters, buffers, and
    tensors that are plain attributes.

    Args:
        transformer: whose blocks are swapped; the weights of these may be on the device or on the host.
        blocks_to_swap: the number of them, at least 1.
        device: that computes.
    """

    def __init__(self, transformer: MiniTrainDIT, blocks_to_swap: int, device: torch.device) -> None:
        numbers = swapped_blocks(len(transformer.blocks), blocks_to_swap)
        blocks = [transformer.blocks[number] for number in numbers]
        self.indices = {block: index for index, block in enumerate(blocks)}
        self.copies = CopyStream(device)
        num_bytes = max(flat_bytes(place.tensor for place in tensors_of(block)) for block in blocks)
        self.buffers = [
            Buffer(torch.empty(num_bytes, dtype=torch.uint8, device=device))
            for _ in range(min(MAX_BUFFERS, blocks_to_swap))
        ]
        self.home: dict[str, Tensor] = {}  # the parameters in the host's memory, by name
        self.shown: list[Tensor] = []  # of each block one of its weights on the device
        self.hosts = [
            self.move(block, f"blocks.{number}", self.buffer_of(index))
            for index, (number, block) in enumerate(zip(numbers, blocks, strict=True))
        ]
        self.current: int | None = None  # the block that is at work
        self.changes = False  # True if its weights are changed while it is
        self.changes_in_backward = False  # True if each backward pass updates weights as soon as it has their gradients

    @property
    def host_bytes(self) -> int:
        """The bytes of the host's memory that the blocks' weights take."""
        return sum(host.nbytes for host in self.hosts)

    def buffer_of(self, index: int) -> Buffer:
        """Return the buffer of the swapped block with this index."""
        return self.buffers[index % len(self.buffers)]

    def move(self, block: nn.Module, name: str, buffer: Buffer) -> Tensor:
        """Move a block's weights into a flat buffer of the host's memory, which is returned; views take their place."""
        found = list(tensors_of(block, name))
        tensors = [place.tensor for place in found]
        host = self.copies.host_buffer(flat_bytes(tensors))
        for place, waiting, shared in zip(found, views(host, tensors), views(buffer.values, tensors), strict=True):
            waiting.copy_(place.tensor.detach())
            working = shared.data  # else a copy, or another block's update, would count as a change of this weight
            if isinstance(place.tensor, nn.Parameter):
                self.home[place.name] = waiting
                working = nn.Parameter(working, place.tensor.requires_grad)
            place.owner[place.key] = working
        self.shown.append(working)
        return host

    def around(self, run: RunBlock) -> RunBlock:
        """Return a way to run a block that brings the weights of swapped ones, forward and backward."""

        def run_swapped(block: Any, *inputs: Any) -> Tensor:
            index = self.indices.get(block)
            if index is None:
                return run(block, *inputs)
            storage = self.shown[index].untyped_storage()
            # Else it would compute with what was in the buffer then, and nobody would notice.
            assert storage._cdata == self.buffer_of(index).values.untyped_storage()._cdata, "the weights were moved"
            self.bring(index, index + 1)
            out = run(block, *inputs)
            return BeforeBackward.apply(out, partial(self.bring_back, index)) if out.requires_grad else out

        return run_swapped

    def bring_back(self, index: int) -> None:
        """Have a block's weights on the device for its backward pass."""
        self.bring(index, index - 1)
        self.changes = self.changes_in_backward

    def bring(self, index: int, following: int) -> None:
        """Have a block's weights on the device for what it is told next, and those of the block after that on the way.

        What the device was told before is all that the blocks before this one have to do: autograd goes backward
        through the nodes of a block before those of the blocks that ran before it.
        """
        self.leave()
        self.load(index)
        self.copies.wait(self.buffer_of(index).copied)
        self.current = index
        if 0 <= following < len(self.hosts) and self.buffer_of(following) is not self.buffer_of(index):
            self.load(following)

    def load(self, index: int) -> None:
        """Copy a block's weights to the device, if they are not there, when it has done all that it was told."""
        buffer = self.buffer_of(index)
        if buffer.block != index:
            buffer.copied = self.copies.copy(self.hosts[index], buffer.values)
            buffer.block = index

    def leave(self) -> None:
        """End the work on a block; what has changed is copied back."""
        if self.current is not None and self.changes:
            buffer = self.buffer_of(self.current)
            buffer.copied = self.copies.copy(buffer.values, self.hosts[self.current])
        self.current, self.changes = None, False

    @cached_property
    def trained(self) -> list[list[nn.Parameter]]:
        """The weights that get updates, block by block; an adapter is attached before the first look."""
        return [
            [
                place.tensor
                for place in tensors_of(block)
                if isinstance(place.tensor, nn.Parameter) and place.tensor.requires_grad
            ]
            for block in self.indices
        ]

    @property
    def trains(self) -> bool:
        """True if weights of swapped blocks get updates."""
        return any(self.trained)

    def updates(self) -> Iterator[list[nn.Parameter]]:
        """Yield the trained weights of each block while they are on the device, to be changed."""
        for index, parameters in enumerate(self.trained):
            self.bring(index, index + 1)
            self.changes = True
            yield parameters
        self.leave()
        self.load(0)  # where the next pass begins

    def waiting(self) -> Mapping[str, Tensor]:
        """Return the parameters of swapped blocks in the host's memory, by name, to be read or changed between steps.

        Waits for the copies to the host.
        """
        self.leave()
        self.copies.finish()
        for buffer in self.buffers:
            buffer.block = None  # the device's copies may be out of date soon
        return self.home


class BeforeBackward(torch.autograd.Function):
    """A block's output as it is; something is called before the gradient goes on into the block."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.call()
        return gradient, None


@dataclass(frozen=True)
class Place:
    """The place of a tensor in a module."""

    name: str  # in the transformer
    owner: dict[str, Any]
    key: str  # in `owner`
    tensor: Tensor


def tensors_of(block: nn.Module, block_name: str = "") -> Iterator[Place]:
    """Yield the tensors of a block that are swapped: all but those of modulations and of low-rank updates."""
    for name, module in block.named_modules(prefix=block_name):
        if STAYS in name:
            continue
        for owner in (module._parameters, module._buffers, vars(module)):
            for key, value in list(owner.items()):
                if isinstance(value, Tensor) and not key.startswith("lora_"):
                    yield Place(f"{name}.{key}", owner, key, value)


def flat_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of a flat buffer for these tensors, each of them aligned."""
    return sum(aligned(tensor.nbytes) for tensor in tensors)


def aligned(num_bytes: int) -> int:
    """Return this number, or the next one that is a multiple of the alignment."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def views(flat: Tensor, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield views of a flat buffer in shape, strides and dtype of these tensors, one after the other."""
    start = 0
    for tensor in tensors:
        values = flat[start : start + tensor.nbytes].view(tensor.dtype)
        yield values.as_strided(tensor.shape, tensor.stride(), values.storage_offset())
        start += aligned(tensor.nbytes)
