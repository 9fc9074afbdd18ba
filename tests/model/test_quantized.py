"""Weights of a byte a value against the same ones in float64: outputs, gradients, and what is kept of them."""

import math

import pytest
import torch
from torch import nn

from anima_train.adapters.lora import Lora
from anima_train.core.text_batch import fold_rows
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.loading import load_transformer
from anima_train.model.lora_linear import LoraLinear, project
from anima_train.model.quantized import (
    QuantizedLinear,
    QuantizedProducts,
    QuantizedWeight,
    hadamard,
    quantize_blocks,
    rotate,
    rotation_size,
    round_rows,
)  # fmt: skip
from anima_train.model.tiny import tiny_paths
from anima_train.optim.groups import COMPONENTS, LearningRates

CPU = torch.device("cpu")
RATES = LearningRates(dict.fromkeys(COMPONENTS, 1e-4))
SHAPE = TransformerShape(2, 64, 32, 16, 32, 8)
WIDTH, OUT = 256, 96
# Of values that are spread evenly within a row, against float64: half a step at most, and a row's largest value is 3 to
# 4 standard deviations.
INT8, FLOAT8 = 0.014, 0.03


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_of(quantization="int8", rows=OUT, columns=WIDTH, seed=0, has_integer_products=True, dtype=torch.float32):
    exact = drawn(rows, columns, seed=seed) * drawn(rows, 1, seed=9).exp()  # rows of different sizes
    return exact, QuantizedWeight(exact, quantization, dtype, has_integer_products)


@pytest.mark.parametrize(
    ("quantization", "has_integer_products", "tolerance"),
    [("int8", True, INT8), ("int8", False, 0.01), ("float8", True, FLOAT8)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_near_the_exact_ones(quantization, has_integer_products, tolerance, dtype, error):
    pairs = [
        weight_of(quantization, seed=seed, has_integer_products=has_integer_products, dtype=dtype) for seed in (1, 2)
    ]
    x = drawn(40, WIDTH, seed=3).to(dtype).requires_grad_()
    outputs = QuantizedProducts.apply(x, [weight for _, weight in pairs])
    directions = [drawn(40, OUT, seed=seed).to(dtype) for seed in (4, 5)]
    (gradient,) = torch.autograd.grad(outputs, x, directions)
    assert {tensor.dtype for tensor in (*outputs, gradient)} == {dtype}
    for out, (exact, _) in zip(outputs, pairs, strict=True):
        assert error(out, x.double() @ exact.double().t()) < tolerance
    expected = sum(each.double() @ exact.double() for each, (exact, _) in zip(directions, pairs, strict=True))
    assert error(gradient, expected) < 2.5 * tolerance  # its rows have values of very different sizes


def test_products_of_integers_are_exact():
    _, weight = weight_of()
    x = drawn(40, WIDTH, seed=3)
    values, scale = round_rows(rotate(x, weight.rotation))
    (out,) = QuantizedProducts.apply(x, [weight])
    expected = (values.double() @ weight.values.double().t()) * scale.double() * weight.scale.double().t()
    assert torch.allclose(out.double(), expected, rtol=1e-6)


@pytest.mark.parametrize("size", [1, 4, 16, 64])
def test_the_rotation_is_its_own_inverse_and_exact_in_bfloat16(size):
    matrix = hadamard(size, CPU)
    assert torch.equal(matrix @ matrix, torch.eye(size))
    assert torch.equal(matrix, matrix.t())
    assert torch.equal(matrix.bfloat16().float(), matrix)


@pytest.mark.parametrize(("width", "size"), [(2048, 64), (8192, 64), (1024, 64), (48, 16), (20, 4), (7, 1)])
def test_as_many_values_are_rotated_together_as_divide_the_width(width, size):
    assert rotation_size(width) == size


def test_the_rotation_pays_where_some_channels_are_far_larger_than_others(error):
    exact = drawn(OUT, WIDTH, seed=1)
    x = drawn(40, WIDTH, seed=2)
    x[:, ::64] *= 50
    expected = x @ exact.t()
    plain = QuantizedWeight(exact, "int8", torch.float32)
    plain.rotation.data = torch.ones(1, 1)
    values, scales = round_rows(exact)
    plain.values.data, plain.scale.data = values, scales
    (rotated,) = QuantizedProducts.apply(x, [QuantizedWeight(exact, "int8", torch.float32)])
    (unrotated,) = QuantizedProducts.apply(x, [plain])
    assert error(rotated, expected) < 0.3 * error(unrotated, expected)


def test_what_is_not_finite_is_seen():
    _, weight = weight_of()
    for bad in (math.nan, math.inf):
        x = drawn(20, WIDTH)
        x[3, 5] = bad
        (out,) = QuantizedProducts.apply(x, [weight])
        assert not out[3].isfinite().any()
        assert out[4].isfinite().all()


@pytest.mark.parametrize("quantization", ["int8", "float8"])
def test_a_lora_on_it_has_the_gradients_of_the_exact_one(quantization, error):
    weights = [weight_of(quantization, seed=seed) for seed in (1, 2)]

    def adapted(bases):
        return [LoraLinear(base, drawn(3, WIDTH, seed=5), drawn(OUT, 3, seed=6), 0.5, 0.0) for base in bases]

    exact = [nn.Linear(WIDTH, OUT, bias=False) for _ in weights]
    for linear, (weight, _) in zip(exact, weights, strict=True):
        linear.weight = nn.Parameter(weight, requires_grad=False)
    x = drawn(2, 20, WIDTH, seed=3).requires_grad_()
    found = []
    for linears in (adapted([QuantizedLinear(weight) for _, weight in weights]), adapted(exact)):
        outputs = project(x, *linears)
        wanted = [x, *(part for linear in linears for part in (linear.lora_A, linear.lora_B))]
        found.append([*outputs, *torch.autograd.grad(outputs, wanted, [drawn(2, 20, OUT, seed=8)] * 2)])
    for mine, other in zip(*found, strict=True):
        assert error(mine, other) < 2.5 * (INT8 if quantization == "int8" else FLOAT8)


def test_the_rounding_of_an_input_is_shared(monkeypatch):
    rounded = []

    def watched(x):
        rounded.append(x.shape)
        return round_rows(x)

    monkeypatch.setattr("anima_train.model.quantized.round_rows", watched)
    linears = [
        LoraLinear(QuantizedLinear(weight_of(seed=seed)[1]), drawn(3, WIDTH), drawn(OUT, 3), 1.0, 0.0)
        for seed in range(3)
    ]
    rounded.clear()  # those of the weights
    project(drawn(2, 20, WIDTH), *linears)
    assert rounded == [(40, WIDTH)]


def test_attention_and_mlps_of_the_blocks_have_a_byte_a_value_and_nothing_else_has():
    transformer = MiniTrainDIT(SHAPE)
    before = {name: parameter.clone() for name, parameter in transformer.named_parameters()}
    quantize_blocks(transformer, "int8")
    names = {name for name, module in transformer.named_modules() if isinstance(module, QuantizedLinear)}
    linears = ("self_attn.{}_proj", "cross_attn.{}_proj")
    expected = {f"blocks.{block}.{part.format(kind)}" for block in (0, 1) for part in linears for kind in "qkv"}
    expected |= {f"blocks.{b}.{part}.output_proj" for b in (0, 1) for part in ("self_attn", "cross_attn")}
    expected |= {f"blocks.{b}.mlp.layer{number}" for b in (0, 1) for number in (1, 2)}
    assert names == expected
    assert sum(transformer.get_submodule(name).weight.values.numel() for name in names) == SHAPE.num_quantizable
    for name, parameter in transformer.named_parameters():
        if name.rpartition(".")[0].removesuffix(".weight") not in names:
            assert torch.equal(parameter, before[name])
    assert not any(
        parameter.requires_grad for name in names for parameter in transformer.get_submodule(name).parameters()
    )


def test_the_text_is_read_without_rounding():
    transformer = MiniTrainDIT(SHAPE)
    quantize_blocks(transformer, "int8")
    exact = {
        name for name, module in transformer.named_modules()
        if isinstance(module, QuantizedWeight) and not module.has_integer_products
    }  # fmt: skip
    assert exact == {f"blocks.{block}.cross_attn.{kind}_proj.weight" for block in (0, 1) for kind in "kv"}


@pytest.mark.parametrize("quantization", ["int8", "float8"])
def test_loading_quantises_as_a_loaded_model_is_quantised(tiny, quantization):
    files = tiny_paths(tiny)
    loaded = load_transformer(files, False, torch.float32, CPU, quantization)
    other = load_transformer(files, False, torch.float32, CPU)
    quantize_blocks(other, quantization)
    found, expected = loaded.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_transformer_and_its_lora_are_near_the_exact_ones(error):
    def run(quantization):
        generator = torch.Generator().manual_seed(0)
        model = MiniTrainDIT(SHAPE)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        if quantization is not None:
            quantize_blocks(model, quantization)
        Lora(rank=4).attach(model, RATES, seed=0)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        velocity = model(drawn(2, 16, 1, 8, 12), torch.tensor([[0.3], [0.8]]), fold_rows(drawn(2, 5, 32)))
        return [velocity, torch.cat([g.flatten() for g in torch.autograd.grad(velocity.square().sum(), trained)])]

    exact = run(None)
    for quantization, tolerance in (("int8", 0.04), ("float8", 0.12)):
        for mine, other in zip(run(quantization), exact, strict=True):
            assert 1e-4 < error(mine, other) < tolerance


def final_loss(quantization, seed, steps=50):
    """The mean of the last losses of a LoRA on eight fixed samples, everything drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    model = MiniTrainDIT(SHAPE)
    for parameter in model.parameters():
        parameter.data = normal(*parameter.shape) * (0.1 if parameter.ndim > 1 else 1)
    model.bfloat16()
    if quantization is not None:
        quantize_blocks(model, quantization)
    Lora(rank=8).attach(model, RATES, seed=seed)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=5e-3)
    latents, text = normal(8, 16, 1, 8, 8), normal(8, 5, 32)
    losses = []
    for _ in range(steps):
        t = torch.rand(8, 1, generator=generator)
        noise = normal(*latents.shape)
        x = (1 - t[:, :, None, None, None]) * latents + t[:, :, None, None, None] * noise
        loss = (model(x, t, fold_rows(text)) - (noise - latents)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    return sum(losses[-10:]) / 10


@pytest.mark.slow
def test_a_run_on_int8_weights_ends_where_one_on_bfloat16_does_within_the_noise_of_seeds():
    exact, rounded = (torch.tensor([final_loss(kind, seed) for seed in range(4)]) for kind in (None, "int8"))
    assert (rounded - exact).mean().abs() < 0.5 * exact.std()
    assert (rounded - exact).abs().max() < exact.std()
