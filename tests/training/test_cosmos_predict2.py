"""Runs on Cosmos-Predict2: what they save, resuming, previews and pictures."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from anima_train.cli.main import COMMANDS, application
from anima_train.config.model_files import find_model_files
from anima_train.config.model_part import ModelPart
from anima_train.core.errors import ConfigError, UserError
from anima_train.model.tiny import tiny_cosmos_paths, write_tiny_cosmos

FULL = {"type": "full", "rank": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cosmos")
    write_tiny_cosmos(folder)
    return folder


@pytest.fixture
def cosmos_trainer(trainer, folder):
    """Trains the tiny Cosmos-Predict2 on the pictures."""
    trainer.base["model"] = {"type": "cosmos_predict2", "tiny_path": str(folder), "dtype": "float32"}
    return trainer


@pytest.mark.parametrize(
    "adapter", [{"type": "lora", "rank": 4}, pytest.param(FULL, marks=pytest.mark.slow)], ids=["lora", "full"]
)
def test_a_stopped_run_resumes_bitwise_and_its_file_has_the_keys_of_comfyui(cosmos_trainer, folder, adapter):
    changes = {"adapter": adapter, "checkpoint_every_n_steps": 1}
    whole = cosmos_trainer("whole", max_steps=3, **changes)
    cosmos_trainer("parted", max_steps=1, **changes)
    parted = cosmos_trainer("parted", resume=True, max_steps=3, **changes)
    assert parted.losses == whole.losses
    assert all(torch.equal(parted.weights[key], tensor) for key, tensor in whole.weights.items())

    base = load_file(tiny_cosmos_paths(folder).transformer)
    if adapter is FULL:
        assert {key: each.shape for key, each in whole.weights.items()} == {k: v.shape for k, v in base.items()}
        architecture = "cosmos-predict2"
    else:
        blocks = [key for key in base if ".blocks." in key and "_norm" not in key]
        stems = [key.replace("net.", "diffusion_model.").removesuffix(".weight") for key in blocks]
        assert whole.weights.keys() == {f"{stem}.lora_{side}.weight" for stem in stems for side in "AB"}
        architecture = "cosmos-predict2/lora"
    told = whole.metadata()
    assert told["modelspec.architecture"] == architecture
    assert told["ss_base_model_version"] == "cosmos-predict2"
    assert told["modelspec.license"] == "NVIDIA Open Model License"
    assert "ss_network_module" not in told
    assert whole.manifest["llm_adapter_trained"] is False


@pytest.mark.slow
def test_a_whole_model_is_the_base_of_the_next_run(cosmos_trainer, folder):
    first = cosmos_trainer("first", adapter=FULL, max_steps=1, save_dtype="bfloat16")
    files = tiny_cosmos_paths(folder)
    model = {
        "type": "cosmos_predict2", "transformer_path": str(first.path / "weights" / "first.safetensors"),
        "vae_path": str(files.vae), "t5_path": str(files.llm), "dtype": "float32",
    }  # fmt: skip
    cosmos_trainer.base["model"] = model
    assert len(cosmos_trainer("second", max_steps=1).losses) == 1  # its tokenizer is found near t5_path


@pytest.mark.slow
def test_evaluations_and_previews_and_captions_encoded_during_training(cosmos_trainer, pictures):
    cached = cosmos_trainer("cached")
    held_out = {"name": "held", "config": {"resolutions": [96], "directory": [{"path": str(pictures)}]}}
    drawn = {"prompts": ["a (red:1.3) circle"], "width": 64, "height": 64, "steps": 2, "every_n_steps": 2}
    run = cosmos_trainer(
        "online", eval_datasets=[held_out], eval_every_n_steps=2, sampling=drawn,
        model={**cosmos_trainer.base["model"], "cache_text_embeddings": False},
    )  # fmt: skip
    assert run.losses == pytest.approx(cached.losses, rel=1e-5)
    assert [line["step"] for line in run.evaluations] == [0, 2, 4]
    assert len(list((run.path / "samples").glob("*.png"))) == 3


@pytest.mark.slow
def test_the_base_is_held_and_measured_as_anima_is(cosmos_trainer):
    kept = {"on": "empty_caption", "share": 0.5}
    assert len(cosmos_trainer("kept", preservation=kept).losses) == 4


def anima(*arguments):
    return CliRunner().invoke(application(COMMANDS, "anima"), [*map(str, arguments)])


@pytest.mark.slow
def test_anima_sample_draws_with_and_without_the_lora(cosmos_trainer, tmp_path):
    run = cosmos_trainer("run", optimizer={"type": "adamw", "lr": 0.1})
    config = cosmos_trainer.config("run")
    lora = run.path / "weights" / "run.safetensors"
    flags = ["--prompt", "red circle", "--size", "64x64", "--steps", 2, "--cfg", 2]
    pictures = []
    for number, more in enumerate(([], ["--lora", lora])):
        assert anima("sample", config, *flags, *more, "--out", tmp_path / str(number)).exit_code == 0
        (path,) = (tmp_path / str(number)).glob("*.png")
        pictures.append(np.asarray(Image.open(path), dtype=float))
    assert np.abs(pictures[0] - pictures[1]).max() > 0
    result = anima("convert", config, tmp_path / "out", "--to", "diffusers")
    assert "a pipeline of diffusers is made of Anima alone" in str(result.exception)


def test_files_that_are_not_given_are_named_and_keys_of_anima_are_refused(cosmos_trainer):
    cosmos_trainer.base["model"] = {"type": "cosmos_predict2", "vae_path": str(__file__)}
    with pytest.raises(ConfigError, match="model: transformer_path, t5_path missing, and required with type"):
        cosmos_trainer("absent")
    for key, value in (("llm_path", "a"), ("llm_adapter_path", "a"), ("llm_adapter_lr", 0), ("text_encoder_nf4", True)):
        cosmos_trainer.base["model"] = {"type": "cosmos_predict2", key: value}
        with pytest.raises(UserError, match=f'{key}: unknown key of type "cosmos_predict2"; only "anima" has it'):
            cosmos_trainer("refused")


def test_more_tokens_than_t5_has_memory_for_are_refused(cosmos_trainer):
    cosmos_trainer.base["model"] |= {"max_caption_tokens": 2049}
    with pytest.raises(ConfigError, match=r"found 2049, expected 512 to 2048: .* the memory of T5's attention grows"):
        cosmos_trainer("refused")


def test_the_tokenizer_of_nvidias_folder_is_found(folder, tmp_path):
    files = tiny_cosmos_paths(folder)
    text_encoder = tmp_path / "text_encoder"
    shutil.copytree(files.t5_tokenizer, tmp_path / "tokenizer")
    text_encoder.mkdir()
    t5 = shutil.copy(files.llm, text_encoder / "model.safetensors")
    paths = {"transformer_path": str(files.transformer), "vae_path": str(files.vae), "t5_path": str(t5)}
    part = ModelPart.model_validate({"model": {"type": "cosmos_predict2", **paths}})
    assert find_model_files(part).t5_tokenizer == tmp_path / "tokenizer"


@pytest.mark.slow
def test_a_lora_learns_a_picture_to_a_tenth_of_the_loss(cosmos_trainer, folder, images_drawer, tmp_path):
    """On a base that knows another one: the tiny model's last layer is random, and a LoRA leaves it as it is."""
    first, second = (images_drawer(tmp_path / size, [(64, 64)] * number) for size, number in (("a", 1), ("b", 3)))
    for number in (0, 1):
        (second / f"image{number}.png").unlink()
    common = {"max_steps": 500, "micro_batch_size_per_gpu": 16, "lr_scheduler": "linear"}

    def learn(name, pictures, **changes):
        directory = {"path": str(pictures), "num_repeats": 16}
        return cosmos_trainer(name, dataset={"resolutions": [64], "directory": [directory]}, **common, **changes)

    base = learn("base", first, adapter=FULL, optimizer={"type": "adamw", "lr": 3e-3})
    files = tiny_cosmos_paths(folder)
    cosmos_trainer.base["model"] = {
        "type": "cosmos_predict2", "transformer_path": str(base.path / "weights" / "base.safetensors"),
        "vae_path": str(files.vae), "t5_path": str(files.llm), "dtype": "float32",
    }  # fmt: skip
    run = learn("lora", second, adapter={"type": "lora", "rank": 32}, optimizer={"type": "adamw", "lr": 1e-2})
    assert sum(run.losses[-20:]) / 20 < sum(run.losses[:5]) / 5 / 10
