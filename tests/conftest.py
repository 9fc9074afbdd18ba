"""Fixtures shared by all tests: oracles, disks, a tiny model, drawn images, and a way to train in this process."""

import contextlib
import gc
import json
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tomli_w
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import CosmosTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_anima_lora_to_diffusers as diffusers_names
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from anima_train.cli.train import train_and_report
from anima_train.config.load import load_config
from anima_train.model.tiny import write_tiny


def pytest_runtest_setup(item):
    """Draw the same numbers in every run of a test. Tests marked `gpu` say so where there is none."""
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")


GOLDEN = Path(__file__).parent / "golden"


OPENED: list[str] = []  # files opened while a test listens
LISTENING = threading.Event()


def note_opened(event: str, arguments: tuple) -> None:
    if event == "open" and LISTENING.is_set() and isinstance(arguments[0], str | bytes):
        OPENED.append(os.path.basename(os.fsdecode(arguments[0])))


sys.addaudithook(note_opened)  # there is no way to remove one


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """The names of all files that Python opens during the test."""
    OPENED.clear()
    LISTENING.set()
    yield OPENED
    LISTENING.clear()


@pytest.fixture(scope="session")
def golden():
    """Read one file of reference values by name."""

    def read(name: str) -> dict[str, Tensor] | list | dict:
        path = GOLDEN / name
        return load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())

    return read


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """One thread for each of the test processes, which share the cores."""
    torch.set_num_threads(1)
    gc.freeze()  # what was imported: each `gc.collect()` of a run would look through all of it, 0.3 s


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, in float64."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float64).tiny))


@pytest.fixture(scope="session")
def error():
    """The relative error of a tensor against its oracle."""
    return relative_error


def cosmos_transformer(shape, weights):
    """diffusers' `CosmosTransformer3DModel` with a transformer's weights (native names, no prefix)."""
    model = CosmosTransformer3DModel(
        in_channels=shape.in_channels + 1,  # the padding mask is given as a channel: its resize needs torchvision
        num_attention_heads=shape.width // shape.head_dim,
        attention_head_dim=shape.head_dim,
        num_layers=shape.num_blocks,
        text_embed_dim=shape.context_width,
        adaln_lora_dim=shape.adaln_lora_dim,
        max_size=(128, 240, 240),
        rope_scale=(1.0, 4.0, 4.0) if shape.in_channels == 16 else (1.0, 3.0, 3.0),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
    )
    renamed = diffusers_names({f"diffusion_model.{key}": value for key, value in weights.items()})
    for side, attention in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        for part in "qk":  # diffusers' converter knows no norms, as no LoRA has any
            old, new = f"{side}.{part}_norm", f"{attention}.norm_{part}"
            renamed = {key.replace(old, new): value for key, value in renamed.items()}
    model.load_state_dict({key.removeprefix("transformer."): value for key, value in renamed.items()})
    return model


@pytest.fixture(scope="session")
def cosmos():
    """`cosmos_transformer`, the oracle of our transformer."""
    return cosmos_transformer


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts disks in memory, of so many bytes, and takes them away again."""
    mounted: list[Path] = []
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")

    def mount(num_bytes: int, name: str = "disk") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)  # at once, whoever has a file open


REPO = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a tiny model."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder)
    return folder


def draw_images(folder, sizes, captions=True):
    """One image for each size: two colours and a circle, all different, with a caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (width, height) in enumerate(sizes):
        image = Image.new("RGB", (width, height), (40 * number % 256, 90, 200 - 30 * number % 200))
        ImageDraw.Draw(image).ellipse((5, 5, width // 2 + number, height // 2), fill=(250, 30 * number % 256, 10))
        image.save(folder / f"image{number}.png")
        if captions:
            (folder / f"image{number}.txt").write_text(f"red circle, number {number}, flat color\n")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Six images in three buckets, cached once for all tests."""
    sizes = [(96, 96), (96, 96), (128, 80), (128, 80), (128, 80), (80, 128)]
    return draw_images(tmp_path_factory.mktemp("pictures"), sizes)


def merge(base, changes):
    """Nested tables, the second over the first; None removes."""
    merged = dict(base)
    for key, value in changes.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


@dataclass
class Finished:
    """What a run left."""

    path: Path

    @property
    def metrics(self):
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    @property
    def losses(self):
        return [line["loss"] for line in self.metrics]

    @property
    def evaluations(self):
        return [json.loads(line) for line in (self.path / "evaluations.jsonl").read_text().splitlines()]

    @property
    def manifest(self):
        return json.loads((self.path / "manifest.json").read_text())

    @property
    def weights(self):
        return load_file(self.path / "weights" / f"{self.path.name}.safetensors")

    def metadata(self):
        with safe_open(self.path / "weights" / f"{self.path.name}.safetensors", "pt") as file:
            return file.metadata()


class Trainer:
    """Writes a config in a folder and trains it."""

    def __init__(self, folder, tiny, pictures):
        self.folder = folder
        self.base = {
            "output_dir": str(folder / "runs"),
            "max_steps": 4,
            "dataset": {"resolutions": [96], "num_ar_buckets": 3, "directory": [{"path": str(pictures)}]},
            "model": {"type": "anima", "tiny_path": str(tiny), "dtype": "float32", "llm_adapter_lr": 0},
            "adapter": {"type": "lora", "rank": 4},
            "optimizer": {"type": "adamw", "lr": 1e-3},
            "monitoring": {"tensorboard": False},
        }

    def config(self, name="run", **changes):
        path = self.folder / f"{name}.toml"
        path.write_text(tomli_w.dumps(merge(self.base, {"run_name": name, **changes})))
        return path

    def __call__(self, name="run", resume=False, overrides=(), **changes):
        return self.run(self.config(name, **changes), overrides, resume)

    def run(self, config, overrides=(), resume=False):
        """Train a config file."""
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()  # Accelerate keeps one configuration per process
        loaded = load_config(config, overrides)
        path = None if isinstance(resume, bool) else resume  # of a state
        weights = train_and_report(loaded, resume=resume is True, resume_path=path)
        return Finished(weights.parent.parent)

    def processes(self, number, name="run", resume=False, **changes):
        """The same in several processes on the CPU."""
        arguments = [str(self.config(name, **changes)), *(["--resume"] if resume else [])]
        for result in run_forks(self.folder, number, *arguments):
            assert result.returncode == 0, result.stderr
        return Finished(self.folder / "runs" / name)


def run_command(command, timeout=300):
    """A command's result, its output as text; one thread, so that results do not depend on the machine."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # whatever it started, too
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


# A server that has imported everything forks processes, as imports would be most of the time of a short run.
IMPORTED_LATE = (
    "torch._dynamo", "torch.utils.tensorboard", "diffusers.models.autoencoders.autoencoder_kl_qwenimage",
    "transformers.models.qwen3.modeling_qwen3", "anima_train.reports.run",
)  # fmt: skip
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([*IMPORTED_LATE, __name__])


def be_program(arguments, environment, output):
    """Be `python -m anima_train` with these arguments, or `python SCRIPT`; streams go to files."""
    os.environ.update(environment)
    os.chdir(REPO)
    for number in (1, 2):
        os.dup2(os.open(f"{output}{number}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    torch.set_num_threads(1)
    gc.freeze()
    if arguments[0].endswith(".py"):
        sys.argv = [*arguments]
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        sys.argv = ["anima-train", *arguments]
        runpy.run_module("anima_train", run_name="__main__")


def run_forks(folder, number, *arguments, timeout=300):
    """The results of several processes of one group, as a launcher would start them; of one alone without a group.

    Where the launcher itself matters, `run_command` starts it.
    """
    processes = []
    group = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group["MASTER_PORT"] = str(free.getsockname()[1])
    for rank in range(number):
        ranks = group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if number > 1 else {}
        environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", **ranks}
        processes.append(FORKS.Process(target=be_program, args=(arguments, environment, f"{folder}/stream{rank}.")))
        processes[-1].start()
    ends = time.monotonic() + timeout
    try:
        for process in processes:
            process.join(max(0.0, ends - time.monotonic()))
            assert process.exitcode is not None, f"after {timeout} s it still runs"
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(
            arguments, process.exitcode, *(Path(f"{folder}/stream{rank}.{stream}").read_text() for stream in (1, 2))
        )
        for rank, process in enumerate(processes)
    ]


@pytest.fixture
def forks(tmp_path):
    """`run_forks`, with streams in the folder of the test."""
    return lambda number, *arguments, **options: run_forks(tmp_path, number, *arguments, **options)


@pytest.fixture(scope="session")
def trainer_in(tiny, pictures):
    """Makes of a folder what trains the tiny model in it, on the pictures."""
    return lambda folder: Trainer(folder, tiny, pictures)


@pytest.fixture
def trainer(tmp_path, trainer_in):
    """Trains the tiny model on the pictures; keys can be changed."""
    return trainer_in(tmp_path)


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory, trainer_in):
    """A run as the trainer's configuration stands, for tests that only read it; "plain" is its name."""
    return trainer_in(tmp_path_factory.mktemp("plain_run"))("plain")


@pytest.fixture(scope="session")
def merged():
    """`merge`, for configurations of tests' own."""
    return merge


@pytest.fixture(scope="session")
def images_drawer():
    """`draw_images`, for tests with images of their own."""
    return draw_images


@pytest.fixture(scope="session")
def command():
    """`run_command`."""
    return run_command


@pytest.fixture
def small_files():
    """While what it returns is open, no file may grow past 20 kB, as on a full disk."""

    @contextlib.contextmanager
    def limited():  # short, because pytest's own log is a file too
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return limited


PACKAGE = """
class Red:
    name = "redness"
    higher_is_better = False
    def __init__(self, scale): self.scale = scale
    def __call__(self, pictures, prompts):
        return [self.scale * sum(picture.tobytes()) + len(prompt)
                for picture, prompt in zip(pictures, prompts, strict=True)]
def red(text): return Red(float(text or 1))
class Broken(Red):
    name = "broken"
    def __call__(self, pictures, prompts): raise OSError("no")
def broken(text): return Broken(1)
def absent(text): raise RuntimeError("needs a file")
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A distribution that offers judges; returns how to say which."""
    site = tmp_path / "site"
    (site / "taste-1.0.dist-info").mkdir(parents=True)
    (site / "taste-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: taste\nVersion: 1.0\n")
    (site / "taste_judges.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(site))

    def offer(*names):
        lines = ["[anima_train.judges]", *(f"{name} = taste_judges:{name}" for name in names)]
        (site / "taste-1.0.dist-info" / "entry_points.txt").write_text("\n".join(lines) + "\n")

    yield offer
    sys.modules.pop("taste_judges", None)


@pytest.fixture
def clip_folder(tmp_path):
    """A random CLIP in a folder, as transformers saves it."""
    from transformers import CLIPConfig, CLIPModel  # takes long to import

    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3, "c</w>": 4, "<unk>": 5}
    text = {"vocab_size": 6, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4))
    folder = tmp_path / "clip"
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder, model.eval()
