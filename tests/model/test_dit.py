"""The transformer against the reference's tensors and against diffusers."""

import pytest
import torch
import torch.nn.functional as F

from anima_train.core.text_batch import TextStates, pad_rows
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.llm_adapter import LLMAdapter, LLMAdapterShape
from anima_train.model.safetensors_io import Entry


def entries(tensors):
    return {name: Entry(tensor.dtype, tuple(tensor.shape), 0, 0) for name, tensor in tensors.items()}


def build(weights):
    model = MiniTrainDIT(TransformerShape.of(entries(weights)))
    model.load_state_dict(weights)
    return model


def random_model(shape, adapter=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = MiniTrainDIT(shape, adapter)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


SMALL = TransformerShape(2, 48, 24, 16, 20, 8)


@pytest.mark.parametrize("name", ["dit_small", "dit_17ch"])
def test_forward_and_gradients_equal_the_reference(golden, error, name):
    data = golden(f"{name}.safetensors")
    weights = {key.removeprefix("net."): value for key, value in data.items() if key.startswith("net.")}
    model = build(weights)
    velocity = model(data["in.x"], data["in.t"], data["in.context"])
    loss = F.mse_loss(velocity, data["in.target"])
    loss.backward()
    assert error(velocity, data["out.v"]) < 1e-5
    assert error(loss.reshape(1), data["out.loss"]) < 1e-5
    gradients = {key.removeprefix("grad."): value for key, value in data.items() if key.startswith("grad.")}
    assert gradients
    for key, expected in gradients.items():
        assert error(model.get_parameter(key).grad, expected) < 1e-5, key


@pytest.mark.parametrize("channels", [16, 17])
def test_forward_equals_diffusers_cosmos_transformer(error, cosmos, channels):
    shape = TransformerShape(2, 48, 24, channels, 20, 8)
    model = random_model(shape)
    oracle = cosmos(shape, model.state_dict())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, channels, 1, 6, 10, generator=generator)
    t = torch.tensor([0.3, 0.8])
    context = torch.randn(2, 7, 20, generator=generator)
    padded = torch.cat([x, torch.zeros(2, 1, 1, 6, 10)], dim=1)
    expected = oracle(padded, t, context, return_dict=False)[0]
    assert error(model(x, t[:, None], context), expected) < 1e-5


def test_zero_rows_of_the_context_take_part_in_the_softmax(error):
    model = random_model(SMALL)
    x, t = torch.randn(1, 16, 1, 4, 4), torch.tensor([[0.5]])
    context = torch.randn(1, 3, 20)
    assert error(model(x, t, pad_rows(context)), model(x, t, context)) > 1e-3


def test_adapter_inside_gives_the_same_velocity_as_its_output_given(error):
    adapter = LLMAdapter(LLMAdapterShape(1, 20, 10, 12, 20, 30))
    model = random_model(SMALL, adapter)
    text = TextStates(
        torch.randn(2, 5, 12),
        torch.tensor([[True] * 5, [True] * 3 + [False] * 2]),
        torch.randint(0, 30, (2, 4)),
        torch.tensor([[True] * 4, [True] * 2 + [False] * 2]),
    )
    x, t = torch.randn(2, 16, 1, 4, 4), torch.tensor([[0.5], [0.9]])
    context = model.context(text)
    assert (context.rows.shape, context.num_zeros) == ((2, 16, 20), 496)
    assert not context.rows[:, 4:].any()
    assert error(model(x, t, text), model(x, t, pad_rows(context.rows))) < 1e-6


def test_forward_compiles_into_one_graph(error):
    model = random_model(SMALL)
    x, t, context = torch.randn(1, 16, 1, 4, 6), torch.tensor([[0.5]]), torch.randn(1, 5, 20)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert error(compiled(x, t, context), model(x, t, context)) < 1e-6
