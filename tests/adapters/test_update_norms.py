"""The norms of what was added to the base model, against the products and the weights themselves."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from anima_train.adapters.addition import adapted_layers
from anima_train.adapters.full import Full
from anima_train.adapters.loha import Loha
from anima_train.adapters.lokr import Lokr
from anima_train.adapters.lora import Lora, lora_layers
from anima_train.adapters.parts import read_adapter
from anima_train.adapters.update_norms import UpdateNorms, quantized_square
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.quantized import QuantizedWeight
from anima_train.optim.groups import COMPONENTS, LearningRates, component_of

RATES = LearningRates(dict.fromkeys(COMPONENTS, 1e-3))


@pytest.fixture
def model():
    found = MiniTrainDIT(TransformerShape(2, 48, 24, 16, 20, 8))
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=0.2)
    return found


def test_the_norm_of_a_lora_is_that_of_its_products(model):
    adapter = Lora(rank=2, alpha=3.0)
    adapter.attach(model, RATES, seed=0)
    norms = UpdateNorms(model)
    assert set(norms.metrics()) == {
        f"{name}/{component}" for name in ("update_norm", "update_norm_relative")
        for component in ("self_attn", "cross_attn", "mlp", "mod")
    }  # fmt: skip
    assert set(norms.metrics().values()) == {0.0}
    updates, bases = {}, {}
    for name, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B)
        component = component_of(name)
        updates.setdefault(component, []).append(1.5 * layer.lora_B.detach() @ layer.lora_A.detach())
        bases.setdefault(component, []).append(layer.weight.detach())
    found = norms.metrics()
    for component, parts in updates.items():
        norm = torch.cat([part.flatten() for part in parts]).norm()
        base = torch.cat([part.flatten() for part in bases[component]]).norm()
        assert found[f"update_norm/{component}"] == pytest.approx(float(norm), rel=1e-5)
        assert found[f"update_norm_relative/{component}"] == pytest.approx(float(norm / base), rel=1e-5)


@pytest.mark.parametrize("adapter", [
    Lokr(rank=2, decompose_factor=4, alpha=3.0), Lokr(full_matrix=True), Loha(rank=2, alpha=3.0),
    Lora(rank=2, alpha=3.0, use_dora=True),
], ids=["lokr", "lokr, whole", "loha", "dora"])  # fmt: skip
def test_the_norm_of_any_adapter_is_that_of_what_its_file_changes(model, adapter, tmp_path):
    adapter.attach(model, RATES, seed=0)
    norms = UpdateNorms(model)
    assert max(norms.metrics().values()) < 1e-5
    for _, layer in adapted_layers(model):
        for parameter, start in layer.starts():
            nn.init.normal_(parameter) if start is None else parameter.data.mul_(1.5)
    save_file(adapter.tensors(model), tmp_path / "adapter.safetensors")
    file, weights = read_adapter(tmp_path / "adapter.safetensors"), model.weights()
    squares, bases = {}, {}
    for name in file.changes:
        component = component_of(name)
        squares[component] = squares.get(component, 0) + float(file.change(name, weights[name]).square().sum())
        bases[component] = bases.get(component, 0) + float(weights[name].square().sum())
    found = norms.metrics()
    assert len(found) == 2 * len(squares)  # no share of weights that moved: none is trained itself
    for component, square in squares.items():
        assert found[f"update_norm/{component}"] == pytest.approx(square**0.5, rel=1e-4)
        relative = (square / bases[component]) ** 0.5
        assert found[f"update_norm_relative/{component}"] == pytest.approx(relative, rel=1e-4)


def test_what_is_trained_itself_is_compared_with_what_it_was(model):
    rates = LearningRates({**RATES.by_component, "mlp": 0.0})
    Full().attach(model, rates, seed=0)
    norms = UpdateNorms(model)
    assert {value for name, value in norms.metrics().items()} == {0.0}
    squares = 0.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if component_of(name) == "self_attn":
                squares += float(parameter.square().sum())
                parameter.mul_(1.25)
            if component_of(name) == "mod":  # a half of them
                parameter.view(-1)[: parameter.numel() // 2] += 0.5
    found = norms.metrics()
    assert found["update_norm_relative/self_attn"] == pytest.approx(0.25, rel=1e-5)
    assert found["update_norm/self_attn"] == pytest.approx(0.25 * squares**0.5, rel=0.05)  # from some of the weights
    assert found["share_moved_in_run/self_attn"] == 1
    assert found["share_moved_in_run/mod"] == pytest.approx(0.5, abs=0.01)
    assert found["share_moved_in_run/base"] == found["update_norm/base"] == 0
    assert not any(name.endswith("/mlp") for name in found)  # frozen


@pytest.mark.parametrize("quantization", ["int8", "float8"])
def test_a_weight_of_a_byte_a_value_has_the_norm_of_the_weight_itself(quantization):
    weight = torch.randn(48, 64)
    quantized = QuantizedWeight(weight, quantization, torch.float32)
    found = quantized_square(quantized, quantized.values.detach(), quantized.scale.detach())
    assert found == pytest.approx(float(quantized.dequantized(torch.float32).square().sum()), rel=1e-5)
    assert found == pytest.approx(float(weight.square().sum()), rel=0.02)
