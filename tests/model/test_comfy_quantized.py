"""Weights that ComfyUI has quantised: read as what they stand for."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from anima_train.config.load import load_config
from anima_train.core.errors import ModelFileError
from anima_train.model.comfy_quantized import QuantizedEntry, dequantized, hadamard, quantization_text
from anima_train.model.file_kinds import open_slot
from anima_train.model.safetensors_io import open_header, read_tensors
from anima_train.model.tiny import write_tiny
from anima_train.training.train import run_training


def described(**facts):
    """The content of `x.comfy_quant`."""
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


def quantized(weight, kind, group=0):
    """A weight as ComfyUI's tools store it: the tensors by suffix."""
    if group:
        weight = (weight.unflatten(1, (-1, group)) @ regular_hadamard(group)).flatten(1)
    if kind == "int8_tensorwise":
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        values = (weight / scale).round().clamp(-127, 127).to(torch.int8)
    else:
        scale = (weight.abs().max() / 448)[None][0]
        values = (weight / scale).to(torch.float8_e4m3fn)
    facts = {"format": kind} | ({"convrot": True, "convrot_groupsize": group} if group else {})
    return {"weight": values, "weight_scale": scale, "comfy_quant": described(**facts)}


def regular_hadamard(size):
    """The matrix by its definition: products of the regular one of order 4."""
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float32)
    matrix = four
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix / size**0.5


@pytest.mark.parametrize("size", [4, 16, 256])
def test_the_rotation_is_its_own_inverse(size):
    assert torch.equal(hadamard(size), regular_hadamard(size))
    assert torch.allclose(hadamard(size) @ hadamard(size), torch.eye(size), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "group", "tolerance"),
    [
        ("int8_tensorwise", 0, 0.01),
        ("int8_tensorwise", 16, 0.01),
        ("int8_tensorwise", 256, 0.01),
        ("float8_e4m3fn", 0, 0.04),
    ],
)
def test_quantised_weights_are_read_as_what_they_stand_for(tmp_path, error, kind, group, tolerance):
    torch.manual_seed(0)
    weights = {"a.b": torch.randn(24, 512), "c": torch.randn(8, 256)}
    tensors = {"norm.weight": torch.ones(8, dtype=torch.bfloat16)}
    for name, weight in weights.items():
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in quantized(weight, kind, group).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    file = dequantized(open_header(tmp_path / "a.safetensors"))
    assert file.entries.keys() == {"a.b.weight", "c.weight", "norm.weight"}
    found = dict(read_tensors(file))
    for name, weight in weights.items():
        assert found[f"{name}.weight"].dtype == torch.bfloat16
        assert error(found[f"{name}.weight"], weight) < tolerance
    assert torch.equal(found["norm.weight"], tensors["norm.weight"])
    with_rotation = " with rotation" if group else ""
    assert f"of 3 weights 2 in {kind}{with_rotation}; they are read as bfloat16" in quantization_text(file)


def test_older_files_have_scales_without_a_format_or_neither_or_a_table_of_formats(tmp_path):
    values = torch.randn(4, 16).to(torch.float8_e4m3fn)
    tensors = {"a.weight": values, "a.scale_weight": torch.tensor(2.0), "b.weight": values.clone()}
    tensors |= {f"{prefix}scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn) for prefix in ("", "net.")}
    save_file(tensors, tmp_path / "a.safetensors")
    found = dict(read_tensors(dequantized(open_header(tmp_path / "a.safetensors"))))
    assert found.keys() == {"a.weight", "b.weight"}
    assert torch.equal(found["a.weight"], (2 * values.float()).to(torch.bfloat16))
    assert torch.equal(found["b.weight"], values.to(torch.bfloat16))
    parts = quantized(torch.randn(4, 16), "int8_tensorwise", group=16)
    table = {"layers": {"x": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}}}
    tensors = {"x.weight": parts["weight"], "x.weight_scale": parts["weight_scale"]}
    save_file(tensors, tmp_path / "b.safetensors", {"_quantization_metadata": json.dumps(table)})
    entry = dequantized(open_header(tmp_path / "b.safetensors")).entries["x.weight"]
    assert isinstance(entry, QuantizedEntry)
    assert entry.group == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x.comfy_quant": described(format="nvfp4")},
            "x is quantised as 'nvfp4', which is not read; give the file in bf16",
        ),
        (
            {"x.comfy_quant": torch.tensor([123, 1], dtype=torch.uint8)},
            "the quantisation of x is not described in JSON",
        ),
        ({"x.comfy_quant": torch.ones(3)}, "the quantisation of x is not described in bytes"),
        ({"x.comfy_quant": described(format=["int8_tensorwise"])}, "x is quantised as"),
        ({"x.weight_scale": torch.ones(3, 1)}, "x has 3 scales, which do not fit its rows"),
        *(
            (
                {"x.comfy_quant": described(format="int8_tensorwise", convrot=True, convrot_groupsize=size)},
                "in groups of",
            )
            for size in ("abc", [1], 0.5, -4, 2)
        ),
        (
            {"x.comfy_quant": described(format="int8_tensorwise", convrot=True, convrot_groupsize=8)},
            "x is rotated in groups of 8, which do not fit its rows",
        ),
    ],
)
def test_what_is_not_known_is_told(tmp_path, changes, message):
    tensors = {f"x.{key}": tensor for key, tensor in quantized(torch.randn(4, 16), "int8_tensorwise").items()}
    save_file(tensors | changes, tmp_path / "a.safetensors")
    with pytest.raises(ModelFileError) as refused:
        dequantized(open_header(tmp_path / "a.safetensors"))
    assert message in str(refused.value)


def test_a_lora_trains_on_a_quantised_file_and_the_start_says_so(trainer, tmp_path, capsys):
    paths = write_tiny(tmp_path / "tiny")
    tensors = load_file(paths.transformer)
    for name in [name for name in tensors if ".mlp.layer" in name and "llm_adapter" not in name]:
        parts = quantized(tensors.pop(name).float(), "int8_tensorwise", group=16)
        tensors |= {name.removesuffix("weight") + suffix: tensor for suffix, tensor in parts.items()}
    save_file(tensors, paths.transformer)
    file = open_slot(paths.transformer, "transformer")
    assert any(isinstance(entry, QuantizedEntry) for entry in file.entries.values())
    whole = trainer("whole")
    run = trainer("quantised", model={"tiny_path": str(tmp_path / "tiny")})
    assert "in int8_tensorwise with rotation; they are read as bfloat16" in capsys.readouterr().out
    assert run.losses == pytest.approx(whole.losses, rel=0.01)
    assert run.losses != whole.losses
    run_training(load_config(trainer.config("dry", model={"tiny_path": str(tmp_path / "tiny")})), dry_run=True)
    assert "in int8_tensorwise with rotation; they are read as bfloat16" in capsys.readouterr().out
