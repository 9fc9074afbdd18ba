"""Whole models in another layout: other prefixes, one file of a folder of diffusers, the parts of a bundle."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from anima_train.cli.main import COMMANDS, application
from anima_train.core.errors import ConfigError, ModelFileError
from anima_train.model.loading import ModelFiles
from anima_train.model.tiny import tiny_paths, write_tiny
from anima_train.tools.convert import to_diffusers

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' own deprecations


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder)
    return tiny_paths(folder)


@pytest.fixture
def anima():
    """Run `anima convert`; returns what it printed, or raises its error."""

    def invoke(*arguments):
        result = CliRunner().invoke(application(COMMANDS, ""), ["convert", *map(str, arguments)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.output

    return invoke


def same(found, expected):
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == tensor.dtype for name, tensor in expected.items())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_transformer_that_counts_as_cosmos_predict2_is_told_of(model, anima, tmp_path, caplog):
    split = {name: each for name, each in load_file(model.transformer).items() if "llm_adapter" not in name}
    for number, (told, is_noted) in enumerate(((None, True), ("anima-2b", False), ("cosmos-predict2-2b", False))):
        source, out = tmp_path / f"{number}.safetensors", tmp_path / f"out{number}.safetensors"
        save_file(split, source, told and {"modelspec.architecture": told})
        caplog.clear()
        anima(source, out, "--to", "comfyui")
        assert ("counts as Cosmos-Predict2" in caplog.text) == is_noted
        with safe_open(out, "pt") as file:
            assert file.metadata()["modelspec.license"].startswith("CircleStone") == (told == "anima-2b")


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    """ComfyUI's "save checkpoint" of the model."""
    path = tmp_path_factory.mktemp("bundle") / "bundle.safetensors"
    tensors = {}
    for source, old, new in (
        (model.transformer, "net.", "model.diffusion_model."), (model.vae, "", "vae."),
        (model.llm, "", "text_encoders.qwen3_06b.transformer."),
    ):  # fmt: skip
        tensors |= {new + name.removeprefix(old): tensor for name, tensor in load_file(source).items()}
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("prefix", ["net.", "model.diffusion_model.", "none"])
def test_prefixes_become_each_other_bit_by_bit(model, anima, tmp_path, prefix):
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    text = anima(model.transformer, there, "--to", "comfyui", "--prefix", prefix)
    keys = "" if prefix == "none" else prefix
    assert f"with the prefix {prefix}" in text
    expected = load_file(model.transformer)
    same(load_file(there), {keys + name.removeprefix("net."): tensor for name, tensor in expected.items()})
    anima(there, back, "--to", "comfyui")
    same(load_file(back), expected)
    with safe_open(back, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["anima_train.origin"]) == {"convert": "there.safetensors", "prefix": "net."}
    anima(model.transformer, tmp_path / "wide.safetensors", "--to", "comfyui", "--dtype", "bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "wide.safetensors").values()} == {torch.bfloat16}


def test_a_folder_of_diffusers_becomes_the_file_that_it_was_made_of(model, anima, tmp_path):
    files = ModelFiles(model.transformer, model.vae, model.llm, model.tokenizer, model.t5_tokenizer)
    to_diffusers(files, tmp_path / "folder")
    anima(tmp_path / "folder", tmp_path / "out.safetensors", "--to", "comfyui")
    same(load_file(tmp_path / "out.safetensors"), load_file(model.transformer))
    weights = tmp_path / "folder" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    halves = sorted(tensors)[: len(tensors) // 2]
    save_file({name: tensors[name] for name in halves}, weights.with_name("a-00001-of-00002.safetensors"))
    save_file(
        {name: tensors[name] for name in tensors.keys() - halves}, weights.with_name("a-00002-of-00002.safetensors")
    )
    weights.unlink()
    anima(tmp_path / "folder", tmp_path / "parted.safetensors", "--to", "comfyui")
    same(load_file(tmp_path / "parted.safetensors"), load_file(model.transformer))
    weights.with_name("a-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelFileError, match="folder"):
        anima(tmp_path / "folder", tmp_path / "half.safetensors", "--to", "comfyui")
    assert not (tmp_path / "half.safetensors").exists()
    with pytest.raises(ModelFileError, match="there are no weights; expected a folder that diffusers has saved"):
        anima(tmp_path, tmp_path / "none.safetensors", "--to", "comfyui")


def test_a_bundle_becomes_its_parts(model, bundle, anima, tmp_path):
    text = anima(bundle, tmp_path / "parts", "--to", "parts")
    assert "diffusion_model.safetensors (" in text
    same(load_file(tmp_path / "parts" / "diffusion_model.safetensors"), load_file(model.transformer))
    same(load_file(tmp_path / "parts" / "vae.safetensors"), load_file(model.vae))
    same(load_file(tmp_path / "parts" / "text_encoder.safetensors"), load_file(model.llm))
    anima(bundle, tmp_path / "one.safetensors", "--to", "comfyui")
    same(load_file(tmp_path / "one.safetensors"), load_file(model.transformer))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{model}", "{out}", "--to", "parts"), "is no bundle, which has the VAE and the text encoder in it"),
        (("{bundle}", "{here}", "--to", "parts"), "already exists"),
        (("{model}", "{out}", "--to", "kohya"), "--to kohya is for adapters, and"),
        (("{model}", "{out}", "--to", "diffusers"), "is a whole model; give the config that names it"),
        (("{model}", "{out}", "--to", "diffusers", "--prefix", "net."), "--prefix is for a whole model as one file"),
        (("{model}", "{out}", "--to", "comfyui", "--set", "a=1"), "--checkpoint and --set are for a config"),
        (("{here}", "{here}/new", "--to", "diffusers"), "is a whole model; give the config that names it"),
        (("{vae}", "{out}", "--to", "comfyui"), "expected a transformer; this looks like the Qwen-Image VAE"),
        (("{here}/none.safetensors", "{out}", "--to", "comfyui"), "there is no such file"),
    ],
)
def test_what_cannot_be_converted_is_told(model, bundle, anima, tmp_path, arguments, message):
    places = {"model": model.transformer, "vae": model.vae, "bundle": bundle, "here": tmp_path}
    places["out"] = tmp_path / "out.safetensors"
    with pytest.raises((ConfigError, ModelFileError)) as refused:
        anima(*(each.format(**places) for each in arguments))
    assert message in str(refused.value)
    assert not places["out"].exists()
