"""The optimizers against torch's AdamW, and bf16 training against float64."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from anima_train.optim.groups import LearningRates, optimizer_groups
from anima_train.optim.optimizers import AdamW, AdamWKahan, AnyOptimizer
from anima_train.optim.rules import KahanAdamW
from anima_train.optim.split import Storage, join_halves, lower_half

BETAS = (0.9, 0.99)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters(dtype, seed=0):
    return [nn.Parameter((draw(*shape, seed=seed) * 0.02).to(dtype)) for shape in ((16, 8), (8,), (3, 4, 5))]


def train(optimizer, trained, num_steps, scale=1e-3, start=0):
    """Steps with gradients that have a part that stays and a part that changes, the same for every dtype."""
    for step in range(start, start + num_steps):
        for index, parameter in enumerate(trained):
            steady = draw(*parameter.shape, seed=1000 + index)
            changing = draw(*parameter.shape, seed=10_000 * (index + 1) + step)
            parameter.grad = (scale * (steady + changing)).bfloat16().to(parameter.dtype)
        optimizer.step()


def groups_of(trained, weight_decay=0.0):
    return [{"params": trained, "weight_decay": weight_decay}]


def test_split_adamw_in_float32_equals_torch(error):
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    first = [parameter.detach().clone() for parameter in ours]
    train(KahanAdamW(groups_of(ours, 0.3), 1e-2, BETAS, 1e-8), ours, 50)
    train(torch.optim.AdamW(theirs, lr=1e-2, betas=BETAS, eps=1e-8, weight_decay=0.3), theirs, 50)
    for start, found, expected in zip(first, ours, theirs, strict=True):
        assert error(expected, start) > 0.1
        assert error(found, expected) < 1e-6


def test_split_adamw_decays_by_lr_times_weight_decay_alone():
    parameter = nn.Parameter(torch.full((4,), 2.0))
    parameter.grad = torch.zeros(4)
    KahanAdamW(groups_of([parameter], 0.5), 0.1, BETAS, 1e-8).step()
    torch.testing.assert_close(parameter.detach(), torch.full((4,), 2.0 * (1 - 0.1 * 0.5)))


def test_split_adamw_leaves_parameters_without_gradient_alone():
    trained = parameters(torch.bfloat16)
    before = trained[1].detach().clone()
    trained[0].grad = torch.ones_like(trained[0])
    optimizer = KahanAdamW(groups_of(trained, 0.1), 1e-2, BETAS, 1e-8)
    optimizer.step()
    assert torch.equal(trained[1], before)
    assert set(optimizer.state) == {trained[0]}


def test_split_adamw_in_bfloat16_is_float32_training_bit_for_bit():
    whole = [nn.Parameter(parameter.detach().float()) for parameter in parameters(torch.bfloat16)]
    halves = parameters(torch.bfloat16)
    of_whole = KahanAdamW(groups_of(whole, 0.1), 1e-4, BETAS, 1e-8)
    of_halves = KahanAdamW(groups_of(halves, 0.1), 1e-4, BETAS, 1e-8)
    train(of_whole, whole, 100)
    train(of_halves, halves, 100)
    for expected, upper in zip(whole, halves, strict=True):
        assert torch.equal(upper, expected.bfloat16())
        assert torch.equal(join_halves(upper.detach(), of_halves.state[upper]["compensation"]), expected)


def tiny_updates(make, dtype, size):
    """How far 2000 updates of 2e-5 of a weight, a hundredth of half a unit in its last place in bf16, move it."""
    parameter = nn.Parameter((draw(512).sign() * (1 + draw(512, seed=1).abs().clamp_max(0.9)) * size).bfloat16())
    start = parameter.detach().double()
    parameter = nn.Parameter(parameter.detach().to(dtype))
    optimizer = make(parameter, lr=2e-5 * size)
    gradient = (draw(512, seed=2) * 1e-3).bfloat16()
    for _ in range(2000):
        parameter.grad = gradient.to(dtype)
        optimizer.step()
    weight = parameter.detach()
    if "compensation" in optimizer.state[parameter]:
        weight = join_halves(weight, optimizer.state[parameter]["compensation"])
    return weight.double() - start


def torch_adamw(parameter, lr):
    return torch.optim.AdamW([parameter], lr=lr, betas=BETAS, weight_decay=0.0)


def split_adamw(moments_dtype):
    return lambda parameter, lr: KahanAdamW(
        groups_of([parameter]), lr, BETAS, 1e-8, storage=Storage(moments=moments_dtype)
    )


@pytest.mark.parametrize("size", [1.0, 0.02])
def test_updates_that_plain_bfloat16_loses_entirely_are_followed(error, size):
    exact = tiny_updates(torch_adamw, torch.float64, size)
    assert not tiny_updates(torch_adamw, torch.bfloat16, size).any()
    assert error(tiny_updates(split_adamw("float32"), torch.bfloat16, size), exact) < 0.01


def test_moments_in_bfloat16_cost_what_their_setting_says(error):
    exact = tiny_updates(torch_adamw, torch.float64, 1.0)
    assert 0.05 < error(tiny_updates(split_adamw("bfloat16"), torch.bfloat16, 1.0), exact) < 0.11


def test_halves_of_a_float32_join_to_it_but_for_ties():
    # Every exponent and sign with random fractions; above 3.38e38 bfloat16 rounds to infinity.
    bits = torch.randint(-(2**31), 2**31 - 1, (500_000,), generator=torch.Generator().manual_seed(0))
    weights = bits.int().view(torch.float32)
    weights = torch.cat([weights[weights.isfinite() & (weights.abs() < 3.38e38)], torch.tensor([0.0, -0.0, 1e-45])])
    joined = join_halves(weights.bfloat16(), lower_half(weights))
    off = joined.view(torch.int32) - weights.view(torch.int32)
    ties = weights.view(torch.int32) & 0xFFFF == 0x8000
    assert not off[~ties].any()
    assert ties.any()
    assert off.abs().max() <= 1


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        (AdamW(lr=1e-3), torch.float32),
        (AdamW(lr=1e-3), torch.bfloat16),
        (AdamWKahan(lr=1e-3), torch.float32),
        (AdamWKahan(lr=1e-3), torch.bfloat16),
        (AdamWKahan(lr=1e-3, moments_dtype="bfloat16"), torch.bfloat16),
        (AdamWKahan(lr=1e-3, moments_dtype="bfloat16"), torch.float32),
    ],
    ids=str,
)
def test_a_state_put_back_goes_on_bit_for_bit(settings, dtype):
    straight, resumed = parameters(dtype), parameters(dtype)
    optimizer = settings.build(groups_of(straight, 0.1))
    train(optimizer, straight, 20)
    first = settings.build(groups_of(resumed, 0.1))
    train(first, resumed, 10)
    second = settings.build(groups_of(resumed, 0.1))
    second.load_state_dict(first.state_dict())
    for parameter in resumed:
        for name, value in first.state[parameter].items():
            assert second.state[parameter][name].dtype == value.dtype
    train(second, resumed, 10, start=10)
    for expected, found in zip(straight, resumed, strict=True):
        assert torch.equal(expected, found)


def test_adamw_builds_torchs_fused_kernel_with_its_settings():
    trained = parameters(torch.float32)
    optimizer = AdamW(lr=3e-4, betas=[0.8, 0.9], eps=1e-6).build(groups_of(trained, 0.2))
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "fused")} == {
        "lr": 3e-4,
        "betas": (0.8, 0.9),
        "eps": 1e-6,
        "weight_decay": 0.2,
        "fused": True,
    }
    train(optimizer, trained, 1)


def test_recipe_optimizer_splits_bfloat16_and_leaves_float32_to_torch():
    recipe = AdamWKahan(lr=2e-5)
    assert (recipe.betas, recipe.weight_decay, recipe.eps) == ([0.9, 0.99], 0.01, 1e-8)
    assert type(recipe.build(groups_of(parameters(torch.float32)))) is torch.optim.AdamW
    split = recipe.build(groups_of(parameters(torch.bfloat16), 0.1))
    assert type(split) is KahanAdamW
    assert split.param_groups[0]["betas"] == BETAS
    assert split.param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize("settings", [AdamW(lr=1.0), AdamWKahan(lr=1.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_group_has_its_own_rate_and_decay(settings, dtype):
    rates = LearningRates({"self_attn": 1e-2, "cross_attn": 0, "mlp": 0, "mod": 0, "llm_adapter": 0, "base": 1e-3})
    named = [
        ("blocks.0.self_attn.q_proj.weight", nn.Parameter(torch.ones(2, 2, dtype=dtype))),
        ("blocks.0.self_attn.q_norm.weight", nn.Parameter(torch.ones(2, dtype=dtype))),
        ("x_embedder.proj.1.weight", nn.Parameter(torch.ones(2, 2, dtype=dtype))),
    ]
    optimizer = settings.build(optimizer_groups(named, rates, 0.5))
    for _, parameter in named:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    found = [float(parameter.detach().flatten()[0]) for _, parameter in named]
    assert found == pytest.approx([1 - 1e-2 * 0.5, 1.0, 1 - 1e-3 * 0.5], abs=1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize(
    ("keys", "place"),
    [
        ({"betas": [0.9, 1.0]}, ("betas", 1)),
        ({"betas": [-0.1, 0.9]}, ("betas", 0)),
        ({"betas": [0.9]}, ("betas",)),
        ({"betas": [0.9, 0.99, 0.999]}, ("betas",)),
        ({"betas": [0.9, float("nan")]}, ("betas", 1)),
        ({"eps": 0.0}, ("eps",)),
        ({"lr": -1e-5}, ("lr",)),
        ({"lr": "1e-5"}, ("lr",)),
        ({"weight_decay": -0.1}, ("weight_decay",)),
        ({"momentum": 0.9}, ("momentum",)),
    ],
)
@pytest.mark.parametrize("name", ["adamw", "adamw_optimi"])
def test_settings_out_of_range_are_refused_where_they_stand(name, keys, place):
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(AnyOptimizer).validate_python({"type": name, "lr": 1e-5, **keys})
    assert [detail["loc"][1:] for detail in caught.value.errors()] == [place]


def test_types_choose_the_optimizer():
    registry = TypeAdapter(AnyOptimizer)
    assert isinstance(registry.validate_python({"type": "adamw", "lr": 1e-5}), AdamW)
    assert isinstance(registry.validate_python({"type": "adamw_optimi", "lr": 1e-5, "betas": [0, 0.99]}), AdamWKahan)


def test_how_many_parameters_are_updated_together_changes_nothing(monkeypatch):
    def trained(chunk):
        monkeypatch.setattr("anima_train.optim.split.CHUNK", chunk)
        generator = torch.Generator().manual_seed(0)
        shapes = [(3, 4), (5,), (2, 2, 2), (7, 1)]
        parameters = [nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in shapes]
        parameters.append(nn.Parameter(torch.randn(6, generator=generator)))
        optimizer = KahanAdamW(groups_of(parameters, 0.1), 1e-2, BETAS, 1e-8)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            optimizer.step()
        return parameters

    for alone, together in zip(trained(1), trained(1000), strict=True):
        assert torch.equal(alone, together)
