"""The number of images or captions that are encoded at once."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch

from anima_train.core.device import free_device_bytes, is_out_of_memory, release_memory
from anima_train.data.loader import Entry
from anima_train.data.samples import View

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")
Decoded = tuple[Entry[View], np.ndarray]

# Of a GPU, a batch takes at most half of the free memory, and is no larger than what keeps it busy.
SHARE = 0.5
MAX_PIXELS = 4 * 1024**2
MAX_IMAGES = 64
MAX_CAPTIONS = 32
ENCODER_TENSORS = 7  # of full resolution and the first width, that live at once (6.2 in bfloat16), with some room


class BatchSize:
    """The number of items that are encoded at once: given, or chosen, and then halved when memory runs out.

    Args:
        given: that the configuration forces; None: it is chosen.
        choose: returns the number for items of this many pixels each; not asked if one is given.
    """

    def __init__(self, given: int | None, choose: Callable[[int], int]) -> None:
        self.given = given
        self.choose = choose
        self.num_halvings = 0

    def number(self, num_pixels: int = 0) -> int:
        """Return the number of items at once, if each has this many pixels; at least 1."""
        if self.given is not None:
            return self.given
        return max(1, self.choose(num_pixels) >> self.num_halvings)

    def halve(self, failed: int, num_pixels: int = 0) -> bool:
        """Make it smaller than the number that did not fit; return False if it is given, or was one item alone."""
        if self.given is not None or failed == 1:
            return False
        while self.number(num_pixels) >= failed:
            self.num_halvings += 1
        return True


def image_batch_size(given: int | None, device: torch.device, base_channels: int, value_bytes: int) -> BatchSize:
    """Return the number of images that the VAE, which is on the device, takes at once; arguments as below."""
    if device.type != "cuda":
        return BatchSize(given, lambda _: 1)
    free = free_device_bytes(device)
    return BatchSize(given, lambda num_pixels: images_at_once(num_pixels, base_channels, value_bytes, free))


def caption_batch_size(given: int | None, device: torch.device, caption_bytes: float) -> BatchSize:
    """Return the number of captions, of so many bytes each, that the text encoder on the device takes at once."""
    number = captions_at_once(free_device_bytes(device), caption_bytes) if device.type == "cuda" else 1
    return BatchSize(given, lambda _: number)


def images_at_once(num_pixels: int, base_channels: int, value_bytes: int, free_bytes: float) -> int:
    """Return the number of images that suits a GPU; fused attention is counted on, else `BatchSize` is halved.

    Args:
        num_pixels: of each image.
        base_channels: of the VAE's first convolution.
        value_bytes: of each number that the VAE computes with.
        free_bytes: of the device.
    """
    image_bytes = ENCODER_TENSORS * base_channels * num_pixels * value_bytes
    return max(1, min(MAX_IMAGES, MAX_PIXELS // num_pixels, int(SHARE * free_bytes / image_bytes)))


def captions_at_once(free_bytes: float, caption_bytes: float) -> int:
    """Return the number of captions, of so many bytes each, that suits a GPU with this much free memory."""
    return max(1, min(MAX_CAPTIONS, int(SHARE * free_bytes / caption_bytes)))


def encoded(
    batch: Sequence[Item], encode: Callable[[Sequence[Item]], Result], size: BatchSize, device: torch.device,
    num_pixels: int = 0,
) -> Iterator[tuple[Sequence[Item], Result]]:  # fmt: skip
    """Yield the parts of a batch with what `encode` makes of them: one, unless memory runs out.

    Args:
        batch: to be encoded.
        encode: makes the result of some items at once.
        size: of which the batch has been made; halved for all that follows when memory runs out.
        device: that encodes.
        num_pixels: of each item.

    Raises:
        RuntimeError, MemoryError: memory runs out, and `size` is given or was one item alone.
    """
    start = 0
    while start < len(batch):
        part = batch[start : start + size.number(num_pixels)]
        try:
            result = encode(part)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not size.halve(len(part), num_pixels):
                raise
        else:
            yield part, result
            start += len(part)
            continue
        release_memory(device)  # out of the handler, which keeps the tensors of the failure
        number = size.number(num_pixels)
        logger.warning(f"memory ran out with {len(part)} at once while the cache is filled; it goes on with {number}")


def batches_of_one_size(items: Iterable[Decoded], size: BatchSize) -> Iterator[list[Decoded]]:
    """Yield the items in batches of images of the same size, of which the last may be smaller."""
    batch: list[Decoded] = []
    for entry, value in items:
        if batch and (len(batch) >= size.number(num_pixels(value)) or batch[0][1].shape != value.shape):
            yield batch
            batch = []
        batch.append((entry, value))
    if batch:
        yield batch


def num_pixels(image: np.ndarray) -> int:
    """Return the pixels of an image of shape (h, w, 3)."""
    return image.shape[0] * image.shape[1]
