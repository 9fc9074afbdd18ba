"""The quickstart, in a process of its own, and what diffusers makes of its file."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import AnimaAutoBlocks, AnimaTextConditioner
from safetensors.torch import load_file

from anima_train.model.tiny import SMALL

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory, command):
    """The folder in which the quickstart ran; two epochs, and the adapter trained too."""
    folder = tmp_path_factory.mktemp("quickstart")
    options = ["output_dir='out'", "epochs=2", f"cache_dir='{folder}/cache'", f"model.tiny_path='{folder}/tiny'"]
    options += ["model.llm_adapter_lr=1e-3", f"output_dir='{folder}/out'"]
    arguments = [part for option in options for part in ("--set", option)]
    result = command([sys.executable, "-m", "anima_train", "configs/quickstart.toml", *arguments])
    assert result.returncode == 0, result.stderr
    return folder


def diffusers_pipeline(tiny, cosmos):
    """A diffusers pipeline around the tiny model's weights."""
    weights = load_file(tiny / "split_files" / "diffusion_models" / "anima-tiny.safetensors")
    weights = {key.removeprefix("net."): value.float() for key, value in weights.items()}
    adapter = {key.removeprefix("llm_adapter."): value for key, value in weights.items() if "llm_adapter" in key}
    native = {key: value for key, value in weights.items() if "llm_adapter" not in key}
    transformer = cosmos(SMALL.transformer, native)
    rows = adapter["embed.weight"].shape[0]
    conditioner = AnimaTextConditioner(64, 64, 64, 2, 4, target_vocab_size=rows)
    conditioner.load_state_dict(adapter)
    pipeline = AnimaAutoBlocks().init_pipeline()
    pipeline.update_components(transformer=transformer, text_conditioner=conditioner)
    return pipeline


def test_quickstart_leaves_a_lora_with_comfyui_keys(quickstart):
    lora = load_file(quickstart / "out" / "quickstart" / "weights" / "quickstart.safetensors")
    assert all(key.startswith("diffusion_model.") for key in lora)
    assert len(lora) == 2 * (2 * 16 + 2 * 10)


@pytest.mark.filterwarnings("ignore")  # diffusers' own deprecations
def test_diffusers_loads_every_key_of_it(quickstart, cosmos):
    path = quickstart / "out" / "quickstart" / "weights" / "quickstart.safetensors"
    pipeline = diffusers_pipeline(quickstart / "tiny", cosmos)
    pipeline.load_lora_weights(str(path))
    loaded = [
        parameter
        for module in (pipeline.transformer, pipeline.text_conditioner)
        for name, parameter in module.named_parameters()
        if ".lora_" in name
    ]
    saved = load_file(path)

    def fingerprints(tensors):
        return sorted((tuple(tensor.shape), float(tensor.double().square().sum())) for tensor in tensors)

    assert fingerprints(loaded) == fingerprints(saved.values())
    assert all(torch.isfinite(tensor).all() for tensor in loaded)
