"""The transformer against the reference's tensors and against diffusers."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import CosmosTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_anima_lora_to_diffusers as diffusers_names

from anima_train.core.conditions import TextStates, pad_rows
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.llm_adapter import LLMAdapter, LLMAdapterShape
from anima_train.model.weights import Entry


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
def test_forward_equals_diffusers_cosmos_transformer(error, channels):
    shape = TransformerShape(2, 48, 24, channels, 20, 8)
    model = random_model(shape)
    ratio = 4.0 if channels == 16 else 3.0
    oracle = CosmosTransformer3DModel(
        in_channels=channels + 1,  # the padding mask is given as a channel: its resize needs torchvision
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        text_embed_dim=20,
        adaln_lora_dim=8,
        max_size=(128, 240, 240),
        rope_scale=(1.0, ratio, ratio),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
    )
    renamed = diffusers_names({f"diffusion_model.{key}": value for key, value in model.state_dict().items()})
    renamed = {
        key.removeprefix("transformer.")
        .replace("self_attn.q_norm", "attn1.norm_q")
        .replace("self_attn.k_norm", "attn1.norm_k")
        .replace("cross_attn.q_norm", "attn2.norm_q")
        .replace("cross_attn.k_norm", "attn2.norm_k"): value
        for key, value in renamed.items()
    }
    oracle.load_state_dict(renamed)
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


def test_recomputing_blocks_changes_no_gradient():
    model = random_model(SMALL)
    x, t, context = torch.randn(2, 16, 1, 4, 6), torch.tensor([[0.5], [0.1]]), torch.randn(2, 5, 20)

    def gradients(recompute):
        model.checkpoint_blocks = recompute
        model.zero_grad()
        model(x, t, context).square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    for kept, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(kept, recomputed)


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
    assert context.shape == (2, 512, 20)
    assert error(model(x, t, text), model(x, t, context)) < 1e-6


def test_forward_compiles_into_one_graph(error):
    model = random_model(SMALL)
    x, t, context = torch.randn(1, 16, 1, 4, 6), torch.tensor([[0.5]]), torch.randn(1, 5, 20)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert error(compiled(x, t, context), model(x, t, context)) < 1e-6
