"""Each optimizer against the library that is known for it, in float32; and what all of them promise."""

import math

import bitsandbytes
import pytest
import schedulefree
import torch
from torch import nn
from transformers.optimization import Adafactor as TransformersAdafactor

from anima_train.optim.moved import MovedShare
from anima_train.optim.optimizers import Adafactor, AdamW, AdamW8bit, AdamWKahan, Lion, Muon, Prodigy, ScheduleFree
from anima_train.optim.rules import ScheduleFreeAdamW, orthogonalized
from anima_train.optim.skipping import step_unless
from anima_train.optim.split import random_bits, round_at_random

SHAPES = ((48, 96), (96, 48), (8,), (3, 4, 5))
KINDS = {
    "adamw_optimi, stochastic": AdamWKahan(lr=1e-3, rounding="stochastic"),
    "adamw_optimi, stochastic, 8 bits": AdamWKahan(lr=1e-3, rounding="stochastic", moments_dtype="8bit"),
    "adamw_optimi, on the host": AdamWKahan(lr=1e-3, moments_device="cpu"),
    "adamw8bit": AdamW8bit(lr=1e-3),
    "lion": Lion(lr=1e-4),
    "adafactor": Adafactor(lr=1e-3, scale_parameter=True),
    "muon": Muon(lr=1e-3),
    "schedule_free": ScheduleFree(lr=2e-3),
    "prodigy": Prodigy(lr=1.0, d0=1e-4),
}
DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters(dtype=torch.float32, shapes=SHAPES):
    return [nn.Parameter((draw(*shape, seed=7) * 0.02).to(dtype)) for shape in shapes]


def groups_of(trained, weight_decay=0.1, lr=None):
    """Two groups, as components have them, the second without decay."""
    options = {} if lr is None else {"lr": lr}
    return [
        {"params": trained[:2], "weight_decay": weight_decay, **options},
        {"params": trained[2:], "weight_decay": 0.0, **options},
    ]


def give_gradients(trained, step):
    for index, parameter in enumerate(trained):
        steady, changing = draw(*parameter.shape, seed=1000 + index), draw(*parameter.shape, seed=10**4 * index + step)
        parameter.grad = (1e-3 * (steady + changing)).bfloat16().to(parameter.dtype)


def train(optimizer, trained, num_steps, start=0):
    for step in range(start, start + num_steps):
        give_gradients(trained, step)
        for group in optimizer.param_groups:
            group["step_index"] = step
        optimizer.step()


def compared(settings, theirs, num_steps=30, shapes=SHAPES):
    """The weights that ours and a library's optimizer end with, and those that both began with."""
    ours, others, first = parameters(shapes=shapes), parameters(shapes=shapes), parameters(shapes=shapes)
    train(settings.build(groups_of(ours, lr=settings.lr)), ours, num_steps)
    train(theirs(others), others, num_steps)
    return list(zip(first, ours, others, strict=True))


def test_adafactor_is_that_of_transformers(error):
    def theirs(trained):
        return TransformersAdafactor(
            groups_of(trained), lr=1e-2, relative_step=False, scale_parameter=True, warmup_init=False
        )

    for first, found, expected in compared(Adafactor(lr=1e-2, scale_parameter=True), theirs):
        assert error(expected, first) > 0.001
        assert error(found, expected) < 1e-5


def test_lion_is_that_of_bitsandbytes(error):
    def theirs(trained):
        return bitsandbytes.optim.Lion32bit(groups_of(trained), lr=1e-4, betas=(0.9, 0.99))

    for first, found, expected in compared(Lion(lr=1e-4), theirs):
        assert error(expected, first) > 0.01
        assert error(found, expected) < 1e-3  # a sign of a sum that is nearly 0 may differ


def test_muon_is_that_of_torch_for_matrices(error):
    def theirs(trained):
        return torch.optim.Muon(groups_of(trained), lr=1e-3, momentum=0.95, adjust_lr_fn="match_rms_adamw")

    for first, found, expected in compared(Muon(lr=1e-3), theirs, shapes=SHAPES[:2] * 2):
        assert error(expected, first) > 0.1
        assert error(found, expected) < 1e-3


def test_muon_gives_adamw_to_all_but_the_hidden_matrices(error):
    trained, others = parameters(), parameters()
    groups = groups_of(trained)
    groups[0] |= {"component": "base", "decays": True}
    train(Muon(lr=1e-3).build(groups), trained, 10)
    train(torch.optim.AdamW(groups_of(others), lr=1e-3, betas=(0.9, 0.99)), others, 10)
    for found, expected in zip(trained, others, strict=True):
        assert error(found, expected) < 1e-6


def test_orthogonalized_has_the_directions_of_the_matrix(error):
    matrix = draw(24, 40)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    wide, tall = orthogonalized(torch.stack([draw(24, 40, seed=1), matrix]))[1], orthogonalized(matrix.T[None])[0]
    for found, expected in ((wide, u @ v), (tall, (u @ v).T)):
        singular = torch.linalg.svdvals(found)
        assert 0.6 < singular.min() <= singular.max() < 1.3
        assert error(found, expected) < 0.3


def test_schedule_free_is_that_of_its_authors(error):
    found_averages = []

    def theirs(trained):
        optimizer = schedulefree.AdamWScheduleFree(groups_of(trained), lr=2e-3, betas=(0.9, 0.99))
        optimizer.train()
        found_averages.append((optimizer, trained))
        return optimizer

    settings = ScheduleFree(lr=2e-3)
    for first, found, expected in compared(settings, theirs):
        assert error(expected, first) > 0.1
        assert error(found, expected) < 1e-5

    ours = parameters()
    optimizer = settings.build(groups_of(ours))
    train(optimizer, ours, 30)
    theirs_optimizer, trained = found_averages[0]
    theirs_optimizer.eval()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            index = next(i for i, each in enumerate(ours) if each is parameter)
            assert error(optimizer.averaged(parameter, group), trained[index]) < 1e-5
            assert error(optimizer.averaged(parameter, group), parameter) > 1e-4


def test_adamw_in_8_bits_is_that_of_bitsandbytes(error):
    def theirs(trained):
        return bitsandbytes.optim.AdamW8bit(groups_of(trained), lr=1e-3, betas=(0.9, 0.99))

    exact = parameters()
    train(torch.optim.AdamW(groups_of(exact), lr=1e-3, betas=(0.9, 0.99)), exact, 30)
    rows = compared(AdamW8bit(lr=1e-3), theirs)
    for (first, found, expected), best in zip(rows, exact, strict=True):
        assert error(expected, first) > 0.1
        assert error(found, expected) < 1e-4
        assert (error(found, best) > 1e-3) == (found.numel() >= 4096)  # it does use 8 bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_safe_tensors_goes_on_bit_for_bit(kind, dtype):
    settings = KINDS[kind]
    straight, resumed = parameters(dtype), parameters(dtype)
    train(settings.build(groups_of(straight)), straight, 8)
    first = settings.build(groups_of(resumed))
    train(first, resumed, 4)
    saved = first.state_dict()
    assert all(isinstance(value, torch.Tensor) for state in saved["state"].values() for value in state.values())
    second = settings.build(groups_of(resumed))
    copied = {index: {key: value.clone() for key, value in state.items()} for index, state in saved["state"].items()}
    second.load_state_dict({"state": copied, "param_groups": second.state_dict()["param_groups"]})
    train(second, resumed, 4, start=4)
    for expected, found in zip(straight, resumed, strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_skipped_changes_no_bit_of_what_follows(kind, dtype):
    settings = KINDS[kind]
    skipping, other = parameters(dtype), parameters(dtype)
    ours, theirs = settings.build(groups_of(skipping)), settings.build(groups_of(other))
    for step in range(6):
        for optimizer in (ours, theirs):
            for group in optimizer.param_groups:
                group["step_index"] = step
        give_gradients(skipping, step)
        is_bad = step in (0, 3)
        if is_bad:
            skipping[0].grad[1] = torch.nan
            skipping[2].grad[0] = torch.inf
        step_unless(ours, torch.tensor(is_bad))
        if not is_bad:
            give_gradients(other, step)
            step_unless(theirs, torch.tensor(False))
        assert all(torch.equal(*pair) for pair in zip(skipping, other, strict=True))


@pytest.mark.parametrize("kind", ["lion", "adafactor", "muon", "schedule_free", "adamw8bit"])
def test_in_bfloat16_each_is_its_float32_training(kind, error):
    settings = KINDS[kind]
    halves = parameters(torch.bfloat16)
    whole = [nn.Parameter(each.detach().float()) for each in halves]
    optimizer = settings.build(groups_of(halves))
    train(optimizer, halves, 20)
    train(settings.build(groups_of(whole)), whole, 20)
    for found, expected in zip(halves, whole, strict=True):
        assert error(optimizer.whole(found), expected) < 1e-6
        assert torch.equal(found, expected.bfloat16())


def test_moments_on_the_host_change_nothing():
    here, there = parameters(torch.bfloat16), parameters(torch.bfloat16)
    train(AdamWKahan(lr=1e-3).build(groups_of(here)), here, 5)
    train(AdamWKahan(lr=1e-3, moments_device="cpu").build(groups_of(there)), there, 5)
    assert all(torch.equal(*pair) for pair in zip(here, there, strict=True))


def test_random_rounding_has_the_right_mean_and_never_moves_what_bfloat16_holds():
    weights = torch.cat([torch.tensor([1.0, -1.0, 1e-3, -3e4]) * (1 + share / 128) for share in (0.0, 0.1, 0.5, 0.93)])
    number = 20_000
    repeated = weights.repeat(number)
    drawn = round_at_random(repeated, random_bits(len(repeated), 77, weights.device)).view(number, -1)
    spread = weights.abs() / 128  # at most one unit in the last place
    off = (drawn.double().mean(dim=0) - weights.double()).abs() / spread
    assert off.max() < 5 * 0.5 / number**0.5
    held = round_at_random(weights.bfloat16().float(), random_bits(len(weights), 1, weights.device))
    assert torch.equal(held, weights.bfloat16())


def test_random_bits_are_even_and_depend_on_address_and_place():
    bits = random_bits(2**18 + 1, 12345, torch.device("cpu"))
    assert bits.shape == (2**18 + 1,)
    assert bits.min() >= 0
    assert bits.max() < 2**16
    for bit in range(16):
        assert float((bits >> bit & 1).float().mean()) == pytest.approx(0.5, abs=0.005)
    values = bits.double() / 2**16 - 0.5
    assert float(values.mean()) == pytest.approx(0, abs=0.003)
    for lag in (1, 2, 64, 4096):
        assert float((values[lag:] * values[:-lag]).mean() * 12) == pytest.approx(0, abs=0.01)
    other = random_bits(2**18 + 1, 12346, torch.device("cpu"))
    assert float(((other.double() / 2**16 - 0.5) * values).mean() * 12) == pytest.approx(0, abs=0.01)


def shares(settings, num_steps, lr=1e-6):
    """Of bf16 weights of size 0.02: the shares that moved in the last of many updates, and since the first; and how far
    they have gone in the direction of an optimizer in float64, as a share of its way."""
    trained = [nn.Parameter((draw(32, 64, seed=index) * 0.02).bfloat16()) for index in range(2)]
    exact = [nn.Parameter(each.detach().double()) for each in trained]
    optimizer, oracle = settings.build([{"params": trained}]), torch.optim.AdamW(exact, lr=lr, betas=(0.9, 0.99))
    for group in (*optimizer.param_groups, *oracle.param_groups):
        group.update(lr=lr, weight_decay=0.0)
    counter = MovedShare(optimizer)
    for step in range(num_steps):
        for index, (parameter, other) in enumerate(zip(trained, exact, strict=True)):
            gradient = (1e-3 * (draw(32, 64, seed=50 + index) + draw(32, 64, seed=1000 * index + step))).bfloat16()
            parameter.grad, other.grad = gradient, gradient.double()
        optimizer.param_groups[0]["step_index"] = step
        counter.before_update()
        optimizer.step()
        oracle.step()
        found = counter.after_update()
    first = [(draw(32, 64, seed=index) * 0.02).bfloat16().double() for index in range(2)]
    moved, wanted = (
        torch.cat([(each.detach() - start).flatten() for each, start in zip(ends, first, strict=True)])
        for ends in (trained, exact)
    )
    return *found.tolist(), float((moved * wanted).sum() / wanted.square().sum())


def test_plain_rounding_moves_a_few_weights_and_ours_move_as_the_exact_optimizer_does():
    in_update, in_run, followed = shares(AdamW(lr=1e-6), 150)
    assert in_update < 0.02
    assert in_run < 0.05
    assert followed < 0.05
    in_update, in_run, followed = shares(AdamWKahan(lr=1e-6), 150)
    assert in_update > 0.99
    assert in_run > 0.7
    assert followed == pytest.approx(1, abs=0.03)
    in_update, in_run, followed = shares(AdamWKahan(lr=1e-6, rounding="stochastic"), 150)
    assert in_update < 0.05
    assert in_run > 0.6
    assert followed == pytest.approx(1, abs=0.05)


def test_the_share_counts_what_has_other_bits():
    trained = [nn.Parameter(torch.ones(100, 100)) for _ in range(40)]
    counter = MovedShare(torch.optim.SGD(trained, lr=1.0))
    counter.before_update()
    for parameter in trained:
        parameter.data[:25] += 1
    assert counter.after_update().tolist() == pytest.approx([0.25, 0.25], abs=0.01)
    assert counter.after_update().tolist() == pytest.approx([0, 0.25], abs=0.01)
    for parameter in trained:
        parameter.data[:25] -= 1
    assert counter.after_update().tolist() == pytest.approx([0.25, 0], abs=0.01)


def test_the_share_since_the_start_is_unknown_where_the_start_is():
    trained = [nn.Parameter(torch.zeros(7, 11))]
    counter = MovedShare(torch.optim.SGD(trained, lr=1.0))
    counter.before_update()
    counter.begin_at(counter.first + 1)
    assert counter.after_update().tolist() == [0, 1]
    counter.begin_at(None)
    trained[0].data[:, :] = 2
    assert counter.after_update().tolist() == pytest.approx([1, math.nan], nan_ok=True)


def test_schedule_free_averages_what_a_compensated_weight_is():
    trained = parameters(torch.bfloat16)
    optimizer = ScheduleFreeAdamW(groups_of(trained), 1e-3, (0.9, 0.99), 1e-8)
    assert torch.equal(optimizer.averaged(trained[0], optimizer.param_groups[0]), trained[0].float())
    train(optimizer, trained, 3)
    state = optimizer.state[trained[0]]
    x = optimizer.averaged(trained[0], optimizer.param_groups[0])
    torch.testing.assert_close(0.1 * state["z"] + 0.9 * x, optimizer.whole(trained[0]))
