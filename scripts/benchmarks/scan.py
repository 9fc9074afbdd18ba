"""`scan`: the time and memory of the first and the second look at a folder of images, and of the plan of an epoch."""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.timing import child_environment

DISTINCT = 60  # images that are really made; the others are the same again

SCAN = """
import resource, sys, time
start = time.perf_counter()
from pathlib import Path
from anima_train.data.cache import Cache
from anima_train.data.plan import Plan
from anima_train.data.settings import DatasetSettings
from anima_train.data.scan import scan
imported = time.perf_counter()
folder = Path(sys.argv[1])
dataset = DatasetSettings(directory=[{"path": str(folder)}], min_image_side=1, resolutions=[512])
found = scan(dataset, [folder], [None], [Cache(folder / ".anima_cache")], seed=0, write=True)
scanned = time.perf_counter()
steps = Plan(found.samples, 0, 1, 1).epoch(0)
planned = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
print(f"{len(found.samples):,} samples, {len(steps):,} steps: imports {imported - start:.1f} s, "
      f"scan {scanned - imported:.1f} s, plan {planned - scanned:.1f} s; peak memory {peak:.2f} GB")
"""


def write_noise(path: Path, generator: np.random.Generator, height: int, width: int) -> None:
    """A small image."""
    Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


def run(options: argparse.Namespace) -> None:
    """Looking at many images, each time in a new process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generator = np.random.default_rng(0)
        for index in range(options.images or 100_000):
            path = folder / f"image_{index:07}.png"
            if index < DISTINCT:
                write_noise(path, generator, 8 + index % 5, 8 + index % 7)
            else:
                path.write_bytes((folder / f"image_{index % DISTINCT:07}.png").read_bytes())
            path.with_suffix(".txt").write_text(f"one, two, three, four, five, six, number {index}", encoding="utf-8")
        for start in ("first", "second"):
            began = time.perf_counter()
            command = [sys.executable, "-c", SCAN, name]
            found = subprocess.run(command, env=child_environment(), check=True, capture_output=True)
            print(f"{start} start, {time.perf_counter() - began:.1f} s in all: {found.stdout.decode().strip()}")
