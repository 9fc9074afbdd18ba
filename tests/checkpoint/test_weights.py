"""Saved weights: whole or not there, and exact."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from anima_train.adapters.lora import Lora
from anima_train.checkpoint.weights import caption_metadata, save_weights, weights_metadata
from anima_train.config.config import Config
from anima_train.core.errors import ModelFileError, NumericError, SpaceError
from anima_train.data.buckets import Size
from anima_train.data.cache import Cache
from anima_train.data.samples import Picture, Sample
from anima_train.data.settings import DirectoryOptions
from anima_train.optim.optimizers import AdamWKahan


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensors():
    return {
        "diffusion_model.b.lora_B.weight": draw(6, 2).T,
        "diffusion_model.a.lora_A.weight": nn.Parameter(draw(2, 6).bfloat16()),
        "scalar": torch.tensor(3.0),
    }


def test_saved_weights_are_the_tensors_and_the_metadata(tmp_path):
    path = tmp_path / "weights" / "style.safetensors"
    save_weights(path, tensors(), {"modelspec.title": "Stil “ü”"})
    found = load_file(path)
    assert set(found) == set(tensors())
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "modelspec.title": "Stil “ü”"}
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, bad):
    path = tmp_path / "style.safetensors"
    save_weights(path, tensors(), {})
    before = path.read_bytes()
    broken = tensors()
    broken["diffusion_model.a.lora_A.weight"].data[1, 2] = bad
    with pytest.raises(
        NumericError, match=r"style\.safetensors: not saved.* 1 tensor of 3 .*diffusion_model\.a\.lora_A"
    ):
        save_weights(path, broken, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_full_disk_leaves_the_old_weights_and_nothing_else(tmp_path, small_files):
    path = tmp_path / "style.safetensors"
    save_weights(path, tensors(), {})
    before = path.read_bytes()
    message = r"style\.safetensors: could not be written .* earlier files are intact"
    with small_files(), pytest.raises(SpaceError, match=message):
        save_weights(path, {"a": torch.zeros(100_000)}, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_the_umask_allows(tmp_path, mask, expected):
    path = tmp_path / "style.safetensors"
    before = os.umask(mask)
    try:
        save_weights(path, tensors(), {})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == expected


def test_a_disk_that_gives_back_other_bytes_is_noticed_before_the_old_file_is_replaced(tmp_path):
    path = tmp_path / "style.safetensors"
    save_weights(path, tensors(), {})
    before = path.read_bytes()

    class Forgetful(dict):
        """Tensors that differ each time they are asked for, as if the disk had changed what was written."""

        def __getitem__(self, name):
            return super().__getitem__(name) + 1

    with pytest.raises(ModelFileError, match="reads back with other values than were written"):
        save_weights(path, Forgetful(tensors()), {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_metadata_has_what_file_managers_read_and_no_path_or_secret(tmp_path):
    config = Config(
        output_dir=str(tmp_path / "out"),
        dataset=str(tmp_path / "dataset.toml"),
        epochs=3,
        seed=5,
        model={"type": "anima", "transformer_path": str(tmp_path / "anima.safetensors")},
        adapter=Lora(rank=8, alpha=4.0),
        optimizer=AdamWKahan(lr=2e-5),
        monitoring={"wandb_api_key": "s3cret"},
    )
    metadata = weights_metadata(
        "style", step=40, epoch=2, num_samples=12, seed=config.seed, adapter=config.adapter, optimizer=config.optimizer,
        lr_schedule=config.lr_scheduler.type,
    )  # fmt: skip
    assert all(isinstance(key, str) and isinstance(value, str) and value for key, value in metadata.items())
    required = {"sai_model_spec", "architecture", "implementation", "title"}  # by ModelSpec 1.0.1
    assert {f"modelspec.{key}" for key in required} <= set(metadata)
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.title"] == metadata["ss_output_name"] == "style"
    assert (metadata["ss_steps"], metadata["ss_epoch"], metadata["ss_seed"]) == ("40", "2", "5")
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("8", "8")
    assert (metadata["ss_optimizer"], metadata["ss_learning_rate"]) == ("adamw_optimi", "2e-05")
    text = json.dumps(metadata)
    assert str(tmp_path) not in text
    assert "s3cret" not in text
    save_weights(tmp_path / "style.safetensors", tensors(), metadata)
    with safe_open(tmp_path / "style.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}


def sample_of(name, tags, **options):
    picture = Picture(Path(name), Path(name), "0" * 64, 64, 64, tags=tags)
    return Sample(name, picture, Size(64, 64), 64, 0, DirectoryOptions(**options), Cache(Path()))


def test_trigger_words_are_told_and_tags_only_on_request():
    samples = [
        sample_of("a.png", ("mychara, 1girl, solo", "mychara, 1girl"), trigger_word="mychara"),
        sample_of("a.png", ("mychara, 1girl, solo", "mychara, 1girl"), trigger_word="mychara"),  # another resolution
        sample_of("b.png", ("1girl, smile\nA sentence about her.",), trigger_word="other"),
        sample_of("c.png", ("scenery",), trigger_word="unused", role="regularization"),
    ]
    assert caption_metadata(samples, False) == {"modelspec.trigger_phrase": "mychara, other"}
    found = json.loads(caption_metadata(samples, True)["ss_tag_frequency"])
    assert found == {"train": {"1girl": 2, "mychara": 1, "solo": 1, "smile": 1, "scenery": 1}}
    assert caption_metadata([sample_of("a.png", ("",))], False) == {}
