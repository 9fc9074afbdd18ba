"""A divided transformer: gradients, shards and files are those of the whole one. One process: a group of one."""

import weakref

import pytest
import torch
import torch.distributed
from safetensors.torch import load_file

from anima_train.adapters.full import Full
from anima_train.adapters.lora import Lora
from anima_train.checkpoint import weights
from anima_train.checkpoint.training_state import (
    StateManifest,
    check_state,
    load_state,
    save_state,
    state_tensors,
    trained_parameters,
)
from anima_train.checkpoint.weights import save_weights
from anima_train.core.divided import is_divided, local, whole
from anima_train.core.errors import ModelFileError, NumericError
from anima_train.distributed.clipping import clip_gradients
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.recompute import offloading, runner
from anima_train.model.safetensors_io import write_tensors
from anima_train.model.sharding import Shards, checksum, rows_of
from anima_train.optim.ema import Ema, WeightAverage
from anima_train.optim.groups import COMPONENTS, LearningRates
from anima_train.optim.optimizers import AdamWKahan

SHAPE = TransformerShape(3, 32, 16, 16, 24, 8)
RANDOM = torch.Generator().manual_seed(0)
LATENTS, T = torch.randn(2, 16, 1, 8, 8, generator=RANDOM), torch.rand(2, 1, generator=RANDOM)
TEXT = torch.randn(2, 5, 24, generator=RANDOM)


@pytest.fixture
def group():
    """A process group with this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def transformer(kind="full", dtype=torch.float32):
    torch.manual_seed(0)
    model = MiniTrainDIT(SHAPE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.to(dtype)
    adapter = {"full": Full(), "lora": Lora(rank=3), "t-lora": Lora(rank=3, min_rank=1)}[kind]
    adapter.attach(model, LearningRates(dict.fromkeys(COMPONENTS, 1.0)), 0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    if kind != "full":
        model.batch_modulations()
    return model


def backward(model, number=2):
    for _ in range(number):
        model(LATENTS, T, TEXT).square().mean().backward()


@pytest.mark.parametrize("kind", ["full", "lora", pytest.param("t-lora", marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", ["nothing", "selective", "blocks", "offload"])
def test_gradients_are_those_of_the_undivided_model(group, kind, policy, error):
    expected, model = transformer(kind), transformer(kind)
    model.run_block = offloading(runner(policy)) if policy == "offload" else runner(policy)
    shards = Shards(model, "cpu")
    backward(expected)
    backward(model)
    gradients = {name: parameter.grad for name, parameter in trained_parameters(expected).items()}
    assert gradients.keys() == shards.parameters.keys()
    for name, gradient in gradients.items():
        assert error(shards.parameters[name].grad, gradient) < 1e-5, name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("kind", ["lora", "t-lora"])
def test_divided_blocks_compile_to_one_graph(group, kind, error):
    from torch._dynamo.utils import counters

    from anima_train.model.compiled import CompiledBlocks

    torch._dynamo.reset()
    counters.clear()
    expected, model = transformer(kind), transformer(kind)
    model.run_block = CompiledBlocks(runner("selective"), "aot_eager")
    shards = Shards(model, "cpu")
    backward(expected)
    backward(model)
    assert counters["stats"]["unique_graphs"] == 1
    for name, parameter in trained_parameters(expected).items():
        assert error(shards.parameters[name].grad, parameter.grad) < 1e-5, name


def test_float32_weights_that_compute_in_bfloat16_keep_their_gradients_in_float32(group, error):
    expected, model = transformer("full", torch.bfloat16), transformer()
    shards = Shards(model, "cpu", torch.bfloat16)
    backward(expected, 1)
    backward(model, 1)
    for name, parameter in trained_parameters(expected).items():
        assert shards.parameters[name].grad.dtype == torch.float32
        assert error(shards.parameters[name].grad, parameter.grad) < 0.05, name  # weights rounded once, sums not


def test_an_update_of_the_rows_is_one_of_the_model_before_and_after_a_pass(group):
    model = transformer()
    shards = Shards(model, "cpu")
    with torch.no_grad():
        before = model(LATENTS, T, TEXT)
        for rows in shards.parameters.values():
            rows.mul_(1.5)
        after = model(LATENTS, T, TEXT)
        for rows in shards.parameters.values():
            rows.div_(1.5)
        torch.testing.assert_close(model(LATENTS, T, TEXT), before)
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8])
def test_rows_are_those_of_torch_chunk(length):
    tensor = torch.arange(2 * length).view(length, 2)
    chunks = [*tensor.chunk(4), *[tensor[:0]] * 4][:4]
    for rank, chunk in enumerate(chunks):
        assert torch.equal(rows_of(tensor, rank, 4), chunk)


def test_the_norm_and_the_clipping_are_those_of_the_whole_gradient(group):
    class Alone:
        device = torch.device("cpu")

    expected, model = transformer(), transformer()
    shards = Shards(model, "cpu")
    backward(expected)
    backward(model)
    norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
    found = clip_gradients(Alone(), list(shards.parameters.values()), 0.1, is_divided=True)
    torch.testing.assert_close(found, norm)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(shards.parameters[name].grad, parameter.grad)


def test_a_divided_model_is_saved_as_the_whole_one_with_one_tensor_at_hand(group, tmp_path):
    save_weights(tmp_path / "whole.safetensors", Full().tensors(transformer()), {})
    model = transformer()
    Shards(model, "cpu")
    tensors = Full().tensors(model)
    assert all(map(is_divided, tensors.values()))
    save_weights(tmp_path / "divided.safetensors", tensors, {})
    assert (tmp_path / "divided.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    alive = []

    def look(name, tensor):
        assert [each for each in alive if each() is not None] == []
        alive.append(weakref.ref(tensor))

    write_tensors(tmp_path / "again.safetensors", {name: whole_later(each) for name, each in tensors.items()}, {}, look)
    assert len(alive) == len(tensors)


def whole_later(tensor):
    return tensor.float()  # a divided one still


def test_a_divided_weight_that_is_not_finite_or_reads_back_otherwise_is_noticed(group, tmp_path, monkeypatch):
    model = transformer()
    shards = Shards(model, "cpu")
    path = tmp_path / "model.safetensors"
    save_weights(path, Full().tensors(model), {})
    before = path.read_bytes()
    monkeypatch.setattr(weights, "read_tensors", lambda file: [(name, torch.zeros(1)) for name in file.entries])
    with pytest.raises(ModelFileError, match="reads back with other values"):
        save_weights(path, Full().tensors(model), {})
    shards.parameters["blocks.1.mlp.layer1.weight"].data[0, 0] = torch.nan
    with pytest.raises(NumericError, match=r"blocks\.1\.mlp\.layer1\.weight"):
        save_weights(path, Full().tensors(model), {})
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_state_of_a_divided_run_is_that_of_an_undivided_one_and_is_read_by_both(group, tmp_path):
    def trained(divided):
        model = transformer("lora", torch.bfloat16)
        shards = Shards(model, "cpu") if divided else None
        parameters = trained_parameters(model) if shards is None else shards.parameters
        optimizer = AdamWKahan(lr=1e-3).build([{"params": list(parameters.values())}])
        return model, optimizer, WeightAverage(parameters, Ema(decay=0.5)), shards

    written = []
    for divided in (False, True):
        model, optimizer, average, shards = trained(divided)
        parameters = optimizer.param_groups[0]["params"]
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.full_like(parameter, 0.01 * number - 0.1)
        optimizer.step()
        average.update(1)
        facts = StateManifest(step=1, optimizer=type(optimizer).__name__)
        groups = state_tensors(model, optimizer, average, shards)
        written.append(save_state(tmp_path / str(divided), facts, groups, 2))
    for name in ("weights", "optimizer", "average"):
        found = [(folder / f"{name}.safetensors").read_bytes() for folder in written]
        assert found[0] == found[1], name
    for divided in (False, True):
        model, optimizer, average, shards = trained(divided)
        load_state(check_state(written[1 - divided]), model, optimizer, average, shards)
        for name, tensor in load_file(written[0] / "weights.safetensors").items():
            assert torch.equal(local(trained_parameters(model)[name]), tensor)
        groups = state_tensors(model, optimizer, average, shards)
        for name, tensor in load_file(written[0] / "optimizer.safetensors").items():
            assert torch.equal(whole(groups["optimizer"][name]), tensor)


def test_a_checksum_differs_where_a_bit_does():
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16()}
    other = {name: tensor.clone() for name, tensor in tensors.items()}
    assert checksum(tensors) == checksum(other)
    other["b"].view(torch.int16)[2] += 1
    assert checksum(tensors) != checksum(other)
