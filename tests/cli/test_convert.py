"""`anima convert`, as a person types it."""

import os

import pytest
from diffusers import ModularPipeline
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from anima_train.cli.main import COMMANDS, application, main
from anima_train.core.errors import ConfigError, ModelFileError
from anima_train.model.tiny import tiny_paths
from anima_train.tools.convert import COMPONENTS

CONFIG = """
output_dir = "out"
epochs = 1
dataset = "elsewhere.toml"
keep_best = "held/loss"  # of a set that is elsewhere, too
eval_datasets = [{ name = "held", config = "held.toml" }]
[model]
type = "anima"
tiny_path = "tiny"
dtype = "float32"
[adapter]
type = "lora"
rank = 4
[optimizer]
type = "adamw"
lr = 1e-4
"""
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def anima(tmp_path, monkeypatch):
    """Run `anima ...` in a folder with a config whose dataset is on another machine; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.toml").write_text(CONFIG)

    def invoke(*arguments):
        result = CliRunner().invoke(application(COMMANDS, "anima"), [*map(str, arguments)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.output

    return invoke


@pytest.mark.filterwarnings("ignore")  # diffusers' own deprecations
def test_a_config_becomes_a_folder_that_diffusers_loads(anima):
    text = anima("convert", "config.toml", "--to", "diffusers", "pipeline", "--dtype", "float32")
    assert "diffusers.ModularPipeline.from_pretrained('pipeline')" in text
    pipeline = ModularPipeline.from_pretrained("pipeline", local_files_only=True)
    pipeline.load_components(local_files_only=True)
    assert all(getattr(pipeline, name) is not None for name in COMPONENTS)
    assert {str(tensor.dtype) for tensor in load_file(f"pipeline/vae/{WEIGHTS}").values()} == {"torch.float32"}


@pytest.mark.parametrize("prefix", ["net.", "model.diffusion_model.", ""])
def test_checkpoint_takes_the_place_of_the_configs_transformer(anima, tmp_path, prefix):
    anima("convert", "config.toml", "--to", "diffusers", "before")
    weights = load_file(tiny_paths(tmp_path / "tiny").transformer)
    changed = {prefix + key.removeprefix("net."): tensor * 2 for key, tensor in weights.items()}
    save_file(changed, "trained.safetensors")
    anima("convert", "config.toml", "--to", "diffusers", "after", "--checkpoint", "trained.safetensors")
    for name in ("transformer", "text_conditioner"):
        before, after = load_file(f"before/{name}/{WEIGHTS}"), load_file(f"after/{name}/{WEIGHTS}")
        assert before.keys() == after.keys()
        assert all((after[key] == before[key] * 2).all() for key in before)
    assert load_file(f"before/vae/{WEIGHTS}").keys() == load_file(f"after/vae/{WEIGHTS}").keys()


def test_folder_that_is_there_is_refused_before_any_file_is_looked_for(anima, tmp_path, capsys, monkeypatch):
    (tmp_path / "pipeline").mkdir()
    monkeypatch.setattr("sys.argv", ["anima", "convert", "config.toml", "--to", "diffusers", "pipeline"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "error: pipeline already exists" in capsys.readouterr().err
    assert not (tmp_path / "tiny").exists()


def test_what_cannot_be_converted_says_why_and_leaves_nothing(anima, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/out cannot be written"):
        anima("convert", "config.toml", "--to", "diffusers", "file/out")
    with pytest.raises(ModelFileError, match=r"nothing\.safetensors: there is no such file"):
        anima("convert", "config.toml", "--to", "diffusers", "out", "--checkpoint", "nothing.safetensors")
    with pytest.raises(ConfigError, match="--to kohya is for files of weights"):
        anima("convert", "config.toml", "--to", "kohya", "out")
    assert "'onnx' is not" in anima("convert", "config.toml", "--to", "onnx", "out")
    assert "Missing option '--to'" in anima("convert", "config.toml", "out")
    assert sorted(os.listdir(tmp_path)) == ["config.toml", "file", "tiny"]


def test_keys_of_the_config_can_be_changed(anima, tmp_path):
    anima("convert", "config.toml", "--to", "diffusers", "out", "--set", f"model.tiny_path='{tmp_path / 'other'}'")
    assert sorted(os.listdir(tmp_path)) == ["config.toml", "other", "out"]
