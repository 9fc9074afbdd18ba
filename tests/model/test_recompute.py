"""What blocks keep for the backward pass: each policy gives the same bits, and keeps less than the one before it."""

import collections
import itertools

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from anima_train.adapters.full import Full
from anima_train.adapters.lora import Lora
from anima_train.core.text_batch import fold_rows
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.quantized import quantize_blocks
from anima_train.model.recompute import kept_on_host, mixed, offloading, runner
from anima_train.optim.groups import COMPONENTS, LearningRates

SHAPE = TransformerShape(3, 48, 24, 16, 20, 8)
POLICIES = ("selective", "blocks", "offload")
RATES = LearningRates(dict.fromkeys(COMPONENTS, 1e-4))


def model_of(adapter, dtype=torch.float32, quantization=None):
    generator = torch.Generator().manual_seed(0)
    model = MiniTrainDIT(SHAPE)
    if quantization is not None:
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        quantize_blocks(model.to(dtype), quantization)
    adapter.attach(model, RATES, seed=0)
    for parameter in model.parameters():
        if quantization is None or parameter.requires_grad:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.2).to(parameter.dtype)
    (model.to(dtype) if quantization is None else model).batch_modulations()
    return model.train()


def loss(model):
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 16, 1, 8, 12, generator=generator), torch.rand(2, 1, generator=generator)
    text = fold_rows(torch.randn(2, 5, 20, generator=generator))
    torch.manual_seed(2)  # of dropout
    return model(x, t, text).square().mean()


def run_of(policy):
    if isinstance(policy, int):  # of the first blocks' input alone
        return mixed(runner("blocks"), runner("selective"), policy)
    return offloading(runner(policy)) if policy == "offload" else runner(policy)


def gradients(model, policy):
    model.run_block = run_of(policy)
    model.zero_grad()
    loss(model).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [Lora(rank=2), Lora(rank=2, alpha=1.0, dropout=0.3, min_rank=1), Full()], ids=str)
def test_no_policy_moves_a_bit_of_a_gradient(adapter, dtype):
    model = model_of(adapter, dtype)
    kept = gradients(model, "nothing")
    assert len(kept) > 60
    for policy in (*POLICIES, 2):
        for found, expected in zip(gradients(model, policy), kept, strict=True):
            assert torch.equal(found, expected), policy


@pytest.mark.parametrize("quantization", ["int8", "float8"])
def test_no_policy_moves_a_bit_of_a_gradient_on_quantised_weights(quantization):
    model = model_of(Lora(rank=2, min_rank=1), torch.bfloat16, quantization)
    kept = gradients(model, "nothing")
    assert len(kept) > 60
    for policy in (*POLICIES, 2):
        for found, expected in zip(gradients(model, policy), kept, strict=True):
            assert torch.equal(found, expected), policy


def saved_bytes(model, policy):
    """Bytes that autograd keeps, apart from what selective checkpointing keeps by itself."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.run_block = runner(policy)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(model)
    return sum(sizes.values())


def test_recomputing_blocks_keeps_far_less():
    model = model_of(Lora(rank=2))
    assert saved_bytes(model, "blocks") < 0.2 * saved_bytes(model, "nothing")


class Counter(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.numbers = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.numbers[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def test_selective_runs_no_product_of_integers_again():
    def number(policy):
        model.run_block = runner(policy)
        with Counter() as counter:
            loss(model).backward()
        return counter.numbers["integer_product"]

    model = model_of(Lora(rank=2), quantization="int8")
    assert number("selective") == number("nothing") == 2 * 8 * SHAPE.num_blocks  # forward and backward
    assert number("blocks") > number("nothing")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_selective_runs_no_product_and_no_attention_again(dropout):
    def number(policy):
        model.run_block = runner(policy)
        with Counter() as counter:
            loss(model).backward()
        names = ("mm", "addmm_", "_scaled_dot_product_flash_attention_for_cpu", "gelu")
        return [counter.numbers[name] for name in names]

    model = model_of(Lora(rank=2, dropout=dropout))
    *products, gelu = number("nothing")
    assert number("selective") == [*products, 2 * gelu]
    again = number("blocks")
    assert all(more > before for more, before in zip(again, products, strict=False))


def test_of_some_checkpointed_blocks_the_first_alone_compute_products_again():
    def products(policy):
        model.run_block = run_of(policy)
        with Counter() as counter:
            loss(model).backward()
        return counter.numbers["mm"] + counter.numbers["addmm_"]

    model = model_of(Lora(rank=2))
    found = [products(number) for number in range(SHAPE.num_blocks + 1)]
    assert (found[0], found[-1]) == (products("selective"), products("blocks"))
    assert len({after - before for before, after in itertools.pairwise(found)}) == 1

    last = len(model.blocks) - 1
    ran = {name: [] for name in ("first", "others")}
    first, others = (lambda block, *inputs, name=name: ran[name].append(block.index) for name in ran)
    for block in model.blocks:
        mixed(first, others, last)(block)
    assert ran == {"first": list(range(last)), "others": [last]}
    with torch.no_grad():  # nothing is kept: one way for all
        for block in model.blocks:
            mixed(first, others, last)(block)
    assert ran == {"first": list(range(last)), "others": [last, *range(last + 1)]}


def test_the_device_does_not_hold_what_waits_on_the_host():
    run, held = offloading(runner("offload")), []

    def watch(block, tokens, *inputs):
        held.append(StorageWeakRef(tokens.untyped_storage()))
        return run(block, tokens, *inputs)

    model = model_of(Lora(rank=2))
    model.run_block = watch
    out = loss(model)
    assert out.requires_grad
    assert [reference.expired() for reference in held] == [True] * SHAPE.num_blocks


def test_tokens_wait_on_the_host_and_come_back_the_same():
    tokens = torch.randn(4, 3, requires_grad=True)
    other = torch.randn(4, 3)
    inside = tokens * 1
    seen = []
    with kept_on_host(inside):
        out = inside.square() * other  # saves `inside` and `other`
    inside.detach().zero_()  # what is on the device may be gone by then
    out.sum().backward()
    seen.append(tokens.grad)
    assert torch.equal(seen[0], 2 * tokens.detach() * other)
