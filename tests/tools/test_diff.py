"""The difference of two checkpoints, and what a LoRA adds, against whole matrices and singular values."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from anima_train.cli.main import main
from anima_train.core.errors import ModelFileError
from anima_train.model.tiny import tiny_paths
from anima_train.tools.diff import Change, difference, leading_directions, table


@pytest.fixture
def base(tiny):
    return tiny_paths(tiny).transformer


def changed(base, path, changes):
    """A copy of a checkpoint with some tensors changed, under another prefix."""
    tensors = {name.removeprefix("net."): tensor for name, tensor in load_file(base).items()}
    for name, change in changes.items():
        tensors[name] = change(tensors[name].float()).to(tensors[name].dtype)
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}, path)
    return tensors


def test_a_checkpoint_is_compared_tensor_by_tensor_whatever_its_prefix(base, tmp_path, error):
    before = {name.removeprefix("net."): tensor.float() for name, tensor in load_file(base).items()}
    names = ["blocks.0.self_attn.q_proj.weight", "blocks.1.mlp.layer2.weight", "llm_adapter.blocks.0.mlp.0.weight"]
    after = changed(base, tmp_path / "other.safetensors", {
        names[0]: lambda tensor: tensor + 0.5 * torch.outer(torch.ones(len(tensor)), torch.ones(tensor.shape[1])),
        names[1]: lambda tensor: tensor * 2,
        names[2]: lambda tensor: torch.cat([tensor[:1] + 1, tensor[1:]]),
    })  # fmt: skip
    found = difference(base, tmp_path / "other.safetensors", directions=4)
    deltas = {name: after[name].float() - before[name] for name in before}
    squared = sum(float(delta.double().square().sum()) for delta in deltas.values())
    total = sum(float(tensor.double().square().sum()) for tensor in before.values())
    assert found.whole.relative == pytest.approx(math.sqrt(squared / total), rel=1e-5)
    assert found.whole.num_values == sum(tensor.numel() for tensor in before.values())
    moved = sum(int(delta.count_nonzero()) for delta in deltas.values())
    assert found.whole.moved == pytest.approx(moved / found.whole.num_values)
    assert {name for name, _ in found.largest} == set(names)
    assert [key for key, change in found.by_component.items() if change.relative] == ["self_attn", "mlp", "llm_adapter"]
    assert {block for block, changes in found.by_block.items() if any(each.relative for each in changes.values())} == {
        "0", "1", "llm_adapter",
    }  # fmt: skip
    assert found.by_block["1"]["mlp"].effective_rank == pytest.approx(effective_rank(deltas[names[1]]), rel=1e-3)
    assert found.by_component["self_attn"].effective_rank == pytest.approx(effective_rank(deltas[names[0]]), rel=1e-3)
    assert dict(found.largest)[names[1]].interference == pytest.approx(
        interference(before[names[1]], deltas[names[1]], 4), abs=0.02
    )


def effective_rank(delta):
    values = torch.linalg.svdvals(delta.double()).square()
    return float(values.sum() ** 2 / values.square().sum())


def interference(weight, delta, number):
    """By whole singular value decompositions."""
    u, _, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    left, right = (
        torch.eye(len(u)) - u[:, :number] @ u[:, :number].T,
        torch.eye(vh.shape[1]) - vh[:number].T @ vh[:number],
    )
    return 1 - float((left @ delta.double() @ right).square().sum() / delta.double().square().sum())


def test_leading_directions_are_those_of_the_decomposition():
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, 40, generator=generator)).Q for size in (90, 60))
    matrix = u @ torch.diag(torch.tensor([0.8**index for index in range(40)])) @ v.T
    left, right = leading_directions(matrix, 6, "some")
    torch.testing.assert_close((left.T @ u[:, :6]).abs(), torch.eye(6), atol=1e-3, rtol=0)
    torch.testing.assert_close((right.T @ v[:, :6]).abs(), torch.eye(6), atol=1e-3, rtol=0)
    again = leading_directions(matrix, 6, "some")
    assert torch.equal(again[0], left)


def test_a_change_inside_or_outside_of_the_leading_directions_is_told_apart(base, tmp_path):
    name = "blocks.0.mlp.layer1.weight"
    weight = load_file(base)[f"net.{name}"].float()
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    for index, expected in ((0, 1.0), (len(vh) - 1, 0.0)):
        direction = torch.outer(u[:, index], vh[index])
        path = tmp_path / f"{index}.safetensors"
        tensors = load_file(base)
        tensors[f"net.{name}"] = weight + direction
        save_file(tensors, path)
        found = difference(base, path, directions=8)
        assert found.by_component["mlp"].interference == pytest.approx(expected, abs=0.05)
        assert found.by_component["mlp"].effective_rank == pytest.approx(1.0, abs=0.05)


def test_what_a_lora_adds_is_its_product_at_strength_1(trainer, base):
    run = trainer(optimizer={"lr": 1e-2})
    found = difference(base, run.path / "weights" / "run.safetensors")
    before = {name.removeprefix("net."): tensor.float() for name, tensor in load_file(base).items()}
    squared = 0.0
    for key, up in run.weights.items():
        if ".lora_B." in key:
            down = run.weights[key.replace(".lora_B.", ".lora_A.")]
            squared += float((up.double() @ down.double()).square().sum())
    total = sum(float(tensor.double().square().sum()) for tensor in before.values())
    assert found.whole.relative == pytest.approx(math.sqrt(squared / total), rel=1e-4)
    assert found.by_component["llm_adapter"].relative == 0
    assert found.by_component["mlp"].effective_rank <= 4.001
    assert 0 < found.whole.moved < 1


def test_a_checkpoint_that_does_not_fit_is_refused(base, tmp_path):
    tensors = load_file(base)
    tensors["net.blocks.0.mlp.layer1.weight"] = torch.zeros(8, 8)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ModelFileError, match=r"has in another shape 1 tensor of .*blocks\.0\.mlp\.layer1\.weight"):
        difference(base, tmp_path / "other.safetensors")
    name = "diffusion_model.blocks.0.mlp.layer1.lora_"
    lora = tmp_path / "l.safetensors"
    save_file({f"{name}A.weight": torch.zeros(2, 48), f"{name}B.weight": torch.zeros(192, 2)}, lora)
    with pytest.raises(
        ModelFileError, match=r"l\.safetensors: is an adapter; the checkpoint that it is for comes first"
    ):
        difference(lora, lora)
    with pytest.raises(ModelFileError, match=r"give the file in it: .*anima-tiny\.safetensors"):
        difference(base.parent, lora)
    with pytest.raises(ModelFileError, match="expected a transformer; this looks like the Qwen-Image VAE"):
        difference(tiny_paths(base.parents[2]).vae, base)


def test_the_command_prints_a_table_writes_a_page_and_json(base, tmp_path, monkeypatch, capsys):
    changed(base, tmp_path / "<b>.safetensors", {"blocks.0.mlp.layer1.weight": lambda tensor: tensor * 1.1})
    page = tmp_path / "diff.html"
    arguments = ["anima", "diff", str(base), str(tmp_path / "<b>.safetensors")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--html", str(page)])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["relative", "moved", "rank", "in", "top", "16"]
    assert any(line.startswith("mlp ") for line in lines)
    assert lines[-1] == f"page: {page}"
    text = page.read_text()
    assert "&lt;b&gt;.safetensors" in text
    assert "blocks.0.mlp.layer1.weight" in text

    monkeypatch.setattr(sys, "argv", [*arguments, "--json", "--directions", "0"])
    with pytest.raises(SystemExit):
        main()
    found = json.loads(capsys.readouterr().out)
    assert found["by_component"]["mlp"]["relative"] > 0
    assert found["whole"]["interference"] is None


def test_files_that_are_the_same_are_told_as_such(base):
    found = difference(base, base)
    assert found.whole == Change(found.whole.num_values, 0.0, 0.0, None, None)
    assert found.largest == []
    assert "largest" not in "\n".join(table(found))
