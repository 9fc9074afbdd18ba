"""Saved weights: whole or not there, and exact."""

import base64
import hashlib
import io
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from anima_train.adapters.lora import Lora
from anima_train.checkpoint.metadata import at_level, data_metadata, thumbnail, weights_metadata
from anima_train.checkpoint.weights import save_weights, warn_of_unused
from anima_train.config.config import Config
from anima_train.config.saved_settings import settings_metadata
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
    base = {"name": "anima.safetensors", "sha256": "ab12"}
    metadata = weights_metadata("style", 40, 2, config.adapter, 40, settings_metadata(config), base)
    assert all(isinstance(key, str) and isinstance(value, str) and value for key, value in metadata.items())
    required = {"sai_model_spec", "architecture", "implementation", "title"}  # by ModelSpec 1.0.1
    assert {f"modelspec.{key}" for key in required} <= set(metadata)
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.architecture"] == "anima-2.9b/lora"
    assert metadata["modelspec.title"] == metadata["ss_output_name"] == "style"
    assert (metadata["ss_steps"], metadata["ss_epoch"], metadata["ss_seed"]) == ("40", "2", "5")
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("8", "8")
    assert (metadata["ss_optimizer"], metadata["ss_learning_rate"]) == ("adamw_optimi", "2e-05")
    assert (metadata["ss_sd_model_name"], metadata["ss_new_sd_model_hash"]) == ("anima.safetensors", "ab12")
    assert "CircleStone Labs Non-Commercial License v1.2" in metadata["modelspec.license"]
    assert "NVIDIA Open Model License" in metadata["modelspec.license"]
    text = json.dumps(metadata)
    assert str(tmp_path) not in text
    assert "s3cret" not in text
    save_weights(tmp_path / "style.safetensors", tensors(), metadata)
    content = (tmp_path / "style.safetensors").read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    digest = hashlib.sha256(content[8 + header_bytes :]).hexdigest()  # as ModelSpec and sd-webui-additional-networks do
    hashes = {"modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}
    with safe_open(tmp_path / "style.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", **metadata, **hashes}
    for name, tensor in load_file(tmp_path / "style.safetensors").items():
        assert torch.equal(tensor, tensors()[name])


def test_less_is_told_where_less_is_wished():
    metadata = {
        "modelspec.title": "a",
        "ss_seed": "1",
        "ss_network_dim": "8",
        "sshs_model_hash": "b",
        "anima_train.version": "1",
    }
    assert at_level(metadata, "full") == metadata
    assert at_level(metadata, "minimal").keys() == {"modelspec.title", "ss_network_dim", "sshs_model_hash"}
    assert at_level(metadata, "none") == {}


def test_the_thumbnail_is_the_first_of_the_last_previews(tmp_path):
    assert thumbnail(tmp_path, 10) == {}
    for name, color in (("s000000_00", "red"), ("s000004_00", "lime"), ("s000004_01", "black"), ("s000012_00", "blue")):
        Image.new("RGB", (600, 300), color).save(tmp_path / f"{name}.png")
    (url,) = thumbnail(tmp_path, 10).values()
    kind, _, text = url.partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
        assert (picture.size, picture.format) == ((256, 128), "JPEG")
        red, green, blue = picture.getpixel((9, 9))
    assert green > 200 > 60 > max(red, blue)


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
    told = data_metadata(samples, False)
    assert told["modelspec.trigger_phrase"] == "mychara, other"
    assert "ss_tag_frequency" not in told
    assert (told["ss_num_train_images"], told["ss_num_reg_images"]) == ("2", "1")
    assert (told["modelspec.resolution"], told["ss_resolution"]) == ("64x64", "(64, 64)")
    assert json.loads(told["ss_bucket_info"]) == {"buckets": {"0": {"resolution": [64, 64], "count": 4}}}
    found = json.loads(data_metadata(samples, True)["ss_tag_frequency"])
    assert found == {"train": {"1girl": 2, "mychara": 1, "solo": 1, "smile": 1, "scenery": 1}}
    assert "modelspec.trigger_phrase" not in data_metadata([sample_of("a.png", ("",))], False)


def test_a_saved_file_of_which_something_would_be_left_out_is_warned_of(tmp_path, caplog):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    keys = {"good": "diffusion_model.blocks.0.mlp.layer1", "bad": "blocks.0.mlp.layer1"}
    for path in (good, bad):
        stem = keys[path.stem]
        save_weights(path, {f"{stem}.lora_A.weight": draw(2, 8), f"{stem}.lora_B.weight": draw(8, 2)}, {})
        warn_of_unused(path, 3)
    (record,) = caplog.records
    assert record.getMessage().startswith("bad.safetensors is saved, but ComfyUI ignores 2 keys, such as blocks.0.mlp")
    assert record.step == 3
