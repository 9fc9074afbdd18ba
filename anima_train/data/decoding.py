"""Images to the pixels and masks that are encoded; threads call it, as Pillow decodes and resizes without the GIL."""

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from anima_train.core.budget import ByteBudget
from anima_train.core.errors import DataError
from anima_train.data.image_headers import BadImage, Unreadable
from anima_train.data.images import cover_and_crop, decode_alpha, decode_mask, load_picture, mask_to_latent
from anima_train.data.samples import Sample, View
from anima_train.data.sources.archive import ArchiveMember, content_of

MIN_THREADS = 2
MAX_THREADS = 16  # more than any VAE needs
BYTES_PER_PIXEL = 8  # of a picture while it is decoded: as it is stored, with its opacity, and as it becomes
DECODING = ByteBudget(2 * 2**30)  # what the threads of this process hold of pictures that they decode


def num_decoding_threads(processes_on_this_machine: int) -> int:
    """Return how many threads decode in each process of a run: its share of the CPUs, from 2 to 16."""
    return min(MAX_THREADS, max(MIN_THREADS, usable_cpus() // processes_on_this_machine))


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    if sys.version_info >= (3, 13):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pixels(view: View) -> np.ndarray:
    """Return a view's pixels, (h, w, 3) uint8.

    Raises:
        BadImage: the image cannot be decoded; `Unreadable` if it cannot be read, or is another one by now.
        DataError: there is not enough memory.
    """
    picture = view.sample.picture
    with name_image_if_memory_runs_out(view), DECODING.hold(decoded_bytes(view)):
        return np.array(cover_and_crop(load_picture(verified_content(picture.source, picture.sha256)), view.crop))


def mask(view: View) -> np.ndarray:
    """Return a view's mask, (1, h // 8, w // 8) float32 in [0, 1]: of its file, of the image's opacity, or the product.

    Raises:
        BadImage: as `pixels`, of the mask file or of the image.
        DataError: there is not enough memory.
    """
    with name_image_if_memory_runs_out(view), DECODING.hold(decoded_bytes(view)):
        return mask_to_latent(mask_image(view.sample), view.crop)


def mask_image(sample: Sample) -> Image.Image:
    """Return the mask of all of a sample's picture, in its size: 8-bit grey (mode L), white = train.

    Raises:
        BadImage: as `pixels`, of the mask file or of the image.
    """
    picture = sample.picture
    size = (picture.width, picture.height)
    weights = Image.new("L", size, "white")
    if picture.mask is not None:
        try:
            weights = decode_mask(verified_content(picture.mask, picture.mask_sha256), size)
        except BadImage as error:
            name = f" {picture.mask.name}" if isinstance(picture.mask, Path) else ""
            raise type(error)(f"its mask{name}: {error}") from error
    if sample.masks_alpha:
        alpha = decode_alpha(verified_content(picture.source, picture.sha256))
        alpha = alpha.resize(size, Image.Resampling.BILINEAR)
        weights = Image.composite(weights, Image.new("L", size), alpha)  # the product, rounded to nearest
    return weights


def decoded_bytes(view: View) -> int:
    """Return about how many bytes a view's picture takes while it is decoded."""
    return view.sample.picture.width * view.sample.picture.height * BYTES_PER_PIXEL


def verified_content(source: Path | ArchiveMember, sha256: str) -> bytes:
    """Return the bytes of a file, read once, so that what is decoded is what has been checked.

    Raises:
        BadImage: as `content_of`; `Unreadable` if they are not the bytes with this hash.
    """
    content = content_of(source)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise Unreadable("changed while the run was starting")
    return content


@contextlib.contextmanager
def name_image_if_memory_runs_out(view: View) -> Iterator[None]:
    """Turn a `MemoryError` into a `DataError` that names the image: it is not the image that is bad."""
    try:
        yield
    except MemoryError as error:
        raise DataError(f"{view.sample.id}: there is not enough memory to decode it") from error
