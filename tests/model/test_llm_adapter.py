"""The LLM adapter against the reference's tensors and against diffusers."""

import pytest
import torch
from diffusers import AnimaTextConditioner

from anima_train.model.llm_adapter import LLMAdapter, LLMAdapterShape
from anima_train.model.safetensors_io import Entry


@pytest.fixture
def adapter(golden):
    data = golden("adapter.safetensors")
    prefix = "llm_adapter."
    weights = {key.removeprefix(prefix): value for key, value in data.items() if key.startswith(prefix)}
    shape = LLMAdapterShape.of({key: Entry(value.dtype, tuple(value.shape), 0, 0) for key, value in weights.items()})
    model = LLMAdapter(shape)
    model.load_state_dict(weights)
    return model, data


def test_masked_and_padded_equals_the_reference(adapter, error):
    model, data = adapter
    context = model(data["in.source"], data["in.ids"], data["in.source_mask"], data["in.target_mask"])
    assert error(context, data["out.context"]) < 1e-5


def test_masked_and_padded_equals_each_caption_alone(adapter, error):
    model, data = adapter
    context = model(data["in.source"], data["in.ids"], data["in.source_mask"], data["in.target_mask"])
    for row in range(3):
        source_mask, ids_mask = data["in.source_mask"][row], data["in.target_mask"][row]
        assert error(context[row : row + 1, ids_mask], data[f"out.unpadded.{row}"]) < 1e-5
        assert not context[row, ~ids_mask].any()
        if source_mask.any():
            alone = model(data["in.source"][row : row + 1, source_mask], data["in.ids"][row : row + 1, ids_mask])
            assert error(alone, data[f"out.unpadded.{row}"]) < 1e-5


def test_without_masks_the_result_is_wrong(adapter, error):
    model, data = adapter
    assert error(model(data["in.source"], data["in.ids"]), data["out.context"]) > 0.05


def test_empty_caption_is_finite_and_has_finite_gradients(adapter):
    model, _ = adapter
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    context = model(torch.zeros(1, 4, 40), torch.tensor([[1, 0]]), nothing, torch.tensor([[True, False]]))
    context.sum().backward()
    assert context.isfinite().all()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("width", [32, 48])
def test_forward_equals_diffusers_text_conditioner(error, width):
    shape = LLMAdapterShape(2, width, 8, 24, 32, 50)
    model = LLMAdapter(shape)
    oracle = AnimaTextConditioner(24, 32, width, 2, width // 8, target_vocab_size=50, min_sequence_length=9)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    oracle.load_state_dict(model.state_dict())
    source, ids = torch.randn(2, 6, 24, generator=generator), torch.randint(0, 50, (2, 9), generator=generator)
    source_mask = torch.arange(6) < torch.tensor([[6], [3]])
    ids_mask = torch.arange(9) < torch.tensor([[9], [5]])
    expected = oracle(source, ids, ids_mask, source_mask)
    assert error(model(source, ids, source_mask, ids_mask), expected) < 1e-5
