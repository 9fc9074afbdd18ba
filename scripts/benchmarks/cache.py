"""`cache`: decoding and scaling a folder of JPEG and PNG to 512-pixel buckets.

The threads that fill the cache, against as many threads, and as many processes, that do nothing but call Pillow.
"""

import argparse
import concurrent.futures
import hashlib
import multiprocessing
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from anima_train.caching.fill import decoded
from anima_train.data.buckets import aspect_ratios, nearest, size_of
from anima_train.data.cache import Cache
from anima_train.data.decoding import pixels
from anima_train.data.images import Crop, cover_box
from anima_train.data.loader import Entry
from anima_train.data.samples import Picture, Sample, View
from anima_train.data.settings import DirectoryOptions
from benchmarks.timing import seconds

SLICE = 100  # images decoded by one way before the other has its turn
DISTINCT = 60  # images that are really made; the others are the same again


def write_photo(path: Path, generator: np.random.Generator) -> None:
    """An image with 700 to 2000 pixels on each side that compresses about as a photo does."""
    width, height = (int(side) for side in generator.integers(700, 2001, 2))
    x, y = np.meshgrid(np.linspace(0, 3, width), np.linspace(0, 3, height))
    smooth = [100 + 80 * np.sin(x * a + b) * np.cos(y * c) for a, b, c in generator.uniform(0.5, 4, (3, 3))]
    grain = generator.normal(0, 6, (height, width, 1))
    picture = np.stack(smooth, axis=-1) + grain + generator.normal(0, 1, (height, width, 3))
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path, quality=92)


def write_photos(folder: Path, number: int) -> list[Entry[View]]:
    """JPEG and PNG files by turns, and the cache entries that are made of them."""
    generator = np.random.default_rng(0)
    sizes = [size_of(512, aspect) for aspect in aspect_ratios(0.5, 2.0, 9)]
    cache = Cache(folder / "cache")
    entries = []
    for index in range(min(number, DISTINCT)):
        path = folder / f"{index}.{('jpg', 'png')[index % 2]}"
        write_photo(path, generator)
        with Image.open(path) as image:
            width, height = image.size
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        picture = Picture(path, path, digest, width, height)
        sample = Sample(path.name, picture, nearest(width / height, sizes), 512, 0, DirectoryOptions(), cache)
        entries.append(Entry(cache, "latent", View(sample).latent_key("vae"), View(sample)))
    total = sum(entry.source.sample.picture.path.stat().st_size for entry in entries)
    print(f"{number:,} images, {len(entries)} of them distinct, {total / len(entries) / 1e6:.1f} MB each on average")
    return [entries[index] for index in generator.integers(0, len(entries), number)]


def bare_pillow(work: tuple[Path, Crop]) -> None:
    """What any trainer has to do, and nothing else."""
    path, crop = work
    with Image.open(path) as image:
        box = cover_box(image.size, crop)
        np.asarray(image.convert("RGB").resize((crop.width, crop.height), Image.Resampling.LANCZOS, box=box))


def run(options: argparse.Namespace) -> None:
    """Decoding and scaling, without the VAE."""
    device = torch.device(options.device)
    context = multiprocessing.get_context("spawn")  # forked processes break where there are threads
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ThreadPoolExecutor(options.workers) as threads,
        concurrent.futures.ProcessPoolExecutor(options.workers, context) as processes,
    ):
        entries = write_photos(Path(folder), (options.images or 2_000))

        def ours(part: Sequence[Entry[View]]) -> None:
            for _ in decoded(part, pixels, options.workers, batch_size=8):
                pass

        def in_threads(part: Sequence[Entry[View]]) -> None:
            for _ in threads.map(bare_pillow, map(work_of, part)):
                pass

        def in_processes(part: Sequence[Entry[View]]) -> None:
            for _ in processes.map(bare_pillow, map(work_of, part), chunksize=4):
                pass

        # Some at a time in turn, so that what else the machine does falls on all.
        ways = (ours, in_threads, in_processes)
        parts = [entries[start : start + SLICE] for start in range(0, len(entries), SLICE)] * options.rounds
        for way in ways:  # threads and processes start, files are read
            way(parts[0])
        rows = [[seconds(partial(way, part), device) for way in ways] for part in parts]
        totals = [sum(times) for times in zip(*rows, strict=True)]
        print(
            f"ours {totals[0]:.1f} s, bare threads {totals[1]:.1f} s, bare processes {totals[2]:.1f} s "
            f"for {len(entries) * options.rounds:,} images, {options.workers} at once"
        )
        for name, column in (("bare threads", 1), ("bare processes", 2)):
            ratios = sorted(row[0] / row[column] for row in rows)
            spread = f"from {ratios[0]:.3f} to {ratios[-1]:.3f}"
            print(f"ours / {name} for {len(parts[0])} images: median {statistics.median(ratios):.3f}, {spread}")
        print(f"ours / the better of both, in all: {totals[0] / min(totals[1:]):.3f}")


def work_of(entry: Entry[View]) -> tuple[Path, Crop]:
    """A file, and what is to be made of it."""
    return entry.source.sample.picture.path, entry.source.crop
