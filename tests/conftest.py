"""Fixtures shared by all tests."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import CosmosTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_anima_lora_to_diffusers as diffusers_names
from safetensors.torch import load_file
from torch import Tensor

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
