"""The average against its closed form in float64 and against diffusers' EMAModel."""

import pytest
import torch
from diffusers.training_utils import EMAModel
from pydantic import ValidationError
from torch import nn

from anima_train.core.errors import ModelFileError
from anima_train.optim import ema
from anima_train.optim.ema import Ema, WeightAverage
from anima_train.optim.rules import KahanAdamW

SHAPES = {"a": (16, 8), "b": (8,), "c": (3, 4, 5)}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters(dtype=torch.float32, seed=0):
    return {name: nn.Parameter(draw(*shape, seed=seed + len(name)).to(dtype)) for name, shape in SHAPES.items()}


def walk(trained, step, scale=0.1):
    """Move all parameters a little, in a direction of the step."""
    with torch.no_grad():
        for index, parameter in enumerate(trained.values()):
            parameter.add_(scale * draw(*parameter.shape, seed=1000 * (index + 1) + step).to(parameter.dtype))


def values(trained):
    """What the parameters are now, in float64."""
    return {name: parameter.detach().double().clone() for name, parameter in trained.items()}


def follow(average, trained, num_updates, decay):
    """Walk and average, in our way and as the sum over all past weights in float64; the latter is returned."""
    history = [values(trained)]
    for step in range(num_updates):
        walk(trained, step)
        average.update(step + 1)
        history.append(values(trained))
    expected = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    kept = 1.0
    for number, past in reversed(list(enumerate(history))):
        share = 1 - min(decay, (1 + number) / (10 + number)) if number else 1.0
        for name in SHAPES:
            expected[name] += kept * share * past[name]
        kept *= 1 - share
    return expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_the_average_is_the_sum_over_all_past_weights(dtype, decay, error):
    trained = parameters(dtype)
    average = WeightAverage(trained, Ema(decay=decay))
    expected = follow(average, trained, 60, decay)
    for name in SHAPES:
        assert average.tensors[name].dtype == torch.float32
        assert error(average.tensors[name], expected[name]) < 1e-6
        assert error(average.tensors[name], trained[name]) > 0.01


def test_the_average_begins_as_the_parameters_are():
    trained = parameters(torch.bfloat16)
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    average = WeightAverage(trained, Ema())
    walk(trained, 0)
    assert all(torch.equal(average.tensors[name], before[name].float()) for name in SHAPES)


@pytest.mark.parametrize(("num_updates", "expected"), [(1, 2 / 11), (8, 0.5), (80, 0.9), (81, 0.9), (10**6, 0.9)])
def test_the_warm_up_ends_at_decay(num_updates, expected):
    assert Ema(decay=0.9).decay_after(num_updates) == pytest.approx(expected)


@pytest.mark.parametrize("foreach", [False, True])
def test_the_average_equals_that_of_diffusers(foreach, error):
    """Its update k is our k - 1, and its first one copies the weights."""
    trained = parameters()
    walk(trained, 0)
    average = WeightAverage(trained, Ema(decay=0.8))
    theirs = EMAModel(trained.values(), decay=0.8, foreach=foreach)
    theirs.step(trained.values())
    for step in range(1, 60):
        walk(trained, step)
        average.update(step)
        theirs.step(trained.values())
    for found, expected in zip(average.tensors.values(), theirs.shadow_params, strict=True):
        assert error(found, expected) < 1e-6


def test_updates_too_small_for_bf16_are_not_lost():
    """The weight jumps by the last bit of a bf16; of that, one step adds a thousandth."""
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    average = WeightAverage({"weight": weight}, Ema(decay=0.999))
    with torch.no_grad():
        weight.add_(2**-7)
    for step in range(500):
        average.update(10**5 + step)
    expected = torch.full((4,), 1 + 2**-7 * (1 - 0.999**500))
    torch.testing.assert_close(average.tensors["weight"], expected, rtol=1e-6, atol=0)


def test_weights_that_stand_still_leave_the_average_bitwise():
    trained = parameters()
    average = WeightAverage(trained, Ema())
    for step in range(100):
        average.update(step + 1)
    assert all(torch.equal(average.tensors[name], trained[name]) for name in SHAPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_hold_the_average_in_place_and_then_what_they_held(dtype):
    trained = parameters(dtype)
    average = WeightAverage(trained, Ema())
    for step in range(5):
        walk(trained, step)
        average.update(step + 1)
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    held = {name: tensor.clone() for name, tensor in average.tensors.items()}
    places = {name: parameter.data_ptr() for name, parameter in trained.items()}
    with average.in_place():
        for name, parameter in trained.items():
            assert parameter.dtype == dtype
            assert torch.equal(parameter, held[name].to(dtype))
            assert not torch.equal(parameter, before[name])
            assert parameter.data_ptr() == places[name]
    for name, parameter in trained.items():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert torch.equal(average.tensors[name], held[name])


def test_parameters_are_put_back_when_a_picture_fails():
    trained = parameters(torch.bfloat16)
    average = WeightAverage(trained, Ema())
    walk(trained, 0)
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}

    def draw_picture():
        with average.in_place():
            assert not torch.equal(trained["a"], before["a"])
            raise MemoryError

    with pytest.raises(MemoryError):
        draw_picture()
    assert all(torch.equal(trained[name], before[name]) for name in SHAPES)


def test_training_goes_on_bitwise_after_the_average_was_in_place():
    """bf16 weights under Kahan summation, whose compensation belongs to the very weights that are put back."""
    ends = []
    for looks in (False, True):
        trained = parameters(torch.bfloat16)
        optimizer = KahanAdamW([{"params": list(trained.values())}], 1e-4, (0.9, 0.99), 1e-8)
        average = WeightAverage(trained, Ema())
        for step in range(20):
            for index, parameter in enumerate(trained.values()):
                parameter.grad = draw(*parameter.shape, seed=100 * index + step).bfloat16()
            optimizer.step()
            average.update(step + 1)
            if looks:
                with average.in_place():
                    pass
        state = [value for entry in optimizer.state.values() for value in entry.values()]
        ends.append([*trained.values(), *average.tensors.values(), *state])
    for found, expected in zip(*ends, strict=True):
        assert torch.equal(found, expected)


def test_a_loaded_average_goes_on_bitwise():
    trained = parameters(torch.bfloat16)
    whole = WeightAverage(trained, Ema())
    follow(whole, trained, 10, 0.999)
    saved = {name: tensor.clone() for name, tensor in reversed(whole.tensors.items())}
    resumed = WeightAverage(trained, Ema())
    resumed.load(saved, "step-000010")
    assert all(torch.equal(resumed.tensors[name], saved[name]) for name in SHAPES)
    for step in range(10, 15):
        walk(trained, step)
        whole.update(step + 1)
        resumed.update(step + 1)
    assert all(torch.equal(resumed.tensors[name], whole.tensors[name]) for name in SHAPES)


def test_an_average_of_other_parameters_is_refused_whole():
    average = WeightAverage(parameters(), Ema())
    before = {name: tensor.clone() for name, tensor in average.tensors.items()}
    with pytest.raises(ModelFileError) as caught:
        average.load({"a": torch.zeros(16, 8), "b": torch.zeros(9), "d": torch.zeros(1)}, "step-000010")
    assert list(caught.value.problems) == [
        "step-000010: 1 keys missing: c",
        "step-000010: 1 keys unexpected: d",
        "step-000010: 1 shapes differ: b (9,) instead of (8,)",
    ]
    assert all(torch.equal(average.tensors[name], before[name]) for name in SHAPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_takes_four_bytes_for_each_trained_parameter(dtype):
    trained = parameters(dtype)
    average = WeightAverage(trained, Ema())
    num_trained = sum(parameter.numel() for parameter in trained.values())
    stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in average.tensors.values()}
    assert sum(storage.nbytes() for storage in stored.values()) == 4 * num_trained
    for averages, _ in average.chunks:
        assert all(tensor.untyped_storage().data_ptr() in stored for tensor in averages)


def test_small_and_large_parameters_of_several_dtypes_are_averaged_in_chunks(monkeypatch, error):
    monkeypatch.setattr(ema, "CHUNK", 64)
    halves = parameters(torch.bfloat16, seed=5)
    trained = {f"{key}{name}": group[name] for name in SHAPES for key, group in (("", parameters()), ("half.", halves))}
    average = WeightAverage(trained, Ema(decay=0.5))
    sizes = [sum(map(torch.numel, averages)) for averages, _ in average.chunks]
    assert sorted(sizes) == [8, 8, 60, 60, 128, 128]
    assert all(len({parameter.dtype for parameter in members}) == 1 for _, members in average.chunks)
    walk(trained, 0)
    before, start = values(trained), values(average.tensors)
    average.update(8)
    for name, tensor in average.tensors.items():
        assert error(tensor, (start[name] + before[name]) / 2) < 1e-6
    with average.in_place():
        for name, parameter in trained.items():
            assert torch.equal(parameter, average.tensors[name].to(parameter.dtype))
    assert all(torch.equal(parameter.double(), before[name]) for name, parameter in trained.items())


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5, -0.1, float("nan")])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(ValidationError):
        Ema(decay=decay)
