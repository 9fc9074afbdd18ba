"""Compare speeds: two ways of doing the same, in turn, in one process, as ratios of medians.

    python scripts/benchmark.py step [--device cuda] [--width 1280] [--blocks 4] [--side 256] [--rounds 7]
    python scripts/benchmark.py vae  [--device cuda] [--side 256] [--rounds 7]
    python scripts/benchmark.py cache [--images 2000] [--workers 2] [--rounds 3]
    python scripts/benchmark.py scan [--images 100000]
    python scripts/benchmark.py save [--megabytes 600] [--rounds 7]
    python scripts/benchmark.py soak [--steps 2000]

`step`: forward and backward of a rank-16 LoRA, ours against diffusers' `CosmosTransformer3DModel`.
`vae`: encoding one image, 2-D convolutions against diffusers' 3-D ones.
`cache`: decoding and scaling a folder of JPEG and PNG to 512-pixel buckets, the threads that fill the cache against as
    many threads, and as many processes, that do nothing but call Pillow. At most 1.15 times the better of both.
`scan`: seconds and memory that the first and the second look at a folder of images take, and the plan of an epoch. The
    limits are 60 s and 1 GB.
`save`: how long a step waits for a training state, against copying the tensors to the host, which is all it should wait
    for.
`soak`: a long run of the tiny model in a process of its own, with everything that happens between steps: its memory,
    open files and threads, a quarter of the run at a time. Fails where they grow. On Linux.

Absolute times say little on a shared machine; the ratio of two commands run in turn does.
"""

import argparse
import concurrent.futures
import hashlib
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tomli_w
import torch
from diffusers import AutoencoderKLQwenImage, CosmosTransformer3DModel
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image

from anima_train.adapters.lora import Lora
from anima_train.caching.fill import decoded
from anima_train.checkpoint.async_writer import AsyncWriter, Groups, on_host
from anima_train.checkpoint.training_state import StateManifest, save_state
from anima_train.data.buckets import aspect_ratios, nearest, size_of
from anima_train.data.cache import Cache
from anima_train.data.decoding import pixels
from anima_train.data.images import Crop, cover_box
from anima_train.data.loader import Entry
from anima_train.data.samples import Picture, Sample, View
from anima_train.data.settings import DirectoryOptions
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.tiny import write_tiny
from anima_train.model.vae import FrameConv, SingleFrameVAE
from anima_train.optim.groups import COMPONENTS, LearningRates

RANK = 16
CONTEXT = 1024
SLICE = 100  # images decoded by one way before the other has its turn
DISTINCT = 60  # images that are really made; the others are the same again
LOOK_EVERY = 0.1  # seconds
MAX_GROWTH = 0.02  # of memory, from the second quarter of a run to its last

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


def seconds(function: Callable[[], None], device: torch.device) -> float:
    """The time one call takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(ours: Callable[[], None], theirs: Callable[[], None], rounds: int, device: torch.device) -> None:
    """Run both in turn and print the ratios; the first round warms up and does not count."""
    pairs = [(seconds(ours, device), seconds(theirs, device)) for _ in range(rounds + 1)][1:]
    ratios = sorted(mine / other for mine, other in pairs)
    medians = [statistics.median(times) for times in zip(*pairs, strict=True)]
    print(f"ours {medians[0] * 1e3:.1f} ms, theirs {medians[1] * 1e3:.1f} ms (medians of {rounds})")
    print(f"ours / theirs: median {statistics.median(ratios):.3f}, from {ratios[0]:.3f} to {ratios[-1]:.3f}")


def trainable_step(model: torch.nn.Module, call: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Forward, loss, backward."""

    def step() -> None:
        call().float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return step


def benchmark_step(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """A LoRA step without the optimizer."""
    head_dim = 128 if options.width % 128 == 0 else 64
    shape = TransformerShape(options.blocks, options.width, head_dim, 16, CONTEXT, 256)
    ours = MiniTrainDIT(shape).to(device, dtype)
    Lora(rank=RANK).attach(ours, LearningRates(dict.fromkeys(COMPONENTS, 1e-4)), seed=0)
    ours.to(dtype)
    theirs = CosmosTransformer3DModel(
        in_channels=17,  # the padding mask given as a channel: its resize needs torchvision
        num_attention_heads=options.width // head_dim,
        attention_head_dim=head_dim,
        num_layers=options.blocks,
        text_embed_dim=CONTEXT,
        adaln_lora_dim=256,
        rope_scale=(1.0, 4.0, 4.0),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
    ).to(device, dtype)
    theirs.requires_grad_(False)
    blocks = r"transformer_blocks\.\d+\."
    targets = blocks + r"(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)|norm[123]\.linear_[12])"
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets), theirs)
    theirs.to(dtype)
    trained = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
    assert trained[0] == trained[1], trained

    side = options.side // 8
    x = torch.randn(1, 16, 1, side, side, device=device, dtype=dtype)
    padded = torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)
    t = torch.full((1, 1), 0.5, device=device)
    context = torch.zeros(1, 512, CONTEXT, device=device, dtype=dtype)
    context[:, :100] = torch.randn(100, CONTEXT, device=device, dtype=dtype)
    compare(
        trainable_step(ours, lambda: ours(x, t, context)),
        trainable_step(theirs, lambda: theirs(padded, t[:, 0], context, return_dict=False)[0]),
        options.rounds,
        device,
    )


@torch.no_grad()
def benchmark_vae(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """Encoding one image."""
    theirs = AutoencoderKLQwenImage().to(device, dtype)
    ours = SingleFrameVAE(AutoencoderKLQwenImage()).to(device, dtype)
    convolutions = sum(isinstance(module, FrameConv) for module in ours.modules())
    pixels = torch.randn(1, 3, options.side, options.side, device=device, dtype=dtype)
    print(f"{convolutions} convolutions in 2-D")

    def encode_ours() -> None:
        ours.encode(pixels)

    def encode_theirs() -> None:
        theirs.encode(pixels.unsqueeze(2)).latent_dist.mode()

    compare(encode_ours, encode_theirs, options.rounds, device)


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


def benchmark_cache(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """Decoding and scaling, without the VAE."""
    context = multiprocessing.get_context("spawn")  # forked processes break where there are threads
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ThreadPoolExecutor(options.workers) as threads,
        concurrent.futures.ProcessPoolExecutor(options.workers, context) as processes,
    ):
        entries = write_photos(Path(folder), options.images)

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


def write_noise(path: Path, generator: np.random.Generator, height: int, width: int) -> None:
    """A small image."""
    Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


def child_environment() -> Mapping[str, str]:
    """What a process needs to find the same modules as this one."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def benchmark_scan(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """Looking at many images, each time in a new process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generator = np.random.default_rng(0)
        for index in range(options.images):
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


def benchmark_save(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """How long a step waits for a training state, against copying its tensors, and against writing them at once."""
    weights = {f"weight {index}": torch.randn(1 << 20, device=device) for index in range(options.megabytes // 12)}
    groups = {
        "weights": weights,
        "optimizer": {f"{name}.{key}": torch.randn_like(tensor) for name, tensor in weights.items() for key in "ab"},
    }
    facts = StateManifest(step=1, optimizer="")
    rows = []
    with tempfile.TemporaryDirectory() as name, AsyncWriter() as writer:
        folder = Path(name)

        def job(copies: Groups) -> None:
            save_state(folder / str(len(rows)), facts, copies, 2)

        for _ in range(options.rounds + 1):
            waits = seconds(lambda: writer.write(groups, job), device)
            writer.wait()
            rows.append((waits, seconds(lambda: on_host(groups), device), writer.seconds))
    waits, copies, writes = (statistics.median(times) for times in zip(*rows[1:], strict=True))
    ratios = sorted(mine / other for mine, other, _ in rows[1:])
    print(f"a step waits {waits * 1e3:.0f} ms, copying takes {copies * 1e3:.0f} ms, writing {writes * 1e3:.0f} ms")
    print(f"waits / copying: median {statistics.median(ratios):.3f}, from {ratios[0]:.3f} to {ratios[-1]:.3f}")


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


def benchmark_soak(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
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


def main() -> None:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "vae", "cache", "scan", "save", "soak"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, help="default 2,000 for cache, 100,000 for scan")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--steps", type=int, default=2_000)
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    if options.images is None:
        options.images = 100_000 if options.what == "scan" else 2_000
    benchmarks = {
        "step": benchmark_step, "vae": benchmark_vae, "cache": benchmark_cache, "scan": benchmark_scan,
        "save": benchmark_save,
        "soak": benchmark_soak,
    }  # fmt: skip
    benchmarks[options.what](options, device, dtype)


if __name__ == "__main__":
    main()
