"""The transformer on a GPU, in both dtypes, against diffusers' on the CPU in float32."""

import pytest
import torch

from anima_train.adapters.full import Full
from anima_train.adapters.lora import Lora
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.optim.groups import COMPONENTS, LearningRates

SHAPE = TransformerShape(num_blocks=2, width=256, head_dim=128, in_channels=16, context_width=64, adaln_lora_dim=32)
RATES = LearningRates(dict.fromkeys(COMPONENTS, 1e-4))
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # the first allows for other orders of summation
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def random_model(device=CPU, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    model = MiniTrainDIT(SHAPE)
    for parameter in model.parameters():
        scale = 1.0 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model.to(device, dtype)


def inputs(device=CPU):
    """Noisy latents, t, and text of 20 rows in 512: the other rows are zeros, and take part."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 16, 1, 16, 24, generator=generator)
    text = torch.zeros(2, 512, SHAPE.context_width)
    text[0, :20] = torch.randn(20, SHAPE.context_width, generator=generator)
    text[1, :7] = torch.randn(7, SHAPE.context_width, generator=generator)
    return x.to(device), torch.tensor([[0.3], [0.8]], device=device), text.to(device)


@pytest.fixture(scope="module")
def expected(cosmos):
    """Velocity and gradients of the linears of text and image by diffusers, which pads the text."""
    model = random_model()
    oracle = cosmos(SHAPE, model.state_dict())
    x, t, text = inputs()
    velocity = oracle(torch.cat([x, torch.zeros(2, 1, 1, 16, 24)], dim=1), t[:, 0], text, return_dict=False)[0]
    velocity.square().mean().backward()
    first = oracle.transformer_blocks[0]
    names = {
        "blocks.0.self_attn.v_proj.weight": first.attn1.to_v,
        "blocks.0.cross_attn.q_proj.weight": first.attn2.to_q,
        "blocks.0.cross_attn.k_proj.weight": first.attn2.to_k,
        "blocks.0.cross_attn.v_proj.weight": first.attn2.to_v,
    }
    return velocity.detach(), {name: linear.weight.grad for name, linear in names.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_zero_text_rows_count_on_a_gpu_as_where_all_rows_are_there(dtype, expected, error):
    model = random_model(CUDA, dtype)
    x, t, text = inputs(CUDA)
    velocity = model(x.to(dtype), t, text.to(dtype))
    velocity.float().square().mean().backward()
    by_diffusers, gradients = expected
    assert error(velocity.cpu(), by_diffusers) < TOLERANCE[dtype]
    for name, gradient in gradients.items():
        assert error(model.get_parameter(name).grad.cpu(), gradient) < 3 * TOLERANCE[dtype], name


@pytest.mark.gpu
@pytest.mark.parametrize("adapter", [Lora(rank=4), Full()], ids=["lora", "full"])
def test_a_step_on_a_gpu_is_that_of_the_cpu(adapter, error):
    found = {}
    for device in (CPU, CUDA):
        model = random_model(device)
        adapter.attach(model, RATES, seed=0)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        optimizer = torch.optim.SGD(trained.values(), lr=0.1)  # no root of small numbers: the step is the gradient
        for _ in range(2):  # in the first, B of a LoRA is zero, and A has no gradient
            optimizer.zero_grad()
            model(*inputs(device)).square().mean().backward()
            optimizer.step()
        found[device] = {name: parameter.detach().cpu() for name, parameter in trained.items()}
    assert found[CUDA]
    for name, tensor in found[CPU].items():
        assert error(found[CUDA][name], tensor) < TOLERANCE[torch.float32], name
