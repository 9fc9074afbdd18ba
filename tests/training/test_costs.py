"""The table that estimates activations, against a count on CUDA tensors without values at full width."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from anima_train.adapters.full import Full
from anima_train.adapters.lora import Lora
from anima_train.config.load import load_config
from anima_train.data.buckets import Size
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.quantized import quantize_blocks
from anima_train.optim.groups import COMPONENTS, LearningRates
from anima_train.training.build import block_runner
from anima_train.training.costs import KEPT_VALUES, POLICIES, ModelStats, memory_cost

REPO = Path(__file__).parents[2]
SIDE, WIDTH = 1024, 2048
NUM_TOKENS = (SIDE // 16) ** 2
CUDA = torch.device("cuda")
BFLOAT16 = torch.bfloat16
ADAPTERS = {"lora": Lora(rank=32), "full": Full()}


@pytest.fixture(scope="module")
def kept_bytes():
    """Counts what blocks keep on the device: (adapter, float32 weights under autocast, policy, blocks) -> bytes."""
    with pytest.MonkeyPatch.context() as context:
        context.syspath_prepend(str(REPO / "scripts"))
        counting, fake, models = (
            importlib.import_module(f"benchmarks.{name}") for name in ("counting", "fake_cuda", "models")
        )

    def count(adapter, autocast, policy, depth):
        with fake.fake_cuda():
            inputs = models.random_inputs((SIDE, SIDE), 1, CUDA, BFLOAT16)
            with CUDA:
                model = MiniTrainDIT(models.shape_of(WIDTH, depth))
            model.to(torch.float32 if autocast else BFLOAT16)
            adapter.attach(model, LearningRates(dict.fromkeys(COMPONENTS, 1e-4)), seed=0)
            model.batch_modulations()
            model.run_block = block_runner(policy, False, CUDA)
            side = models.ours(model.train(), inputs)
            with counting.KeptBytes(model, inputs.tensors) as kept, torch.autocast("cuda", BFLOAT16, enabled=autocast):
                loss = side.loss()
            assert loss.requires_grad
            weights = sum(each.numel() for name, each in model.named_parameters() if ".lora_" not in name)
        return kept.total, weights

    return count


# What most runs have is counted by default, the rest of the table by CI.
KINDS = [
    pytest.param(*each, marks=[] if each == ("lora", False) else pytest.mark.slow, id="-".join(map(str, each)))
    for each in KEPT_VALUES
]


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
