"""Merges, against the arithmetic on whole matrices and ComfyUI's own merged weights."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from anima_train.cli.main import main
from anima_train.core.errors import ConfigError, ModelFileError
from anima_train.model.tiny import tiny_paths, write_tiny_cosmos
from anima_train.model.variants import LICENSE
from anima_train.tools.convert_adapter import convert_adapter
from anima_train.tools.convert_checkpoint import convert_checkpoint
from anima_train.tools.diff import difference
from anima_train.tools.extract import extract
from anima_train.tools.inspect import inspect
from anima_train.tools.merge import Source, merge
from anima_train.tools.remap import Variant, remap
from anima_train.tools.spectra import Limit
from anima_train.tools.verify import verify

CASES = ("lora", "lora_alpha", "lokr_full", "lokr_w2_low", "lokr_both_low", "loha", "dora_in", "dora_out", "diff")
NAME = "blocks.{}.self_attn.q_proj"


def adapter(golden, path, cases, scale=1.0):
    """An adapter file with a golden case for each block."""
    tensors = golden("adapters.safetensors")
    file = {
        f"diffusion_model.{NAME.format(number)}.{key.split('.file.')[1]}": tensor.clone()
        for number, case in enumerate(cases)
        for key, tensor in tensors.items()
        if key.startswith(f"{case}.file.")
    }
    save_file({key: tensor * scale if "lora_B" in key else tensor for key, tensor in file.items()}, path)
    return path


@pytest.fixture
def checkpoint(golden, tiny, tmp_path):
    """The tiny model with more blocks, whose first attention weights are those of the golden cases."""
    tensors = load_file(tiny_paths(tiny).transformer)
    block = {name: tensor for name, tensor in tensors.items() if name.startswith("net.blocks.0.")}
    for number, case in enumerate(CASES):
        tensors |= {name.replace(".0.", f".{number}.", 1): tensor.clone() for name, tensor in block.items()}
        tensors[f"net.{NAME.format(number)}.weight"] = golden("adapters.safetensors")[f"{case}.weight"]
    save_file(tensors, tmp_path / "base.safetensors", {"modelspec.title": "base"})
    return tmp_path / "base.safetensors"


@pytest.mark.parametrize(("strength", "expected"), [(None, "merged"), (0.5, "merged_half")])
def test_adapters_of_every_kind_become_the_weights_that_comfyui_makes(golden, checkpoint, tmp_path, strength, expected):
    path, out = adapter(golden, tmp_path / "all.safetensors", CASES), tmp_path / "out.safetensors"
    found = merge([Source(path, strength)], out, into=checkpoint)
    assert found.num_changed == len(CASES)
    before, after = load_file(checkpoint), load_file(out)
    assert before.keys() == after.keys()
    for number, case in enumerate(CASES):
        name = f"net.{NAME.format(number)}.weight"
        wanted = golden("adapters.safetensors")[f"{case}.{expected}"]
        torch.testing.assert_close(after.pop(name), wanted, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    with safe_open(out, "pt") as file:
        origin = json.loads(file.metadata()["anima_train.origin"])
    assert origin == {"merge": [{"file": "all.safetensors", "strength": strength}], "into": "base.safetensors"}


def test_the_difference_that_an_adapter_makes_is_that_of_the_merged_checkpoint(golden, checkpoint, tmp_path):
    path, out = adapter(golden, tmp_path / "all.safetensors", CASES), tmp_path / "out.safetensors"
    merge([Source(path)], out, into=checkpoint)
    of_adapter, of_merged = (difference(checkpoint, other, directions=0) for other in (path, out))
    for number in range(len(CASES)):
        changes = [found.by_block[str(number)]["self_attn"] for found in (of_adapter, of_merged)]
        assert changes[0].relative == pytest.approx(changes[1].relative, rel=1e-4)
        assert changes[0].moved == pytest.approx(changes[1].moved)
        assert changes[0].effective_rank == pytest.approx(changes[1].effective_rank, rel=1e-2)


def test_several_adapters_are_added_one_after_the_other(golden, checkpoint, tmp_path):
    first = adapter(golden, tmp_path / "a.safetensors", ["lora"])
    second = adapter(golden, tmp_path / "b.safetensors", ["diff"])
    out = tmp_path / "out.safetensors"
    merge([Source(first), Source(second, -0.5)], out, into=checkpoint, dtype=torch.float32)
    tensors = golden("adapters.safetensors")
    expected = tensors["lora.merged"] - 0.5 * tensors["diff.file.diff"]
    found = load_file(out)
    torch.testing.assert_close(found[f"net.{NAME.format(0)}.weight"], expected, rtol=1e-5, atol=1e-6)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


NVIDIA = {"modelspec.license": "NVIDIA Open Model License", "ss_base_model_version": "cosmos-predict2"}


def told(path):
    with safe_open(path, "pt") as file:
        found = file.metadata()
    return {key: found.get(key) for key in (*NVIDIA, "modelspec.architecture", "ss_network_module")}


def test_what_is_made_of_cosmos_predict2_has_its_licence_and_architecture(tmp_path):
    base = write_tiny_cosmos(tmp_path).transformer
    lora, out = tmp_path / "lora.safetensors", tmp_path / "{}.safetensors"
    stem = f"diffusion_model.{NAME.format(0)}"
    factors = {f"{stem}.lora_A.weight": torch.ones(2, 64), f"{stem}.lora_B.weight": torch.ones(64, 2)}
    save_file(factors, lora, {"modelspec.architecture": "cosmos-predict2-2b/lora"})
    paths = [Path(str(out).format(name)) for name in ("into", "prefix", "extract", "one", "two", "keys", "moved")]
    merge([Source(lora)], paths[0], into=base)
    convert_checkpoint(base, paths[1], "")
    extract(base, paths[0], paths[2], Limit(2))
    merge([Source(lora)], paths[3], rank=1)
    merge([Source(lora), Source(lora)], paths[4])
    convert_adapter(lora, paths[5], "kohya")
    remap(lora, paths[6], Variant.of("40"), 28)
    kinds = ["", "", "/lora", *["-2b/lora"] * 4]
    assert [told(path) for path in paths] == [
        NVIDIA | {"modelspec.architecture": f"cosmos-predict2{kind}", "ss_network_module": None} for kind in kinds
    ]
    save_file(factors, tmp_path / "anima.safetensors")
    merge([Source(lora), Source(tmp_path / "anima.safetensors")], tmp_path / "both.safetensors")
    assert told(tmp_path / "both.safetensors")["modelspec.license"] == LICENSE


def product(path, module):
    tensors = load_file(path)
    up, down = (tensors[f"diffusion_model.{module}.lora_{side}.weight"].float() for side in "BA")
    return up @ down


def test_a_quantised_checkpoint_becomes_one_in_bfloat16(golden, checkpoint, tmp_path):
    path, out = adapter(golden, tmp_path / "a.safetensors", ["lora"]), tmp_path / "out.safetensors"
    tensors, name = load_file(checkpoint), "net.blocks.1.mlp.layer1.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[name.replace(".weight", ".weight_scale")] = torch.tensor(0.5)
    layers = json.dumps({"layers": {name.removesuffix(".weight"): {"format": "float8_e4m3fn"}}})
    save_file(tensors, tmp_path / "small.safetensors", {"_quantization_metadata": layers})
    merge([Source(path)], out, into=tmp_path / "small.safetensors")
    assert torch.equal(load_file(out)[name], (tensors[name].float() * 0.5).bfloat16())
    assert load_file(out).keys() == load_file(checkpoint).keys()
    with safe_open(out, "pt") as file:
        assert "_quantization_metadata" not in file.metadata()


def test_loras_beside_each_other_are_their_sum(golden, tmp_path):
    first = adapter(golden, tmp_path / "a.safetensors", ["lora", "lora"])
    second = adapter(golden, tmp_path / "b.safetensors", ["lora_alpha"])
    out = tmp_path / "out.safetensors"
    found = merge([Source(first, 0.8), Source(second, 0.3)], out)
    assert found.kind == "a LoRA of ranks 4 to 8"
    tensors = golden("adapters.safetensors")
    deltas = {case: tensors[f"{case}.merged"] - tensors[f"{case}.weight"] for case in ("lora", "lora_alpha")}
    expected = 0.8 * deltas["lora"] + 0.3 * deltas["lora_alpha"]
    torch.testing.assert_close(product(out, NAME.format(0)), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(product(out, NAME.format(1)), 0.8 * deltas["lora"], rtol=1e-4, atol=1e-5)
    assert all(verify(out).is_good_for(program) for program in ("ComfyUI", "diffusers"))


def test_a_rank_gives_the_best_factors_of_the_sum_and_tells_the_error(golden, tmp_path):
    kinds = ["loha", "lokr_w2_low", "lora"]
    first = adapter(golden, tmp_path / "a.safetensors", kinds)
    second = adapter(golden, tmp_path / "b.safetensors", ["lora"] * 3)
    out = tmp_path / "out.safetensors"
    found = merge([Source(first), Source(second, 0.5)], out, rank=3)
    tensors = golden("adapters.safetensors")
    for number, kind in enumerate(kinds):
        expected = sum(
            strength * (tensors[f"{case}.merged"] - tensors[f"{case}.weight"])
            for case, strength in ((kind, 1.0), ("lora", 0.5))
        )
        rest = float((product(out, NAME.format(number)) - expected).norm())
        assert rest == pytest.approx(float(torch.linalg.svdvals(expected)[3:].norm()), rel=1e-3, abs=1e-4)
        assert found.errors[NAME.format(number)] == pytest.approx(rest / float(expected.norm()), rel=1e-2, abs=1e-4)
    assert {part.rank for part in inspect(out).parameters} == {3}


def test_checkpoints_are_added_up_by_weights_whatever_their_prefixes(checkpoint, tmp_path):
    generator = torch.Generator().manual_seed(0)
    before = load_file(checkpoint)
    others = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in before.items()}
    renamed = {name.replace("net.", "model.diffusion_model.", 1): tensor for name, tensor in others.items()}
    save_file(renamed, tmp_path / "b.safetensors")
    out = tmp_path / "out.safetensors"
    merge([Source(checkpoint, 0.7), Source(tmp_path / "b.safetensors", 0.3)], out, dtype=torch.float32)
    found = load_file(out)
    for name, tensor in before.items():
        torch.testing.assert_close(found[name], 0.7 * tensor.float() + 0.3 * others[name])
    equal = tmp_path / "equal.safetensors"
    merge([Source(checkpoint), Source(checkpoint)], equal)
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(equal).items())


@pytest.mark.parametrize(
    ("cases", "strengths", "options", "words"),
    [
        (["lora"], [None], {"rank": 2, "into": True}, "--rank has no effect with --into"),
        (["loha"], [None], {}, "is a LoHa, which has no factors to put beside others; give --rank"),
        (["dora_out"], [None], {"rank": 2}, "anima extract"),
        ([], [0.5, 0.6], {}, r"found 1\.1"),
        ([], [0.5, None], {}, "found weights for 1 of 2"),
        ([], [None], {}, "one checkpoint alone"),
        ([], [None, None], {"rank": 3}, "--rank is for adapters"),
        (["lora"], [None, None], {}, "give the checkpoint to which adapters are added as --into"),
    ],
)
def test_a_merge_that_cannot_be_is_refused_with_a_way_out(
    golden, checkpoint, tmp_path, cases, strengths, options, words
):
    paths = [adapter(golden, tmp_path / "a.safetensors", cases)] if cases else [checkpoint]
    sources = [Source(path, strength) for path, strength in zip([*paths, checkpoint], strengths, strict=False)]
    into = checkpoint if options.pop("into", False) else None
    with pytest.raises(ConfigError, match=words):
        merge(sources, tmp_path / "out.safetensors", into, **options)
    assert not (tmp_path / "out.safetensors").exists()


def test_files_that_do_not_fit_are_refused_and_leave_nothing(golden, checkpoint, tiny, tmp_path):
    path, out = adapter(golden, tmp_path / "a.safetensors", ["lora"] * 12), tmp_path / "out.safetensors"
    with pytest.raises(ModelFileError, match="keys for nothing in the transformer"):
        merge([Source(path)], out, into=checkpoint)
    path = adapter(golden, tmp_path / "b.safetensors", ["lora"])
    with pytest.raises(ModelFileError, match=r"the change has the shape \(24, 16\), and the weight \(64, 64\)"):
        merge([Source(path)], out, into=tiny_paths(tiny).transformer)
    with pytest.raises(ModelFileError, match="only checkpoints of one shape can be merged"):
        merge([Source(checkpoint), Source(tiny_paths(tiny).transformer)], out)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        merge([Source(path)], tmp_path / "file" / "out.safetensors")
    (tmp_path / "file").unlink()
    assert {found.name for found in tmp_path.iterdir()} == {"a.safetensors", "b.safetensors", "base.safetensors"}


def test_the_command_takes_strengths_behind_names(golden, checkpoint, tmp_path, monkeypatch, capsys):
    path, out = adapter(golden, tmp_path / "a.safetensors", ["lora"]), tmp_path / "out.safetensors"

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["anima", "merge", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, capsys.readouterr()

    code, streams = run(f"{path}:0.5", "--into", str(checkpoint), "--out", str(out))
    assert code == 1  # weights of the golden cases are no model's: the file is there, and it is told
    assert f"{out} is written, but ComfyUI ignores 9 keys, such as net.{NAME.format(0)}.weight" in streams.err
    assert streams.out.splitlines() == [f"{out}: a checkpoint, with 1 weight changed"]
    expected = golden("adapters.safetensors")["lora.merged_half"]
    torch.testing.assert_close(load_file(out)[f"net.{NAME.format(0)}.weight"], expected, rtol=1e-5, atol=1e-6)
    code, streams = run(str(path), "--out", str(out))
    assert code == 2
    assert "already exists" in streams.err
    code, streams = run(f"{path}:strong", "--out", str(tmp_path / "new.safetensors"))
    assert code == 2
    assert "is no strength" in streams.err
    code, streams = run(str(path), str(path), "--rank", "2", "--out", str(tmp_path / "new.safetensors"), "--json")
    assert json.loads(streams.out)["errors"].keys() == {NAME.format(0)}
