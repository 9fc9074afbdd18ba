"""The real size on the CPU: 2.09 billion parameters load, and train a LoRA."""

import json
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("full size")  # one process: the file is made once, and its memory taken once
REPO = Path(__file__).parents[2]
GIB = 2**30

LOAD = """
import json, resource, sys
from pathlib import Path
import torch
from anima_train.model.loading import load_transformer
from anima_train.model.tiny import tiny_paths
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
files = tiny_paths(Path(sys.argv[1]))
transformer = load_transformer(files, True, torch.bfloat16, torch.device("cpu"))
print(json.dumps({
    "parameters": sum(p.numel() for p in transformer.parameters()),
    "tensors": len(list(transformer.parameters())),
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
}))
"""
TRAIN = """
import json, resource, sys
from pathlib import Path
from anima_train.config.load import load_config
from anima_train.training.train import run_training
run_training(load_config(Path(sys.argv[1])))
print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


@pytest.fixture(scope="module")
def full_size(tmp_path_factory, command):
    folder = tmp_path_factory.mktemp("full_size")
    result = command([sys.executable, str(REPO / "scripts" / "make_full_size.py"), str(folder)])
    assert result.returncode == 0, result.stderr
    yield folder
    for path in folder.rglob("*.safetensors"):
        path.unlink()


@pytest.mark.slow
def test_full_size_loads_within_a_tenth_more_than_its_file(full_size, command):
    size = (full_size / "split_files" / "diffusion_models" / "anima-tiny.safetensors").stat().st_size
    result = command([sys.executable, "-c", LOAD, str(full_size)])
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["parameters"] == 2_091_068_928
    assert found["tensors"] == 685
    assert found["peak"] < 1.1 * size  # beside the libraries, whose size depends on the build


@pytest.mark.slow
def test_full_size_trains_two_lora_steps_in_16_gb(full_size, command, images_drawer, tmp_path):
    images_drawer(tmp_path / "images", [(256, 256)])
    config = tmp_path / "config.toml"
    config.write_text(f"""
output_dir = '{tmp_path}'
run_name = 'full'
max_steps = 2
dataset = {{ resolutions = [256], directory = [{{ path = '{tmp_path / "images"}' }}] }}
model = {{ type = 'anima', tiny_path = '{full_size}' }}
adapter = {{ type = 'lora', rank = 32 }}
optimizer = {{ type = 'adamw', lr = 1e-4 }}
monitoring = {{ tensorboard = false }}
""")
    result = command([sys.executable, "-c", TRAIN, str(config)], timeout=1200)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["peak"] < 16 * GIB
    groups = json.loads((tmp_path / "full" / "manifest.json").read_text())["groups"]
    adapter = next(row for row in groups if row["component"] == "llm_adapter")
    assert sum(row["modules"] for row in groups) == 448 + 60
    assert adapter["modules"] == 60
    assert adapter["parameters"] == 32 * 159_744
    assert sum(row["parameters"] for row in groups) == 32 * (2_164_736 + 159_744)
    metrics = [json.loads(line) for line in (tmp_path / "full" / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2
    assert all(line["grad_norm"] > 0 for line in metrics)
