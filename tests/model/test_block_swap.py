"""Swapped blocks: the same bits as without, real buffers and copies, and as many of them as is told."""

import itertools
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from anima_train.adapters.full import Full
from anima_train.adapters.lora import Lora
from anima_train.core.text_batch import fold_rows
from anima_train.core.transfers import CopyStream
from anima_train.model.block_swap import (
    BlockSwap,
    copied_blocks,
    num_swapped_values,
    saved_bytes,
    swapped_blocks,
    swaps,
    tensors_of,
)
from anima_train.model.compiled import CompiledBlocks, num_graphs
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.recompute import offloading, runner
from anima_train.optim.by_block import step_by_block
from anima_train.optim.groups import COMPONENTS, LearningRates
from anima_train.optim.optimizers import AdamW, AdamWKahan

CPU = torch.device("cpu")
SHAPE = TransformerShape(5, 48, 24, 16, 20, 8)
POLICIES = ("nothing", "selective", "blocks", "offload")
RATES = LearningRates(dict.fromkeys(COMPONENTS, 1e-2))
ADAPTERS = [Lora(rank=2, alpha=1.0, dropout=0.3), Full()]


def make_model(adapter, blocks_to_swap=0, policy="nothing", dtype=torch.float32, backend=None, device=CPU):
    """A model as `load_trained` makes it."""
    model = MiniTrainDIT(SHAPE).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.2).to(dtype)
    model.to(device)
    run = runner(policy)
    run = run if backend is None else CompiledBlocks(run, backend)
    run = offloading(run) if policy == "offload" else run
    if blocks_to_swap:
        model.block_swap = BlockSwap(model, blocks_to_swap, device)
        run = model.block_swap.around(run)
    adapter.attach(model, RATES, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.2).to(device)
    model.batch_modulations()
    model.run_block = run
    return model.train()


def loss_of(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x, t = torch.randn(2, 16, 1, 8, 12, generator=generator), torch.rand(2, 1, generator=generator)
    text = fold_rows(torch.randn(2, 5, 20, generator=generator))
    torch.manual_seed(seed)  # of dropout
    device = model.x_embedder.proj[1].weight.device
    return model(x.to(device), t.to(device), replace(text, rows=text.rows.to(device))).square().mean()


def accumulate(model, seeds=(1, 2, 3)):
    for seed in seeds:
        loss_of(model, seed).backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def same_bits(found, expected):
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.fixture(scope="module")
def unswapped():
    """The gradients of three micro-batches without swapping."""
    return [accumulate(make_model(adapter)) for adapter in ADAPTERS]


LORA, FULL = range(2)
QUICK = [(LORA, "nothing"), (FULL, "nothing"), (LORA, "selective"), (FULL, "blocks"), (LORA, "offload")]
CASES = [
    pytest.param(number, policy, blocks, marks=[] if (number, policy) in QUICK and blocks == 4 else pytest.mark.slow)
    for number, policy, blocks in itertools.product((LORA, FULL), POLICIES, (1, 2, 3, 4, 5))
]


@pytest.mark.parametrize(("number", "policy", "blocks_to_swap"), CASES)
def test_no_number_of_swapped_blocks_moves_a_bit_of_an_accumulated_gradient(unswapped, number, policy, blocks_to_swap):
    assert len(unswapped[number]) > 60
    assert same_bits(accumulate(make_model(ADAPTERS[number], blocks_to_swap, policy)), unswapped[number])


class LateCopies(CopyStream):
    """Copies that are made as late as a device may make them: when something waits for them."""

    def __init__(self, device):
        super().__init__(device)
        self.queue = []

    def copy(self, source, target):
        self.queue.append((object(), source, target))
        return self.queue[-1][0]

    def wait(self, event):
        while any(each is event for each, *_ in self.queue):
            _, source, target = self.queue.pop(0)
            super().copy(source, target)

    def finish(self):
        while self.queue:
            self.wait(self.queue[-1][0])


@pytest.mark.parametrize("number", [LORA, FULL])
def test_every_block_waits_for_its_copy_however_late(unswapped, number):
    with patch("anima_train.model.block_swap.CopyStream", LateCopies):
        model = make_model(ADAPTERS[number], 4)
    assert same_bits(accumulate(model), unswapped[number])
    assert same_bits(model.weights(), make_model(ADAPTERS[number]).weights())


def test_two_forward_passes_before_their_backward_passes_and_one_without_gradient_between(unswapped):
    for adapter, expected in zip(ADAPTERS, unswapped, strict=True):
        model = make_model(adapter, 4)
        losses = [loss_of(model, seed) for seed in (1, 2, 3)]
        with torch.no_grad():
            assert torch.equal(loss_of(model.eval(), 5), loss_of(make_model(adapter).eval(), 5))
        model.train()
        for loss in losses:
            loss.backward()
        found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        assert same_bits(found, expected)


def test_the_test_sees_a_backward_pass_with_weights_of_another_block(unswapped):
    """The fault that another trainer shipped: blocks come for the forward pass only."""
    for adapter, expected in zip(ADAPTERS, unswapped, strict=True):
        with patch("anima_train.model.block_swap.BeforeBackward.apply", lambda out, call: out):
            assert not same_bits(accumulate(make_model(adapter, 5)), expected)


@pytest.mark.parametrize("late", [False, True], ids=["", "late copies"])
@pytest.mark.parametrize("blocks_to_swap", [4, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 2, 3))])
@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [(AdamW(lr=1e-2, weight_decay=0.1), torch.float32), (AdamWKahan(lr=1e-3, weight_decay=0.1), torch.bfloat16)],
    ids=["adamw", "kahan"],
)
def test_steps_of_a_full_finetune_are_those_without_swapping(optimizer, dtype, blocks_to_swap, late):
    def train(number):
        with patch("anima_train.model.block_swap.CopyStream", LateCopies if late else CopyStream):
            model = make_model(Full(), number, dtype=dtype)
        built = optimizer.build([{"params": list(model.parameters()), "lr": 1e-2, "weight_decay": 0.1}])
        losses = []
        for seed in range(3):
            loss = loss_of(model, seed)
            loss.backward()
            step_by_block(built, model.block_swap, built.step)
            built.zero_grad()
            losses.append(loss.detach())
        states = [state[key] for state in built.state.values() for key in sorted(state)]
        return losses, model.weights(), sum(float(each.double().norm()) for each in states)

    losses, weights, states = train(blocks_to_swap)
    expected_losses, expected, expected_states = train(0)
    assert losses == expected_losses
    assert same_bits(weights, expected)
    assert states == pytest.approx(expected_states, rel=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("adapter", ADAPTERS, ids=["lora", "full"])
def test_no_bit_moves_where_copies_are_made_beside_the_computation(adapter, policy):
    device = torch.device("cuda")

    def train(number):
        model = make_model(adapter, number, policy, device=device)
        optimizer = AdamW(lr=1e-3).build([{"params": [each for each in model.parameters() if each.requires_grad]}])
        found = []
        for seed in range(5):
            found.append(accumulate(model, (seed, seed + 1)))
            step_by_block(optimizer, model.block_swap, optimizer.step)
            optimizer.zero_grad()
        return found

    with sdpa_kernel(SDPBackend.MATH):  # whose gradient has the same bits each time
        expected = train(0)
        assert all(map(same_bits, train(4), expected))
        assert all(map(same_bits, train(5), expected))


@pytest.mark.parametrize("copies", [CopyStream, LateCopies])
@pytest.mark.parametrize("policy", ["nothing", "blocks"])
def test_updates_within_the_backward_pass_are_those_without_swapping(policy, copies):
    """As `torch.optim` in a hook of each parameter makes them."""

    @torch.no_grad()
    def update(parameter):
        parameter.sub_(parameter.grad, alpha=1e-3)
        parameter.grad = None

    def train(number):
        with patch("anima_train.model.block_swap.CopyStream", copies):
            model = make_model(Full(), number, policy)
        if number:
            model.block_swap.changes_in_backward = True
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(update)
        accumulate(model, (1, 2))
        return model.weights()

    assert same_bits(train(4), train(0))


def test_weights_can_be_read_and_changed_between_steps():
    model, plain = make_model(Full(), 4), make_model(Full())
    assert same_bits(model.weights(), plain.weights())
    loss_of(model).backward()
    for changed in (model, plain):
        for number, weight in enumerate(changed.weights().values()):
            weight.add_(0.01 * (number % 7))
    assert torch.equal(loss_of(model), loss_of(plain))
    assert same_bits(model.weights(), plain.weights())


@pytest.mark.parametrize("releases", [False, True], ids=["", "released"])
@pytest.mark.parametrize(("adapter", "blocks_to_swap"), list(itertools.product(ADAPTERS, (1, 2, 4, 5))))
def test_a_step_makes_as_many_copies_as_it_told(adapter, blocks_to_swap, releases):
    trains = isinstance(adapter, Full)
    releases &= trains
    model = make_model(adapter, blocks_to_swap)
    model.block_swap.changes_in_backward = releases
    optimizer = AdamW(lr=1e-3).build([{"params": [each for each in model.parameters() if each.requires_grad]}])
    swap, copies = model.block_swap, []
    copy = CopyStream.copy

    def counted(stream, source, target):
        copies.append("out" if target.data_ptr() in {host.data_ptr() for host in swap.hosts} else "in")
        return copy(stream, source, target)

    def step():
        copies.clear()
        accumulate(model, (1,) if releases else (1, 2))
        if not releases:
            step_by_block(optimizer, swap, optimizer.step)
        return len(copies), copies.count("out")

    with patch.object(CopyStream, "copy", counted):
        step()  # the first finds nothing on the device
        found = step()
    num_micro_batches = 1 if releases else 2
    told = copied_blocks(blocks_to_swap, num_micro_batches, trains, releases)
    assert found == (told, blocks_to_swap if trains else 0)


def test_the_weights_of_two_blocks_at_most_are_on_the_device():
    model, plain = make_model(Lora(rank=2), 4), make_model(Lora(rank=2))
    swap = model.block_swap
    on_device = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in model.parameters()}
    whole = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in plain.parameters()}
    num_bytes = num_swapped_values(SHAPE) * 4
    padding = 4 * 256 * 14  # at most, for the alignment of each tensor
    assert sum(whole.values()) - sum(on_device.values()) == pytest.approx(saved_bytes(num_bytes, 4), abs=padding)
    assert num_bytes * 4 <= swap.host_bytes <= num_bytes * 4 + padding
    assert saved_bytes(num_bytes, 4) == 2 * num_bytes
    assert saved_bytes(num_bytes, 2) == saved_bytes(num_bytes, 1) == 0


def test_what_is_swapped_is_all_of_a_block_but_modulations_and_updates():
    model = make_model(Lora(rank=2), 3)
    swapped = swapped_blocks(5, 3)
    assert swapped == [0, 1, 3]
    names = {name for name, _ in model.named_parameters() if swaps(name.removesuffix(".lora_A"), swapped)}
    home = model.block_swap.home
    assert home.keys() == {name for name in names if ".lora_" not in name}
    assert sum(weight.numel() for weight in home.values()) == 3 * num_swapped_values(SHAPE)
    buffers = {buffer.values.data_ptr() for buffer in model.block_swap.buffers}
    for name, parameter in model.named_parameters():
        assert (parameter.untyped_storage().data_ptr() in buffers) == (name in home)


def test_weights_that_something_moves_are_not_computed_with():
    model = make_model(Lora(rank=2), 4)
    model.to(CPU)  # they are there
    loss_of(model)
    model.double()
    with pytest.raises(AssertionError, match="the weights were moved"):
        loss_of(model)


@pytest.mark.parametrize(("num_blocks", "blocks_to_swap"), [(28, 28), (28, 14), (28, 27), (28, 3), (1, 1)])
def test_swapped_blocks_are_spread_evenly(num_blocks, blocks_to_swap):
    found = swapped_blocks(num_blocks, blocks_to_swap)
    gaps = {second - first for first, second in itertools.pairwise([*found, num_blocks])}
    assert len(found) == blocks_to_swap
    assert max(gaps) - min(gaps) <= 1


class Quantised(nn.Module):
    """A linear with what an int8 one may have: plain tensors, buffers, another order in memory."""

    def __init__(self):
        super().__init__()
        self.weight = torch.randint(-128, 127, (6, 10), dtype=torch.int8).t()
        self.register_buffer("scale", torch.rand(10, 1))
        self.bias = nn.Parameter(torch.rand(10, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.float() * self.scale).t() + self.bias


def test_tensors_of_any_kind_and_dtype_are_swapped_as_they_are():
    model = MiniTrainDIT(SHAPE)
    linears = [Quantised() for _ in model.blocks]
    for block, linear in zip(model.blocks, linears, strict=True):
        block.mlp = linear
    x = torch.rand(3, 6)
    expected = [(linear(x), linear.weight.stride()) for linear in linears]
    swap = BlockSwap(model, 5, CPU)
    run = swap.around(lambda block, tokens: block.mlp(tokens))
    for block, (out, strides) in zip(model.blocks, expected, strict=True):
        assert torch.equal(run(block, x), out)
        assert block.mlp.weight.stride() == strides
        assert block.mlp.weight.dtype == torch.int8
    addresses = {linear.weight.untyped_storage().data_ptr() for linear in linears}
    assert addresses == {buffer.values.data_ptr() for buffer in swap.buffers}
    assert all(
        place.tensor.data_ptr() % 256 == swap.buffers[0].values.data_ptr() % 256
        for place in tensors_of(model.blocks[0])
    )


@pytest.mark.parametrize("adapter", [Lora(rank=2), Full()], ids=["lora", "full"])
def test_compiled_blocks_take_no_graph_more_and_give_the_same_bits(adapter):
    torch._dynamo.reset()
    plain, swapped = make_model(adapter, 0, backend="aot_eager"), make_model(adapter, 3, backend="aot_eager")
    expected = accumulate(plain)
    swapped.run_block = swapped.block_swap.around(plain.run_block)  # the same compiled function
    before = num_graphs()
    found = accumulate(swapped)
    torch._dynamo.reset()
    assert num_graphs() == before
    assert same_bits(found, expected)


def test_the_next_block_is_on_its_way_while_one_works_forward_and_backward():
    swap = make_model(Lora(rank=2), 5).block_swap
    swap.bring(2, 3)
    assert [buffer.block for buffer in swap.buffers] == [2, 3]
    swap.bring_back(2)
    assert [buffer.block for buffer in swap.buffers] == [2, 1]
