"""The modulations of all blocks in one batch against one by one, and the norms that they enter."""

import pytest
import torch
import torch.nn.functional as F

from anima_train.adapters.full import Full
from anima_train.adapters.lora import Lora
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.layers import RMSNorm, modulate
from anima_train.optim.groups import COMPONENTS, LearningRates

ADALN = "blocks[.]1[.]adaln_modulation_mlp[.]2"
SHAPE = TransformerShape(3, 48, 24, 16, 20, 8)


def model_of(adapter, **frozen):
    model = MiniTrainDIT(SHAPE)
    adapter.attach(model, LearningRates({**dict.fromkeys(COMPONENTS, 1e-4), **frozen}), seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def loss(model, batch):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 16, 1, 4, 6, generator=generator)
    t, text = torch.rand(batch, 1, generator=generator), torch.randn(batch, 16, 20, generator=generator)
    return model(x, t, text).square().mean()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("adapter", "frozen"),
    [
        (Lora(rank=2), {}),
        (Lora(rank=2, alpha=1.0), {}),
        (Lora(rank=2), {"mod": 0}),
        (Lora(rank=2, alpha=1.0, exclude_modules=["blocks[.]1[.]adaln_modulation_mlp[.].*", ".*_cross_attn[.]2"]), {}),
        (Lora(rank=2, target_modules="attention+mlp"), {}),
    ],
    ids=["lora", "scaled", "frozen", "some", "none"],
)
def test_a_batch_of_products_gives_loss_and_gradients_of_single_ones(error, adapter, frozen, batch):
    model = model_of(adapter, **frozen).double()  # float32 is not exact enough for the smallest of the gradients
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def step():
        value = loss(model, batch)
        return value, torch.autograd.grad(value, [model.get_parameter(name) for name in names])

    alone, expected = step()
    assert model.modulation_batches is None
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.batch_modulations()
    assert model.modulation_batches is not None
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    together, found = step()
    assert error(together.reshape(1), alone.reshape(1)) < 1e-12
    for name, mine, other in zip(names, found, expected, strict=True):
        assert error(mine, other) < 1e-10, name


def test_batched_weights_are_held_once():
    model = model_of(Lora(rank=2))
    model.batch_modulations()
    batches = [batch.weight.untyped_storage().data_ptr() for batch in model.modulation_batches]
    for pair in model.modulation_pairs:
        assert [pair[place].weight.untyped_storage().data_ptr() for place in (1, 2)] == batches
    model.blocks[1].adaln_modulation_mlp[1].weight.data.zero_()  # a LoRA merged in place is seen, too
    assert not model.modulation_batches[0].weight[5].any()


def test_batches_follow_a_model_to_another_dtype(error):
    model = model_of(Lora(rank=2))
    model.batch_modulations()
    before = loss(model, 2)
    model.double()
    assert error(loss(model, 2).reshape(1), before.reshape(1)) < 1e-5
    assert {batch.weight.dtype for batch in model.modulation_batches} == {torch.float64}


@pytest.mark.parametrize("differs", [{"rank_pattern": {ADALN: 3}}, {"alpha_pattern": {ADALN: 3.0}}])
def test_updates_of_several_kinds_are_not_batched(differs):
    model = model_of(Lora(rank=2, **differs))
    model.batch_modulations()
    assert model.modulation_batches is None


def test_trained_weights_are_not_batched():
    model = model_of(Full())
    model.batch_modulations()
    assert model.modulation_batches is None


def test_dropout_in_a_batch_follows_the_seed_and_ends_with_training():
    model = model_of(Lora(rank=2, dropout=0.5)).train()
    model.batch_modulations()
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append(float(loss(model, 2).detach()))
    assert values[0] == values[1] != values[2]
    model.eval()
    assert torch.equal(loss(model, 2), loss(model, 2))


@pytest.mark.parametrize("batch", [1, 3])
def test_modulated_norm_equals_its_formula_and_so_do_its_gradients(error, batch):
    x = torch.randn(batch, 5, 12, dtype=torch.float64, requires_grad=True)
    shift, scale = (torch.randn(batch, 12, dtype=torch.float64, requires_grad=True) for _ in range(2))
    expected = F.layer_norm(x, (12,), eps=1e-6) * scale[:, None] + shift[:, None]
    found = modulate(x, shift, scale)
    assert error(found, expected) < 1e-14
    direction = torch.randn_like(expected)
    gradients = [torch.autograd.grad(out, (x, shift, scale), direction) for out in (found, expected)]
    assert all(error(mine, other) < 1e-13 for mine, other in zip(*gradients, strict=True))


def test_the_modulated_norm_is_rounded_once():
    x = torch.randn(2, 50, 64).bfloat16()
    shift, scale = torch.randn(2, 64).bfloat16(), torch.randn(2, 64).bfloat16()
    exact = F.layer_norm(x.double(), (64,), eps=1e-6) * scale[:, None].double() + shift[:, None].double()
    assert (modulate(x, shift, scale) == exact.bfloat16()).float().mean() > 0.99
    rounded_before = (F.layer_norm(x, (64,), eps=1e-6) * scale[:, None] + shift[:, None]) == exact.bfloat16()
    assert rounded_before.float().mean() < 0.9


@pytest.mark.parametrize("trains", [True, False])
def test_rms_norm_and_its_gradients_are_torchs(error, trains):
    norm = RMSNorm(8)
    norm.weight.data = torch.randn(8)
    norm.weight.requires_grad_(trains)
    x = torch.randn(2, 5, 3, 8, requires_grad=True)
    direction = torch.randn(x.shape)
    found, expected = norm(x), F.rms_norm(x, (8,), norm.weight, 1e-6)
    assert error(found, expected) < 1e-6
    wanted = (x, norm.weight) if trains else (x,)
    gradients = [torch.autograd.grad(out, wanted, direction) for out in (found, expected)]
    assert all(error(mine, other) < 1e-6 for mine, other in zip(*gradients, strict=True))
    assert norm(torch.zeros(1, 8)).eq(0).all()  # a text row of zeros


def test_rms_norm_of_bfloat16_is_rounded_once():
    norm = RMSNorm(64).bfloat16()
    norm.weight.data = torch.randn(64).bfloat16()
    x = torch.randn(200, 64).bfloat16()
    exact = F.rms_norm(x.double(), (64,), norm.weight.double(), 1e-6).bfloat16()
    assert (norm(x) == exact).float().mean() > 0.99
