"""Cache entries that are damaged in mid-run: the run ends and says so, and the same command resumes it bitwise."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

REPO = Path(__file__).parents[2]
NUM_STEPS = 60


@pytest.fixture
def changes(tmp_path, images_drawer):
    """Masks, dropout of all kinds and training states.

    One caption and image at a time, as a damaged one is encoded alone.
    """
    folder = images_drawer(tmp_path / "transparent", [(96, 96)] * 3 + [(128, 80)] * 3)
    for path in folder.glob("*.png"):
        image = Image.open(path).convert("RGBA")
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(path)
    return {
        "dataset": {"directory": [{"path": str(folder)}], "alpha_as_mask": True},
        "caching_batch_size": 1,
        "adapter": {"dropout": 0.2},
        "uncond_fraction": 0.3,
        "checkpoint_every_n_steps": 3,
        "max_steps": NUM_STEPS,
    }


def start(config):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    command = [sys.executable, "-m", "anima_train", str(config)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=REPO, env=environment, stdout=pipe, stderr=pipe, text=True)


def flip_a_bit(path):
    """Change a byte in place, as a failing disk does."""
    with open(path, "r+b") as file:
        file.seek(-9, 2)
        byte = file.read(1)[0]
        file.seek(-9, 2)
        file.write(bytes([byte ^ 1]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["latent", "text", "mask"])
def test_an_entry_damaged_in_mid_run_ends_it_and_the_same_command_resumes_bitwise(trainer, changes, tmp_path, kind):
    whole = trainer("whole", **changes)
    path = sorted((tmp_path / "transparent" / ".anima_cache" / kind).glob("??/*.safetensors"))[0]
    content = path.read_bytes()
    process = start(trainer.config("run", **changes))
    folder = trainer.folder / "runs" / "run"
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    flip_a_bit(path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    assert f"error: cache entry damaged: {path}: its content is not what was written; it is of the " in errors
    assert "start again with the same command" in errors
    assert not path.exists()
    num_made = metrics.read_bytes().count(b"\n")
    assert 4 <= num_made < NUM_STEPS
    assert (folder / "checkpoints" / "step-000003").exists() or num_made > 6  # older states are removed
    run = trainer("run", **changes)
    assert path.read_bytes() == content
    assert run.losses == whole.losses
    assert all(torch.equal(tensor, run.weights[key]) for key, tensor in whole.weights.items())
