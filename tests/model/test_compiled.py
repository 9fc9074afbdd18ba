"""Compiled blocks: few graphs whatever the sizes, eager's results, and no run that ends because of a compiler."""

import itertools
import logging
import threading

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from anima_train.adapters.full import Full
from anima_train.adapters.lora import Lora
from anima_train.core.device import is_out_of_memory
from anima_train.core.text_batch import fold_rows
from anima_train.model import compiled
from anima_train.model.compiled import CompiledBlocks, missing_compiler, num_graphs
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.lora_linear import LoraLinear
from anima_train.model.quantized import quantize_blocks
from anima_train.model.recompute import mixed, offloading, runner
from anima_train.optim.groups import COMPONENTS, LearningRates

# Of dynamo, which hides it from everybody but pytest.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

SHAPE = TransformerShape(2, 48, 24, 16, 32, 8)
RATES = LearningRates(dict.fromkeys(COMPONENTS, 1e-4))
LARGEST = (128, 128)  # of latents: 4,096 tokens
# As many tokens as the model is wide (48), as the text is wide and has rows (32).
SIZES = (LARGEST, (12, 16), (16, 12), (8, 16), (16, 8), (8, 8), (4, 24), (24, 4), (6, 10))
BATCH_SIZES = (2, 1, 4)
CAPTIONS = (1, 32, 48, 500, 512, 600)  # rows, folded to a multiple of 16; the last two have no zeros after them
LOGGER = "anima_train.model.compiled"


def make_model(adapter, quantization=None):
    generator = torch.Generator().manual_seed(0)
    model = MiniTrainDIT(SHAPE)
    if quantization is not None:
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        quantize_blocks(model, quantization)
    adapter.attach(model, RATES, seed=0)
    for parameter in model.parameters():
        if quantization is None or parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    model.batch_modulations()
    return model.train()


def inputs_of(size, batch_size, rows=20):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch_size, 16, 1, *size, generator=generator)
    text = fold_rows(torch.randn(batch_size, rows, SHAPE.context_width, generator=generator))
    return x, torch.rand(batch_size, 1, generator=generator), text


def blocks_of(policy, backend=None):
    """As `training/build.py` makes them; eager without a backend."""
    run = runner(policy)
    if backend is not None:
        run = CompiledBlocks(run, backend)
    return offloading(run) if policy == "offload" else run


def train(model, run, *inputs):
    """The velocity and all gradients."""
    model.run_block = run
    model.zero_grad()
    torch.manual_seed(0)  # of dropout
    velocity = model.train()(*inputs)
    velocity.square().mean().backward()
    return [velocity.detach(), *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)]


@torch.no_grad()
def evaluate(model, run, *inputs):
    """The velocity in evaluation and in previews."""
    model.run_block = run
    return [model.eval()(*inputs)]


def graphs_of(call, *arguments):
    before = num_graphs()
    call(*arguments)
    return num_graphs() - before


def lines(caplog):
    """What was told."""
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


@pytest.fixture
def same(error):
    """Checks that what is compiled gives eager's results."""

    def check(call, model, run, *inputs, tolerance=1e-5):
        found, expected = call(model, run, *inputs), call(model, runner("nothing"), *inputs)
        assert len(found) == len(expected)
        assert max(map(error, found, expected)) < tolerance

    return check


@pytest.fixture
def fresh():
    """Nothing is compiled before the test, nor after it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def warm():
    """A model and its compiled blocks, after each kind of batch at one size: the graphs that there are to be."""
    torch._dynamo.reset()
    model, run = make_model(Lora(rank=4)), blocks_of("nothing", "eager")
    kinds = itertools.product((train, evaluate), (2, 1))
    assert [graphs_of(call, model, run, *inputs_of((8, 8), batch_size)) for call, batch_size in kinds] == [1, 1, 1, 1]
    yield model, run
    torch._dynamo.reset()


def test_the_lora_is_on_all_linears(warm):
    assert all(sum(isinstance(part, LoraLinear) for part in block.modules()) == 16 for block in warm[0].blocks)


@pytest.mark.parametrize("call", [train, evaluate])
def test_all_sizes_and_batches_share_the_graphs(warm, same, call):
    def run_all():
        for size, batch_size in itertools.product(SIZES, BATCH_SIZES):
            if size != LARGEST or batch_size == 1:
                same(call, *warm, *inputs_of(size, batch_size))
            else:  # eager's would take long
                call(*warm, *inputs_of(size, batch_size))

    assert graphs_of(run_all) == 0


@pytest.mark.parametrize("call", [train, evaluate])
def test_captions_of_all_lengths_share_the_graphs(warm, same, call):
    def run_all():
        for rows in CAPTIONS:
            same(call, *warm, *inputs_of((12, 16), 2, rows))

    assert graphs_of(run_all) == 0


def in_thread(call, *arguments):
    """The result of a call in another thread."""
    results = []
    thread = threading.Thread(target=lambda: results.append(call(*arguments)))
    thread.start()
    thread.join()
    return results[0]


def test_other_threads_use_the_graphs_that_there_are(warm, same):
    model, run = warm

    def run_all():
        for size, batch_size in (((8, 16), 4), ((12, 16), 1)):
            for call in (train, evaluate):
                same(lambda *args, call=call: in_thread(call, *args), model, run, *inputs_of(size, batch_size))
        # The forward pass here, the backward pass there, as autograd's own thread of a GPU has it.
        model.run_block = run
        loss = model.train()(*inputs_of((16, 8), 2)).square().mean()
        in_thread(loss.backward)

    assert graphs_of(run_all) == 0
    assert all(part.lora_A.grad is not None for part in model.modules() if isinstance(part, LoraLinear))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("policy", ["selective", "offload"])
def test_no_policy_takes_more_graphs(policy, same):
    model, run = make_model(Lora(rank=4)), blocks_of(policy, "aot_eager")

    def run_all(call):
        for size, batch_size in itertools.product(SIZES, BATCH_SIZES):
            same(call, model, run, *inputs_of(size, batch_size))

    assert graphs_of(run_all, train) == 2
    assert graphs_of(run_all, evaluate) == 2  # the second is the previews'


@pytest.mark.usefixtures("fresh")
def test_selective_recomputation_compiles_without_a_warning(same, caplog):
    model, run = make_model(Lora(rank=4)), blocks_of("selective", "eager")
    assert graphs_of(same, train, model, run, *inputs_of((8, 16), 2)) == 1
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    "adapter", [Lora(rank=4, alpha=2.0, dropout=0.3, min_rank=1), Full()], ids=["dropout, t-lora", "full"]
)
def test_other_adapters_compile(adapter, same):
    model, run = make_model(adapter), blocks_of("nothing", "eager")
    assert graphs_of(same, train, model, run, *inputs_of((8, 16), 2)) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("quantization", ["int8", "float8"])
def test_quantised_weights_take_no_more_graphs(quantization, same):
    model, run = make_model(Lora(rank=4), quantization), blocks_of("nothing", "eager")

    def run_all():
        for size, batch_size, rows in (((8, 16), 2, 20), ((4, 24), 4, 48), ((6, 10), 1, 1), ((16, 12), 1, 20)):
            # A value in the middle between two integers is rounded to either.
            same(train, model, run, *inputs_of(size, batch_size, rows), tolerance=0.01)

    assert graphs_of(run_all) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_checkpointed_blocks_on_quantised_weights_compile_with_their_backward_pass(same):
    model, run = make_model(Lora(rank=4), "int8"), blocks_of("blocks", "aot_eager")
    assert graphs_of(lambda: same(train, model, run, *inputs_of((8, 16), 2), tolerance=0.01)) == 1


@pytest.mark.usefixtures("fresh")
def test_autocast_of_float32_weights_compiles(same):
    model, run = make_model(Lora(rank=4)), blocks_of("nothing", "eager")
    with torch.autocast("cpu", torch.bfloat16):
        # The compiler's forms of norm and modulation round in other places.
        number = graphs_of(lambda: same(train, model, run, *inputs_of((8, 16), 2), tolerance=0.03))
    assert number == 1


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_inductor_makes_no_graph_more_and_gives_eagers_results(same, caplog):
    model = make_model(Lora(rank=4))
    model.blocks = model.blocks[:1]
    model.batch_modulations()
    run = blocks_of("selective", "inductor")
    with caplog.at_level(logging.INFO, LOGGER):
        number = graphs_of(lambda: [same(train, model, run, *inputs_of(size, 2)) for size in SIZES])
    assert number == 1
    assert [line.partition(" the blocks")[0] for line in lines(caplog)] == ["compiling", "compiled"]


class Scaled(nn.Module):
    """Stands for a block where compiling has to be quick."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))

    def forward(self, tokens, *others):
        return (tokens * self.weight).sin() * sum(other.sum() for other in others)


def run_scaled(block, tokens, *others):
    return block(tokens, *others)


@pytest.mark.usefixtures("fresh")
def test_blocks_first_run_in_another_thread_have_one_graph_too():
    run = CompiledBlocks(run_scaled, "eager")

    def run_all():
        for shape in ((2, 5, 5), (2, 5, 7), (3, 7, 7), (4, 4, 9)):
            run(Scaled(), torch.ones(shape), torch.ones(5, 5))

    assert graphs_of(in_thread, run_all) == 1


def fails(error):
    def backend(graph, inputs):
        raise error

    return backend


def passes(graph, inputs):
    return graph.forward


def untraceable(block, tokens, *others):
    torch._dynamo.graph_break()
    return block(tokens, *others)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("run", "backend", "reason"),
    [
        (run_scaled, fails(ValueError("no such instruction")), "no such instruction"),
        (run_scaled, fails(AssertionError("a compiler's mistake")), "a compiler's mistake"),
        (run_scaled, fails(IndexError("another mistake")), "another mistake"),
        (run_scaled, aot_autograd(fw_compiler=passes, bw_compiler=fails(ValueError("no gradient"))), "no gradient"),
        (untraceable, "eager", "graph_break"),
    ],
    ids=["forward", "assertion", "index", "backward", "graph break"],
)
def test_what_cannot_be_compiled_runs_as_it_is_with_one_warning(run, backend, reason, caplog):
    blocks, block = CompiledBlocks(run, backend), Scaled()
    for _ in range(3):
        tokens = torch.ones(2, 5, 4, requires_grad=True)
        out = blocks(block, tokens, torch.ones(2))
        assert torch.equal(out, block(tokens, torch.ones(2)))
        out.sum().backward()
    [warning] = lines(caplog)
    assert warning.startswith("the blocks run without being compiled, and slower: ")
    assert reason in warning
    assert "\n" not in warning


def run_named(block, tokens, name):
    return block(tokens, torch.ones(len(name)))


@pytest.mark.usefixtures("fresh")
def test_too_many_kinds_of_batches_run_as_they_are(monkeypatch, caplog):
    blocks, block, tokens = CompiledBlocks(run_named, "eager"), Scaled(), torch.ones(2, 5, 4)
    monkeypatch.setattr(compiled, "MAX_GRAPHS", 2)
    for name in ("a", "bc", "def", "ghij", "klmno"):
        assert torch.equal(blocks(block, tokens, name), run_named(block, tokens, name))
    assert len(lines(caplog)) == 1


@pytest.mark.usefixtures("fresh")
def test_more_kinds_of_batches_than_dynamo_takes_by_itself_are_compiled(caplog):
    blocks, block, tokens = CompiledBlocks(run_named, "eager"), Scaled(), torch.ones(2, 5, 4)
    names = ["x" * length for length in range(1, 13)]
    assert graphs_of(lambda: [blocks(block, tokens, name) for name in names]) == len(names)
    assert lines(caplog) == []


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_two_ways_to_run_blocks_share_the_graph_without_gradients():
    model, run = make_model(Lora(rank=4)), mixed(blocks_of("blocks", "eager"), blocks_of("nothing", "eager"), 1)
    assert [graphs_of(call, model, run, *inputs_of((6, 8), 3)) for call in (train, evaluate)] == [2, 1]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("out of memory")])
def test_memory_that_runs_out_while_compiling_is_told(error, caplog):
    blocks = CompiledBlocks(run_scaled, fails(error))
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        blocks(Scaled(), torch.ones(2, 5, 4), torch.ones(2))
    assert is_out_of_memory(caught.value)
    assert lines(caplog) == []


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("error", [RuntimeError("device-side assert"), AssertionError("wrong stride")])
def test_an_error_of_what_was_compiled_is_not_hidden(error):
    def backend(graph, inputs):
        def broken(*arguments):
            raise error

        return broken

    blocks = CompiledBlocks(run_scaled, backend)
    for _ in range(2):  # with the compilation before it, and without
        with pytest.raises(type(error), match=str(error)):
            blocks(Scaled(), torch.ones(2, 5, 4), torch.ones(2))


@pytest.mark.usefixtures("fresh")
def test_compiling_is_announced_and_its_time_told(caplog):
    blocks, block, tokens = CompiledBlocks(run_scaled, "eager"), Scaled(), torch.ones(2, 5, 4)
    with caplog.at_level(logging.INFO, LOGGER):
        for batch in (tokens, tokens[:1], tokens):
            blocks(block, batch, tokens)
        with torch.no_grad():
            blocks(block, tokens, tokens)
    before, *after = lines(caplog)
    assert before.startswith("compiling the blocks")
    assert [line.rpartition(" in ")[0] for line in after] == [
        "compiled the blocks for training",
        "compiled the blocks for training, one image at a time",
        "compiled the blocks for evaluation and previews",
    ]


@pytest.mark.usefixtures("fresh")
def test_two_ways_to_run_blocks_tell_each_thing_once(caplog):
    run = CompiledBlocks(run_scaled, fails(NotImplementedError("no kernel")))
    first = CompiledBlocks(run_scaled, fails(NotImplementedError("no kernel")), beside=run)
    with caplog.at_level(logging.INFO, LOGGER):
        for each in (first, run):
            each(Scaled(), torch.ones(3, 5, 4), torch.ones(2))
    assert first.compiled is run.compiled is None
    before, warning = lines(caplog)
    assert before.startswith("compiling the blocks")
    assert warning.startswith("the blocks run without being compiled, and slower: ")


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_compiler_is_looked_for_where_torch_and_triton_look(monkeypatch):
    monkeypatch.setattr("anima_train.model.compiled.has_triton", lambda: True)
    assert missing_compiler(CPU) is None  # of the machine that runs the tests
    assert missing_compiler(CUDA) is None
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert "gcc or clang" in missing_compiler(CUDA)
    monkeypatch.setenv("CC", "/opt/bin/icx")
    assert missing_compiler(CUDA) is None
    with torch._inductor.config.patch({"cpp.cxx": (None, "c++-17")}):
        assert "there is no C++ compiler" in missing_compiler(CPU)
        assert "c++-17" in missing_compiler(CPU)
    monkeypatch.setattr("sysconfig.get_path", lambda *arguments: "/nowhere")
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: None)
    assert "python3-dev" in missing_compiler(CUDA)
