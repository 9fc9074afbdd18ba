"""The statistics of files, against whole matrices and singular values."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from anima_train.adapters.updates import change, product
from anima_train.cli.main import main
from anima_train.model.tiny import tiny_paths
from anima_train.tools.inspect import inspect, table
from anima_train.tools.spectra import Limit, effective_rank, singular_values, truncated, truncated_product

NAMES = {"lora_A.weight": "down", "lora_down.weight": "down", "lora_B.weight": "up", "lora_up.weight": "up"}
STEM = "diffusion_model.blocks.{}.self_attn.q_proj"


def parts_of(tensors, case):
    prefix = f"{case}.file."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


@pytest.mark.parametrize(
    "case", ["lora", "lora_alpha", "lokr_full", "lokr_w2_low", "lokr_both_low", "loha", "dora_out", "diff"]
)
def test_singular_values_are_those_of_the_whole_change(golden, case):
    parts = {NAMES.get(key, key): tensor for key, tensor in parts_of(golden("adapters.safetensors"), case).items()}
    expected = torch.linalg.svdvals(product(parts))
    found = singular_values(parts)
    number = min(len(found), len(expected))
    torch.testing.assert_close(found[:number], expected[:number], rtol=1e-3, atol=1e-3 * float(expected[0]))
    assert float(found[number:].abs().sum() + expected[number:].abs().sum()) < 1e-3


def test_effective_rank_is_the_number_of_equal_directions():
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert effective_rank(torch.zeros(3)) is None


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_factors_of_lower_rank_are_the_best_ones(shape):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator)
    values = torch.linalg.svdvals(matrix)
    found = truncated(matrix, Limit(5), "some")
    assert found.up.shape == (shape[0], 5)
    expected = float(values[5:].norm())
    assert float((matrix - found.up @ found.down).norm()) == pytest.approx(expected, rel=1e-4)
    assert found.error == pytest.approx(expected / float(matrix.norm()), rel=1e-4)
    assert float(found.up.norm()) == pytest.approx(float(found.down.norm()), rel=1e-4)
    held = 1 - truncated(matrix, Limit(energy=0.9), "some").error ** 2
    assert 0.9 <= held < 0.97
    factors = torch.randn(shape[0], 8, generator=generator), torch.randn(8, shape[1], generator=generator)
    whole = factors[0] @ factors[1]
    short = truncated_product(factors, Limit(3))
    expected = float(torch.linalg.svdvals(whole)[3:].norm())
    assert float((whole - short.up @ short.down).norm()) == pytest.approx(expected, rel=1e-4)
    assert short.error == pytest.approx(expected / float(whole.norm()), rel=1e-4)


def test_adapters_are_added_up_by_component_and_block_and_dead_ones_named(golden, tmp_path):
    tensors = golden("adapters.safetensors")
    path = tmp_path / "adapter.safetensors"
    kinds = ("lora", "loha", "lokr_w2_low", "diff")
    file = {
        f"{STEM.format(number)}.{key}": tensor.clone()
        for number, case in enumerate(kinds)
        for key, tensor in parts_of(tensors, case).items()
    }
    file[f"{STEM.format(0).replace('self_attn', 'cross_attn')}.lora_A.weight"] = torch.ones(4, 16)
    file[f"{STEM.format(0).replace('self_attn', 'cross_attn')}.lora_B.weight"] = torch.zeros(24, 4)
    save_file(file, path, {"ss_seed": "7"})
    found = inspect(path)
    assert found.metadata == {"ss_seed": "7"}
    assert found.dead == ["blocks.0.cross_attn.q_proj.weight"]
    assert found.by_component["cross_attn"].num_dead == 1
    total = 0.0
    for number, case in enumerate(kinds):
        parts = {NAMES.get(key, key): tensor for key, tensor in parts_of(tensors, case).items()}
        norm = float(change(tensors[f"{case}.weight"], parts).norm())
        assert found.by_block[str(number)]["self_attn"].norm == pytest.approx(norm, rel=1e-4)
        total += norm**2
    assert found.whole.norm == pytest.approx(total**0.5, rel=1e-4)
    assert found.whole.rms == pytest.approx((total / (5 * 24 * 16)) ** 0.5, rel=1e-4)
    assert {part.kind for part in found.parameters} == {"LoRA", "LoHa", "LoKr", "difference"}
    assert "1 weight dead (all zero):" in list(table(found))
    assert not any("DoRA" in line for line in table(found))
    save_file(file | {f"{STEM.format(0)}.dora_scale": torch.ones(24, 1)}, path)
    assert any(line.startswith("norms without DoRA's scales") for line in table(inspect(path)))


def test_a_checkpoint_is_told_by_its_norms(tiny):
    path = tiny_paths(tiny).transformer
    found = inspect(path)
    squared = sum(float(tensor.float().square().sum()) for tensor in load_file(path).values())
    assert found.whole.norm == pytest.approx(squared**0.5, rel=1e-4)
    assert found.whole.effective_rank is None
    assert set(found.by_block) == {"0", "1", "llm_adapter", ""}


def test_the_command_prints_a_table_writes_a_page_and_json(plain_run, tmp_path, monkeypatch, capsys):
    path, page = plain_run.path / "weights" / "plain.safetensors", tmp_path / "inspect.html"
    monkeypatch.setattr(sys, "argv", ["anima", "inspect", str(path), "--html", str(page)])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["number", "dead", "norm", "RMS", "spectral", "rank"]
    assert any(line.startswith("ss_base_model_version: anima") for line in lines)
    assert "blocks.0.mlp.layer1.weight" in page.read_text()
    monkeypatch.setattr(sys, "argv", ["anima", "inspect", str(path), "--json"])
    with pytest.raises(SystemExit):
        main()
    found = json.loads(capsys.readouterr().out)
    assert found["by_component"]["mlp"]["effective_rank"] <= 4.001
    assert len(found["parameters"]) == found["whole"]["number"] == 32


def test_a_small_rank_is_found_by_iteration_and_as_good():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(200, 160, generator=generator)
    expected = float(torch.linalg.svdvals(matrix)[8:].norm() / matrix.norm())
    assert expected <= truncated(matrix, Limit(8), "some").error < 1.01 * expected
    assert truncated(matrix, Limit(8, 0.01), "some").up.shape[1] < 8
