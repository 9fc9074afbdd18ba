"""Adapters under the keys of other programs: the same bits, or the same change."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from anima_train.adapters.parts import read_adapter
from anima_train.adapters.updates import product
from anima_train.cli.main import main
from anima_train.core.errors import ConfigError
from anima_train.model.tiny import tiny_paths
from anima_train.tools.convert_adapter import convert_adapter
from anima_train.tools.verify import verify

CASES = ("lora_alpha", "lokr_both_low", "loha", "dora_out", "diff")


@pytest.fixture
def kohya(golden, tmp_path):
    """Makes a file in kohya's keys with golden cases in its blocks."""

    def make(*cases):
        tensors = {
            f"lora_unet_blocks_{number}_self_attn_q_proj.{key.split('.file.')[1]}": tensor.clone()
            for number, case in enumerate(cases)
            for key, tensor in golden("adapters.safetensors").items()
            if key.startswith(f"{case}.file.")
        }
        halves = {"lora_A": "lora_down", "lora_B": "lora_up"}
        tensors = {
            key.replace("lora_A", halves["lora_A"]).replace("lora_B", halves["lora_B"]): t for key, t in tensors.items()
        }
        tensors["lora_unet_llm_adapter_blocks_0_mlp_0.diff_b"] = torch.ones(4) if len(cases) > 1 else None
        path = tmp_path / "kohya.safetensors"
        save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, path)
        return path

    return make


def test_keys_of_comfyui_and_kohya_become_each_other_bit_by_bit(kohya, tmp_path):
    path, there, back = kohya(*CASES), tmp_path / "comfy.safetensors", tmp_path / "back.safetensors"
    assert convert_adapter(path, there, "comfyui") == len(CASES) + 1
    convert_adapter(there, back, "kohya")
    before, between, after = (load_file(each) for each in (path, there, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert all(key.startswith("diffusion_model.") for key in between)
    assert verify(there).is_good_for("ComfyUI")


def test_for_diffusers_alpha_goes_into_the_tensors_and_the_change_is_the_same(kohya, tmp_path):
    path, there, back = kohya("lora_alpha"), tmp_path / "diffusers.safetensors", tmp_path / "back.safetensors"
    convert_adapter(path, there, "diffusers")
    convert_adapter(there, back, "comfyui", torch.float32)
    assert verify(there).is_good_for("diffusers")
    name = "blocks.0.self_attn.q_proj.weight"
    expected = product(read_adapter(path).changes[name])
    for each in (there, back):
        assert not any(key.endswith("alpha") for key in load_file(each))
        torch.testing.assert_close(product(read_adapter(each).changes[name]), expected, rtol=1e-5, atol=1e-6)


def test_alpha_in_metadata_becomes_a_tensor_and_counts_once(tmp_path):
    stem = "transformer.transformer_blocks.1.attn1.to_q"
    tensors = {f"{stem}.lora_A.weight": torch.randn(4, 8), f"{stem}.lora_B.weight": torch.randn(8, 4)}
    config = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})
    path, there = tmp_path / "diffusers.safetensors", tmp_path / "kohya.safetensors"
    save_file(tensors, path, {"lora_adapter_metadata": config})
    convert_adapter(path, there, "kohya")
    found = read_adapter(there).changes["blocks.1.self_attn.q_proj.weight"]
    expected = 0.5 * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
    torch.testing.assert_close(product(found), expected)
    torch.testing.assert_close(product(read_adapter(path).changes["blocks.1.self_attn.q_proj.weight"]), expected)


@pytest.mark.parametrize(("case", "words"), [("loha", "--to lora$"), ("dora_out", "--to lora --base BASE$")])
def test_diffusers_takes_plain_loras_alone(kohya, tmp_path, case, words):
    with pytest.raises(ConfigError, match=words):
        convert_adapter(kohya(case), tmp_path / "out.safetensors", "diffusers")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `anima convert` in this process; returns its exit code and what it printed."""

    def invoke(*arguments):
        monkeypatch.setattr(sys, "argv", ["anima", "convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, capsys.readouterr()

    return invoke


def test_loha_and_lokr_become_the_nearest_lora_and_the_error_is_told(kohya, run, tmp_path):
    path, out = kohya("loha", "lokr_both_low"), tmp_path / "lora.safetensors"
    code, streams = run(path, out, "--to", "lora", "--rank", "2")
    assert code == 2
    assert "is no matrix" in streams.err  # the change of a bias
    tensors = load_file(path)
    save_file({key: tensor for key, tensor in tensors.items() if "diff_b" not in key}, path)
    code, streams = run(path, out, "--to", "lora", "--rank", "2")
    assert code == 0
    before, after = read_adapter(path).changes, read_adapter(out).changes
    assert before.keys() == after.keys()
    errors = []
    for name, parts in before.items():
        wanted, found = product(parts), product(after[name])
        squares = torch.linalg.svdvals(wanted).square()
        errors.append(float((squares[2:].sum() / squares.sum()).sqrt()))
        assert float((found - wanted).norm() / wanted.norm()) == pytest.approx(errors[-1], abs=1e-5)
    assert f"{max(errors):.2%}" in streams.out


def test_a_dora_becomes_a_lora_with_its_base(run, tiny, tmp_path):
    base, module = tiny_paths(tiny).transformer, "blocks.0.self_attn.q_proj"
    weight = load_file(base)[f"net.{module}.weight"].float()
    down, up, scale = torch.randn(2, weight.shape[1]), torch.randn(len(weight), 2), torch.rand(len(weight), 1)
    stem, path, out = f"diffusion_model.{module}", tmp_path / "dora.safetensors", tmp_path / "lora.safetensors"
    save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up, f"{stem}.dora_scale": scale}, path)
    code, streams = run(path, out, "--to", "lora", "--rank", "64")
    assert code == 2
    assert "give that base as --base" in streams.err
    code, streams = run(path, out, "--to", "lora", "--rank", "64", "--base", base)
    assert code == 0, streams.err
    whole = scale * (weight + up @ down) / weight.norm(dim=1, keepdim=True)  # as ComfyUI has it
    found = product(read_adapter(out).changes[f"{module}.weight"])
    torch.testing.assert_close(found, whole - weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "lora"], "give --rank R, or --energy"),
        (["--to", "kohya", "--rank", "4"], "--rank, --energy and --base are for --to lora"),
        (["--to", "lora", "--rank", "4", "--prefix", "net."], "--prefix is for a whole model"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(kohya, run, tmp_path, arguments, message):
    code, streams = run(kohya("loha"), tmp_path / "out.safetensors", *arguments)
    assert code == 2
    assert message in streams.err


def test_the_command_takes_a_file_in_the_place_of_a_config(kohya, run, tmp_path):
    path, out = kohya("lora_alpha"), tmp_path / "out.safetensors"
    code, streams = run(path, out, "--to", "comfyui", "--dtype", "bfloat16")
    assert (code, streams.out) == (0, f"{out}: 1 weight under the keys of comfyui\n")
    assert load_file(out)["diffusion_model.blocks.0.self_attn.q_proj.lora_A.weight"].dtype == torch.bfloat16
    assert run(path, out, "--to", "kohya")[0] == 2
    code, streams = run(path, tmp_path / "new.safetensors", "--to", "kohya", "--set", "seed=1")
    assert code == 2
    assert "are for a config" in streams.err
    code, streams = run(tmp_path / "config.toml", tmp_path / "folder", "--to", "kohya")
    assert code == 2
    assert "--to kohya is for files of weights" in streams.err
