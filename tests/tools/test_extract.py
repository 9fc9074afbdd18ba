"""Differences of checkpoints as LoRAs, and LoRAs of lower rank, against whole singular value decompositions."""

import json
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from anima_train.cli.main import main
from anima_train.core.errors import ModelFileError
from anima_train.model.tiny import tiny_paths
from anima_train.tools.extract import extract
from anima_train.tools.merge import Source, merge, merge_adapters
from anima_train.tools.spectra import Limit
from anima_train.tools.verify import verify

CHANGED = ("blocks.0.self_attn.q_proj", "blocks.1.mlp.layer1", "llm_adapter.blocks.0.mlp.0")


@pytest.fixture
def base(tiny):
    return tiny_paths(tiny).transformer


@pytest.fixture
def tuned(base, tmp_path):
    """A float32 copy of the tiny model with changes of rank 3 to some matrices, and one to a norm."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: tensor.float() for name, tensor in load_file(base).items()}
    for module in CHANGED:
        rows, columns = tensors[f"net.{module}.weight"].shape
        up, down = torch.randn(rows, 3, generator=generator), torch.randn(3, columns, generator=generator)
        tensors[f"net.{module}.weight"] += 0.1 * up @ down
    tensors["net.t_embedding_norm.weight"] += 0.5
    save_file(tensors, tmp_path / "tuned.safetensors")
    return tmp_path / "tuned.safetensors"


def change(base, tuned, module):
    name = f"net.{module}.weight"
    return load_file(tuned)[name] - load_file(base)[name].float()


def product(path, module):
    tensors = load_file(path)
    up, down = (tensors[f"diffusion_model.{module}.lora_{side}.weight"].float() for side in "BA")
    return up @ down


def test_an_extracted_lora_makes_the_other_checkpoint_of_the_base(base, tuned, tmp_path):
    out = tmp_path / "lora.safetensors"
    found = extract(base, tuned, out, Limit(3))
    assert found.errors.keys() == set(CHANGED)
    assert found.error < 1e-4
    assert found.left_out.keys() == {"t_embedding_norm.weight"}
    assert all(verify(out, base).is_good_for(program) for program in ("ComfyUI", "diffusers"))
    merge([Source(out)], tmp_path / "back.safetensors", into=base, dtype=torch.float32)
    back, wanted = load_file(tmp_path / "back.safetensors"), load_file(tuned)
    for module in CHANGED:
        torch.testing.assert_close(back[f"net.{module}.weight"], wanted[f"net.{module}.weight"], rtol=1e-3, atol=1e-4)


def test_a_dora_becomes_a_lora_of_what_it_does_to_its_base(base, tmp_path):
    module, generator = CHANGED[0], torch.Generator().manual_seed(0)
    weight = load_file(base)[f"net.{module}.weight"].float()
    down, up = torch.randn(2, weight.shape[1], generator=generator), torch.randn(len(weight), 2, generator=generator)
    scale = torch.rand(len(weight), 1, generator=generator)
    stem, path = f"diffusion_model.{module}", tmp_path / "dora.safetensors"
    save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up, f"{stem}.dora_scale": scale}, path)
    found = extract(base, path, tmp_path / "lora.safetensors", Limit(len(weight)))
    assert found.errors.keys() == {module}
    whole = scale * (weight + up @ down) / weight.norm(dim=1, keepdim=True)  # as ComfyUI has it
    torch.testing.assert_close(product(tmp_path / "lora.safetensors", module), whole - weight, rtol=1e-3, atol=1e-3)


def test_a_lower_rank_is_the_best_one_and_its_error_is_told(base, tuned, tmp_path):
    out = tmp_path / "lora.safetensors"
    found = extract(base, tuned, out, Limit(2))
    rests = []
    for module in CHANGED:
        values = torch.linalg.svdvals(change(base, tuned, module).double())
        rest = float((change(base, tuned, module) - product(out, module)).norm())
        assert rest == pytest.approx(float(values[2:].norm()), rel=1e-2)
        assert found.errors[module] == pytest.approx(rest / float(values.norm()), rel=1e-2)
        rests.append((rest**2, float(values.square().sum())))
    together = (sum(rest for rest, _ in rests) / sum(whole for _, whole in rests)) ** 0.5
    assert found.error == pytest.approx(together, rel=1e-2)


def test_a_share_of_the_energy_sets_the_rank_of_each_module(base, tuned, tmp_path):
    out = tmp_path / "lora.safetensors"
    found = extract(base, tuned, out, Limit(energy=0.9))
    for module in CHANGED:
        shares = torch.linalg.svdvals(change(base, tuned, module).double()).square()
        rank = int((shares.cumsum(0) / shares.sum() < 0.9).sum()) + 1
        assert load_file(out)[f"diffusion_model.{module}.lora_A.weight"].shape[0] == rank
        assert found.errors[module] ** 2 <= 0.1 + 1e-4


def test_what_is_equal_has_nothing_to_extract(base, tmp_path):
    with pytest.raises(ModelFileError, match="nothing to extract"):
        extract(base, base, tmp_path / "lora.safetensors", Limit(2))


def test_a_lora_that_is_made_smaller_is_the_best_of_its_rank(plain_run, tmp_path):
    path, out = plain_run.path / "weights" / "plain.safetensors", tmp_path / "small.safetensors"
    found = merge_adapters([Source(path)], out, Limit(2), None)
    assert found.kind == "a LoRA of rank 2"
    for module in ("blocks.0.self_attn.q_proj", "blocks.1.mlp.layer2"):
        whole = product(path, module)
        rest = float((whole - product(out, module)).norm())
        assert rest == pytest.approx(float(torch.linalg.svdvals(whole)[2:].norm()), rel=1e-3, abs=1e-6)
        assert found.errors[module] == pytest.approx(rest / float(whole.norm()), rel=1e-2, abs=1e-4)
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "2"
    assert metadata["ss_steps"] == "4"  # of the training
    assert json.loads(metadata["anima_train.origin"])["rank"] == 2


def test_the_commands_tell_errors_and_want_a_rank_or_a_share(base, tuned, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["anima", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, capsys.readouterr()

    out, small = str(tmp_path / "lora.safetensors"), str(tmp_path / "small.safetensors")
    code, streams = run("extract", str(base), str(tuned), "--out", out, "--rank", "2")
    assert code == 0
    lines = streams.out.splitlines()
    assert lines[0] == f"{out}: a LoRA of rank 2 for 3 modules"
    assert lines[-1].startswith("1 changed tensor left out, which a LoRA does not hold; the largest change:")
    code, streams = run("resize", out, "--out", small, "--rank", "1", "--json")
    assert code == 0
    assert json.loads(streams.out)["errors"].keys() == set(CHANGED)
    for arguments, words in (((), "give --rank R"), (("--energy", "1.5"), "found 1.5; write 0.95")):
        code, streams = run("resize", out, "--out", str(tmp_path / "new.safetensors"), *arguments)
        assert code == 2
        assert words in streams.err
