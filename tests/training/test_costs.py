"""The table that estimates activations, against a count on CUDA tensors without values at full width."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from anima_train.adapters.full import Full
from anima_train.adapters.loha import Loha
from anima_train.adapters.lokr import Lokr
from anima_train.adapters.lora import Lora
from anima_train.config.config import Config
from anima_train.config.load import load_config
from anima_train.data.buckets import Size
from anima_train.model.block_swap import BlockSwap
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.quantized import quantize_blocks
from anima_train.model.recompute import POLICIES
from anima_train.optim.groups import COMPONENTS, LearningRates, optimizer_groups
from anima_train.optim.optimizers import AdamW, AdamWKahan
from anima_train.training.build import block_runner
from anima_train.training.costs import KEPT_VALUES, ModelStats, memory_cost

REPO = Path(__file__).parents[2]
SIDE, WIDTH = 1024, 2048
NUM_TOKENS = (SIDE // 16) ** 2
CUDA = torch.device("cuda")
BFLOAT16 = torch.bfloat16
ADAPTERS = {"lokr": Lokr(), "loha": Loha(), "dora": Lora(use_dora=True), "lora": Lora(rank=32), "full": Full()}
TOLERANCES = {"lora": 0.04, "lokr": 0.08, "dora": 0.04, "loha": 0.08, "full": 0.04}  # under autocast
OPTIMIZERS = {
    "lora": AdamW(lr=1e-4),
    "lokr": AdamW(lr=1e-4),
    "dora": AdamW(lr=1e-4),
    "loha": AdamW(lr=1e-4),
    "full": AdamWKahan(lr=1e-5),
}
RATES = LearningRates(dict.fromkeys(COMPONENTS, 1e-4))


@pytest.fixture(scope="module")
def scripts():
    """Modules of `scripts/benchmarks`, by name."""
    with pytest.MonkeyPatch.context() as context:
        context.syspath_prepend(str(REPO / "scripts"))
        yield {name: importlib.import_module(f"benchmarks.{name}") for name in ("counting", "fake_cuda", "models")}


@pytest.fixture(scope="module")
def prepared(scripts):
    """Makes a model in training on CUDA tensors without values: (adapter, autocast, policy, blocks) -> side."""

    def prepare(adapter, autocast, policy, depth, blocks_to_swap=0, quantization=None, checkpointed_blocks=0):
        inputs = scripts["models"].random_inputs((SIDE, SIDE), 1, CUDA, BFLOAT16)
        with CUDA:
            model = MiniTrainDIT(scripts["models"].shape_of(WIDTH, depth))
        model.to(torch.float32 if autocast else BFLOAT16)
        if quantization is not None:
            quantize_blocks(model, quantization)
        run = block_runner(policy, False, CUDA, checkpointed_blocks)
        if blocks_to_swap:
            swap = model.block_swap = BlockSwap(model, blocks_to_swap, CUDA)
            run = swap.around(run)
        adapter.attach(model, RATES, seed=0)
        model.batch_modulations()
        model.run_block = run
        return scripts["models"].ours(model.train(), inputs)

    return prepare


@pytest.fixture(scope="module")
def kept_bytes(scripts, prepared):
    """Counts what blocks keep on the device: (adapter, float32 weights under autocast, policy, blocks) -> bytes."""

    def count(adapter, autocast, policy, depth):
        with scripts["fake_cuda"].fake_cuda():
            side = prepared(adapter, autocast, policy, depth)
            kept = scripts["counting"].KeptBytes(side.model, side.inputs.tensors)
            with kept, torch.autocast("cuda", BFLOAT16, enabled=autocast):
                loss = side.loss()
            assert loss.requires_grad
            weights = sum(each.numel() for name, each in side.model.named_parameters() if ".lora_" not in name)
        return kept.total, weights

    return count


@pytest.fixture(scope="module")
def step_peak(scripts, prepared):
    """Counts the peak of the second step, the optimizer's state in memory: -> bytes, transformer."""

    def count(adapter, autocast, policy, optimizer, depth=2, **options):
        with scripts["fake_cuda"].fake_cuda():
            side = prepared(adapter, autocast, policy, depth, **options)
            built = optimizer.build(optimizer_groups(side.model.named_parameters(), RATES, 0.01))
            with scripts["counting"].PeakBytes("cuda", (*side.model.parameters(), *side.model.buffers())) as peak:
                for _ in range(2):
                    peak.peak = 0
                    with torch.autocast("cuda", BFLOAT16, enabled=autocast):
                        loss = side.loss()
                    loss.backward()
                    del loss  # fake ones keep what their graph has saved
                    of_step = peak.peak
                    built.step()
        return of_step, side.model

    return count


# What most runs have is counted by default, the rest of the table by CI.
KINDS = [
    pytest.param(*each, marks=[] if each == ("lora", False) else pytest.mark.slow, id="-".join(map(str, each)))
    for each in KEPT_VALUES
]
MOSTLY_SELECTIVE = [each if each == "selective" else pytest.param(each, marks=pytest.mark.slow) for each in POLICIES]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("kind", "autocast"), KINDS)
def test_the_table_is_what_a_block_keeps(kept_bytes, kind, autocast, policy):
    (few, weights_of_few), (many, weights_of_many) = (
        kept_bytes(ADAPTERS[kind], autocast, policy, depth) for depth in (1, 2)
    )
    if autocast and policy == "nothing":  # the estimate has these copies among the weights
        few, many = few - weights_of_few * BFLOAT16.itemsize, many - weights_of_many * BFLOAT16.itemsize
    counted = (many - few) / (NUM_TOKENS * WIDTH * BFLOAT16.itemsize)
    assert KEPT_VALUES[kind, autocast][policy] == pytest.approx(counted, rel=0.02, abs=0.06)


@pytest.mark.parametrize("policy", MOSTLY_SELECTIVE)
@pytest.mark.parametrize(("kind", "autocast"), KINDS)
def test_the_estimate_is_the_peak_of_a_whole_step(step_peak, kind, autocast, policy):
    """Forward and backward of all 16 linears, temporary memory included, beside what the optimizer keeps."""
    adapter, optimizer = ADAPTERS[kind], OPTIMIZERS[kind]
    counted, model = step_peak(adapter, autocast, policy, optimizer)
    estimate = estimate_of(model, adapter, optimizer, policy, transformer_dtype="float32" if autocast else "bfloat16")
    assert estimate == pytest.approx(
        counted, rel=TOLERANCES[kind] if autocast else 0, abs=(0.12 if kind == "dora" else 0.07) * 2**30
    )


@pytest.mark.parametrize(
    "number", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_the_estimate_of_some_checkpointed_blocks_is_the_peak_of_a_whole_step(step_peak, number):
    adapter, optimizer = ADAPTERS["lora"], OPTIMIZERS["lora"]
    counted, model = step_peak(adapter, False, "selective", optimizer, depth=3, checkpointed_blocks=number)
    estimate = estimate_of(model, adapter, optimizer, "selective", checkpointed_blocks=number)
    assert estimate == pytest.approx(counted, abs=0.07 * 2**30)


@pytest.mark.slow
def test_the_estimate_of_swapped_blocks_is_the_peak_of_a_whole_step(step_peak):
    adapter, optimizer = ADAPTERS["lora"], OPTIMIZERS["lora"]
    peaks = [step_peak(adapter, False, "blocks", optimizer, depth=4, blocks_to_swap=number) for number in (0, 4)]
    (counted, model), (counted_swapped, _) = peaks
    found = [estimate_of(model, adapter, optimizer, "blocks", blocks_to_swap=number) for number in (0, 4)]
    assert found == pytest.approx([counted, counted_swapped], abs=0.07 * 2**30)
    assert counted - counted_swapped == pytest.approx(found[0] - found[1], rel=0.05)


@pytest.mark.parametrize("policy", MOSTLY_SELECTIVE)
@pytest.mark.parametrize("quantization", ["int8", pytest.param("float8", marks=pytest.mark.slow)])
def test_the_estimate_of_weights_of_a_byte_is_the_peak_of_a_whole_step(step_peak, quantization, policy):
    adapter, optimizer = ADAPTERS["lora"], OPTIMIZERS["lora"]
    counted, model = step_peak(adapter, False, policy, optimizer, quantization=quantization)
    estimate = estimate_of(model, adapter, optimizer, policy, quantization)
    assert estimate == pytest.approx(counted, abs=(0.12 if policy == "nothing" else 0.07) * 2**30)


def estimate_of(model, adapter, optimizer, policy, transformer_dtype="bfloat16", **changes):
    """The estimate of a step of this model on one image."""
    config = Config.model_validate(
        {
            "output_dir": "runs", "dataset": "data.toml", "max_steps": 1, "adapter": adapter, "optimizer": optimizer,
            "model": {"type": "anima", "transformer_dtype": transformer_dtype},
            "activation_checkpointing": {"nothing": False, "blocks": True}.get(policy, policy), **changes,
        }
    )  # fmt: skip
    with torch.device("meta"):
        base = MiniTrainDIT(model.shape)
    weights = sum(each.numel() for each in base.parameters())
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    stats = ModelStats(model.shape, weights, trained)
    return memory_cost(config, stats, Size(SIDE, SIDE), 1).total


@pytest.mark.parametrize("name", ["style_lora", "character_lora", "full_finetune"])
def test_a_shipped_config_fits_the_memory_that_it_names(name, tmp_path, monkeypatch):
    """A tenth is left for what is not estimated."""
    for folder in ("style", "character", "train", "heldout"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    path = REPO / "configs" / f"{name}.toml"
    num_gib = int(re.search(r"(\d+) GB of GPU memory", path.read_text())[1])
    needed = gib_of(path)
    assert 0.6 * num_gib < needed < 0.9 * num_gib
    for policy, gib in re.findall(r"(?:(true|false): |about )([\d.]+) GiB", path.read_text()):
        changes = [f"activation_checkpointing={policy}"] if policy else []
        assert float(gib) == pytest.approx(gib_of(path, *changes), rel=0.05)
    if name == "full_finetune":
        assert gib_of(path, "optimizer.moments_dtype='bfloat16'") < 0.9 * 24


def gib_of(path, *changes):
    """The estimate of a config's largest bucket."""
    config = load_config(path, changes).config
    shape = TransformerShape(28, WIDTH, 128, 16, 1024, 256)
    with torch.device("meta"):
        model = MiniTrainDIT(shape)
    num_weights = sum(each.numel() for each in model.parameters())
    config.adapter.attach(model, config.learning_rates(), seed=0)
    num_trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    stats = ModelStats(shape, num_weights, num_trained)
    batches = config.micro_batch_size_per_gpu
    costs = [
        memory_cost(config, stats, Size(side, side), batches if isinstance(batches, int) else dict(batches)[side])
        for side in config.dataset.resolutions
    ]
    return max(cost.total for cost in costs) / 2**30


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_weights_of_a_byte_are_counted_as_such(kind, tmp_path, monkeypatch):
    for folder in ("style", "heldout"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = load_config(REPO / "configs" / "style_lora.toml", [f"model.transformer_dtype='{kind}'"]).config
    shape = TransformerShape(2, 256, 64, 16, 64, 16)
    model = MiniTrainDIT(shape).bfloat16()
    num_weights = sum(each.numel() for each in model.parameters())
    quantize_blocks(model, kind)
    held = sum(each.nbytes for each in model.parameters())
    cost = memory_cost(config, ModelStats(shape, num_weights, 0), Size(512, 512), 1)
    assert cost.weights == pytest.approx(held, rel=0.1)  # the model is small: its scales and rotations are a part
    assert cost.weights < 0.65 * num_weights * BFLOAT16.itemsize


def test_each_policy_keeps_less_than_the_one_before_it():
    for values in KEPT_VALUES.values():
        assert [values[policy] for policy in POLICIES] == sorted(values.values(), reverse=True)
