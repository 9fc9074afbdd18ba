"""Full fine-tuning: what trains, and a file that holds the whole model."""

import pytest
import torch

from anima_train.adapters.full import Full
from anima_train.checkpoint.weights import save_weights
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.file_kinds import LLM_ADAPTER_PREFIX, validate_kind
from anima_train.model.llm_adapter import LLMAdapter, LLMAdapterShape
from anima_train.model.safetensors_io import load_into, open_header
from anima_train.optim.groups import COMPONENTS, LearningRates, component_of


def rates(**changed):
    return LearningRates({**dict.fromkeys(COMPONENTS, 1e-6), **changed})


def model(adapter=True):
    torch.manual_seed(0)
    inside = LLMAdapter(LLMAdapterShape(1, 16, 8, 12, 20, 30)) if adapter else None
    return MiniTrainDIT(TransformerShape(2, 48, 24, 16, 20, 8), inside)


@pytest.mark.parametrize("frozen", [(), ("mod",), ("base", "llm_adapter")])
def test_every_parameter_trains_but_those_of_frozen_components(frozen):
    transformer = model()
    Full().attach(transformer, rates(**dict.fromkeys(frozen, 0)), seed=0)
    for name, parameter in transformer.named_parameters():
        assert parameter.requires_grad == (component_of(name) not in frozen), name


def test_attaching_adds_and_changes_nothing():
    transformer, untouched = model(), model()
    Full().attach(transformer, rates(), seed=0)
    found, expected = transformer.state_dict(), untouched.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_tensors_are_every_parameter_under_net_frozen_or_not():
    transformer = model()
    Full().attach(transformer, rates(mlp=0), seed=0)
    tensors = Full().tensors(transformer)
    assert set(tensors) == {f"net.{name}" for name, _ in transformer.named_parameters()}
    assert all(torch.equal(tensors[f"net.{name}"], parameter) for name, parameter in transformer.named_parameters())
    assert not any(tensor.requires_grad for tensor in tensors.values())


def test_saved_file_loads_as_a_whole_model_with_the_adapter_that_was_not_in_memory(tmp_path):
    whole, without = model(), model(adapter=False)
    adapter = {f"{LLM_ADAPTER_PREFIX}{name}": tensor for name, tensor in whole.llm_adapter.state_dict().items()}
    path = tmp_path / "model.safetensors"
    save_weights(path, Full().tensors(without) | Full().outside(adapter), Full().metadata())

    file = open_header(path)
    validate_kind(file, "transformer")
    with torch.device("meta"):
        loaded = model()
    load_into(loaded, file.stripped("net."), "model.transformer_path", torch.float32, torch.device("cpu"))
    expected = without.state_dict() | adapter
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in expected.items())
