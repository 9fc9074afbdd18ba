"""`soak`: a long run of the tiny model in a process of its own: its memory, open files and threads, by quarters.

Fails where they grow. On Linux.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tomli_w

from anima_train.model.tiny import write_tiny
from benchmarks.scan import write_noise
from benchmarks.timing import child_environment

LOOK_EVERY = 0.1  # seconds
MAX_GROWTH = 0.02  # of memory, from the second quarter of a run to its last


@dataclass(frozen=True)
class Look:
    """What a running process holds at one time."""

    step: int
    resident_bytes: int
    num_descriptors: int
    num_threads: int
    num_files: int  # in the run's folder

    @classmethod
    def at(cls, pid: int, run: Path) -> "Look | None":
        """Look at a process; None before its first step, and after its end."""
        process = Path(f"/proc/{pid}")
        try:
            step = (run / "metrics.jsonl").read_bytes().count(b"\n")
            pages = int((process / "statm").read_text().split()[1])
            descriptors = os.listdir(process / "fd")
            threads = os.listdir(process / "task")
        except (FileNotFoundError, ProcessLookupError, IndexError):
            return None
        files = sum(len(names) for *_, names in os.walk(run))
        return cls(step, pages * os.sysconf("SC_PAGE_SIZE"), len(descriptors), len(threads), files)


def soak_config(folder: Path, steps: int) -> Path:
    """A run in which something happens after nearly every step: it saves, evaluates, draws and rotates."""
    write_tiny(folder / "tiny")
    generator = np.random.default_rng(0)
    images = folder / "images"
    images.mkdir()
    for index, (height, width) in enumerate([(96, 96), (80, 128), (128, 80)] * 4):
        write_noise(images / f"{index}.png", generator, height, width)
        (images / f"{index}.txt").write_text(f"one, two, number {index}", encoding="utf-8")
    dataset = {"resolutions": [96], "num_ar_buckets": 3, "directory": [{"path": str(images)}]}
    keys = {
        "output_dir": str(folder / "runs"),
        "run_name": "soak",
        "max_steps": steps,
        "dataset": dataset,
        "eval_datasets": [{"name": "held", "config": dataset}],
        "model": {"type": "anima", "tiny_path": str(folder / "tiny"), "dtype": "float32", "llm_adapter_lr": 0},
        "adapter": {"type": "lora", "rank": 4},
        "optimizer": {"type": "adamw", "lr": 1e-4},
        "sampling": {"prompts": ["one"], "steps": 2, "width": 64, "height": 64, "every_n_steps": 11},
        "save_every_n_steps": 13,
        "checkpoint_every_n_steps": 7,
        "keep_last": 2,
        "eval_every_n_steps": 17,
    }
    path = folder / "soak.toml"
    path.write_text(tomli_w.dumps(keys), encoding="utf-8")
    return path


def run(options: argparse.Namespace) -> None:
    """Whether a long run stays as it is.

    Raises:
        SystemExit: it has failed, or has grown.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "anima_train", str(soak_config(folder, options.steps))]
        looks: list[Look] = []
        with (
            open(folder / "output.txt", "w+", encoding="utf-8") as output,
            subprocess.Popen(command, env=child_environment(), stdout=output, stderr=output) as process,
        ):
            while process.poll() is None:
                if look := Look.at(process.pid, folder / "runs" / "soak"):
                    looks.append(look)
                time.sleep(LOOK_EVERY)
            if process.returncode:
                output.seek(0)
                sys.exit(output.read())
    judge(looks, options.steps)


def judge(looks: Sequence[Look], steps: int) -> None:
    """Print what a run held, by quarters, and whether that grew.

    Raises:
        SystemExit: it did.
    """
    quarters: list[list[Look]] = [[], [], [], []]
    for look in looks:
        quarters[min(3, look.step * 4 // steps)].append(look)
    if not all(quarters):
        sys.exit(f"{steps} steps are too few to look at; raise --steps")
    print(f"{'steps to':>8} {'looks':>6} {'resident MB':>12} {'descriptors':>12} {'threads':>8} {'files':>6}")
    memory = [statistics.mean(look.resident_bytes for look in quarter) for quarter in quarters]
    # Not the maximum, which depends on whether a look met with files that were just being read.
    descriptors = [statistics.median_high(look.num_descriptors for look in quarter) for quarter in quarters]
    for index, quarter in enumerate(quarters):
        threads = max(look.num_threads for look in quarter)
        print(
            f"{quarter[-1].step:>8,} {len(quarter):>6,} {memory[index] / 1e6:>12.1f} {descriptors[index]:>12} "
            f"{threads:>8} {quarter[-1].num_files:>6,}"
        )
    growth = memory[3] / memory[1] - 1
    print(f"memory: {growth:+.2%} from the second quarter to the last (limit {MAX_GROWTH:.0%})")
    print(f"descriptors: {descriptors[1]} in the second quarter, {descriptors[3]} in the last (medians)")
    if growth > MAX_GROWTH or descriptors[3] > descriptors[1]:
        sys.exit("it grows")
