"""From noise to pictures: the noise, guidance, dtypes, and what a request may say."""

import pytest
import torch
from pydantic import ValidationError

from anima_train.core.errors import NumericError
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.sampling.generate import Request, decode, generate, initial_noise

CPU = torch.device("cpu")
SMALL = {"width": 64, "height": 32, "steps": 3, "sampler": "euler"}
CONTEXT, NEGATIVE = torch.full((1, 512, 20), 2.0), torch.full((1, 700, 20), 0.5)


class Straight:
    """A flow from any noise to `target` times the context's first number; remembers what it was asked."""

    def __init__(self, target=0.25):
        self.target = target
        self.calls = []

    def __call__(self, x, t, context):
        self.calls.append((x, t, context))
        return ((x.float() - self.target * context[0, 0, 0]) / t.view(-1, 1, 1, 1, 1)).to(x.dtype)


def draw(transformer, negative=NEGATIVE, dtype=torch.float32, **settings):
    request = Request(prompt="x", **{**SMALL, **settings})
    return generate(transformer, request, CONTEXT, negative, CPU, dtype)


@pytest.fixture(scope="module")
def transformer():
    model = MiniTrainDIT(TransformerShape(2, 48, 24, 16, 20, 8))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


def test_noise_is_what_comfyui_draws():
    torch.manual_seed(7)  # ComfyUI seeds the global generator and draws without the frame's dimension
    expected = torch.randn(1, 16, 48, 32)
    noise = initial_noise(7, width=256, height=384)
    assert torch.equal(noise.squeeze(2), expected)
    assert (noise.shape, noise.dtype) == ((1, 16, 1, 48, 32), torch.float32)
    initial_noise(2**64 - 1, 16, 16)


@pytest.mark.parametrize("cfg", [0.0, 2.0, 4.5])
def test_guidance_goes_beyond_the_prompt_by_cfg(cfg, error):
    """The target is linear in the context, so that of the guided flow is `u + cfg (c - u)`."""
    expected = torch.full((1, 16, 1, 4, 8), 0.25 * (0.5 + cfg * (2.0 - 0.5)))
    assert error(draw(Straight(), cfg=cfg), expected) < 1e-5


def test_without_guidance_the_negative_prompt_is_neither_needed_nor_run(error):
    flow = Straight()
    found = draw(flow, negative=None, cfg=1.0)
    assert error(found, torch.full_like(found, 0.5)) < 1e-5
    assert len(flow.calls) == 3
    other = Straight()
    assert torch.equal(draw(other, cfg=1.0), found)
    assert all(torch.equal(context, CONTEXT) for _, _, context in other.calls)
    draw(flow, cfg=2.0)
    assert len(flow.calls) == 3 + 6


def test_the_transformer_gets_its_dtype_and_t_and_latents_stay_float32():
    flow = Straight()
    found = draw(flow, dtype=torch.bfloat16, shift=3.0, steps=4)
    assert found.dtype == torch.float32
    assert {x.dtype for x, _, _ in flow.calls} == {torch.bfloat16}
    assert {(t.dtype, t.shape) for _, t, _ in flow.calls} == {(torch.float32, (1, 1))}
    levels = [float(t) for _, t, _ in flow.calls[::2]]
    assert levels == pytest.approx([1.0, 0.9, 0.75, 0.5])  # 3 t / (1 + 2 t) at t = 1, 3/4, 1/2, 1/4
    assert not torch.equal(found, found.bfloat16().float())


def test_the_seed_decides_and_the_global_generator_is_left_alone(transformer):
    state = torch.get_rng_state()
    first, again, other = (draw(transformer, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert not first.requires_grad


def test_steps_follow_the_transformers_velocity(transformer, error):
    x = initial_noise(3, 64, 32)
    with torch.no_grad():
        for t, following in ((1.0, 0.5), (0.5, 0.0)):
            v_c, v_u = (transformer(x, torch.tensor([[t]]), context) for context in (CONTEXT, NEGATIVE))
            x = x + (following - t) * (v_u + 3.0 * (v_c - v_u))
    assert error(draw(transformer, seed=3, steps=2, shift=1.0, cfg=3.0), x) < 1e-6


def test_latents_that_are_not_finite_are_an_error():
    with pytest.raises(NumericError, match='the picture of "x" became NaN'):
        draw(lambda x, t, context: x * float("nan"))


class Pixels:
    """A VAE that gives these pixels."""

    def __init__(self, values):
        self.values = values

    def decode(self, latents):
        return torch.tensor(self.values).view(1, 1, 1, -1).expand(1, 3, 1, -1)


def test_pixels_are_cut_to_8_bits_as_in_comfyui():
    image = decode(Pixels([-1.0, 0.0, 1.0, 0.999, -1.5, 1.5]), torch.zeros(1, 16, 1, 1, 1))
    assert [image.getpixel((x, 0)) for x in range(6)] == [(v, v, v) for v in (0, 127, 255, 254, 0, 255)]


# Requests


def test_defaults_are_those_of_comfyuis_template():
    request = Request(prompt="x")
    assert (request.steps, request.cfg, request.shift, request.width, request.height) == (30, 4.0, 3.0, 1024, 1024)
    assert (request.sampler.type, request.schedule.type) == ("er_sde", "simple")


def test_samplers_and_schedules_are_chosen_by_name_and_seeded(transformer):
    state = torch.get_rng_state()
    drawn = [draw(transformer, sampler=name, seed=seed) for name in ("euler", "heun", "er_sde") for seed in (0, 0, 1)]
    drawn += [draw(transformer, schedule=name) for name in ("normal", "beta")]
    for first, again, other in zip(drawn[:9:3], drawn[1:9:3], drawn[2:9:3], strict=True):
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    different = [drawn[0], drawn[3], drawn[6], *drawn[9:]]
    assert not any(torch.equal(a, b) for n, a in enumerate(different) for b in different[:n])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"width": 1000},
        {"height": 0},
        {"height": 8208},
        {"seed": -1},
        {"seed": 2**64},
        {"cfg": -1.0},
        {"cfg": float("nan")},
        {"shift": 0.0},
        {"sampler": "eular"},
        {"schedule": "complex"},
        {"cfg": 1.0, "negative_prompt": "bad"},
    ],
)
def test_requests_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        Request(prompt="x", **wrong)
