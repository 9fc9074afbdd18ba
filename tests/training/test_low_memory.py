"""The figures of docs/low_memory.md and of the presets, against the estimate of the full-size model."""

import re
from pathlib import Path

import pytest
import torch

from anima_train.config.ladder import rungs
from anima_train.config.load import load_config
from anima_train.data.buckets import Size
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.training.costs import ModelStats, memory_cost
from anima_train.training.ladder import CARDS, GIB, TAKEN, Budget, Choice
from anima_train.training.memory import MicroBatchShape

REPO = Path(__file__).parents[2]
PRESETS = ["low_memory", "fast_12gb", "fast_24gb"]
FULL_SIZE = TransformerShape(28, 2048, 128, 16, 1024, 256)
DOCS = (REPO / "docs" / "low_memory.md").read_text()


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    (tmp_path / "data" / "style").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)


def choice_of(config, side=1024, batch_size=1):
    """The ladder of a config on the full-size model, without a device."""
    with torch.device("meta"):
        model = MiniTrainDIT(FULL_SIZE)
    weights = sum(each.numel() for each in model.parameters())
    config.adapter.attach(model, config.learning_rates(), seed=0)
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    stats, size = ModelStats(FULL_SIZE, weights, trained), Size(side, side)
    ladder = rungs(config, FULL_SIZE.num_blocks)
    costs = [memory_cost(rung.config, stats, size, batch_size).total for rung in ladder]
    return Choice(config.memory, MicroBatchShape(side, size, batch_size), ladder, costs, Budget(0, "", ""), 0)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_takes_what_it_says_and_fits_the_card_that_it_names(name):
    path = REPO / "configs" / f"{name}.toml"
    text = path.read_text()
    config = load_config(path).config
    batches = config.micro_batch_size_per_gpu
    needed = max(
        choice_of(config, side, batches if isinstance(batches, int) else dict(batches)[side]).costs[0]
        for side in config.dataset.resolutions
    )
    assert float(re.search(r"By estimate ([\d.]+) GiB", text)[1]) == pytest.approx(needed / GIB, abs=0.06)
    card = int(re.search(r"card of (\d+)", text)[1])
    assert needed <= Budget(round(card * GIB - TAKEN), "", "").usable
    others = re.findall(
        r"^# *(\w+) = (\S+) .*?about ([\d.]+) GiB|^(\w+) = .*#.*?('?\w+'?): about ([\d.]+) GiB", text, re.M
    )
    assert others
    for _, _, _, key, value, gib in filter(lambda other: other[3], others):
        table = "model." if key == "transformer_dtype" else ""
        changed = load_config(path, [f"{table}{key}={value}"]).config
        assert float(gib) == pytest.approx(choice_of(changed).costs[0] / GIB, abs=0.06), (key, value)


ROWS = re.findall(r"^\| (LoRA|full|full, no clipping) \| `(\w+)` \| (\d+) \| (.+?) \| ([\d.]+) \|", DOCS, re.M)


def test_the_table_has_every_card():
    assert {int(card) for _, _, card, _, _ in ROWS} == set(CARDS)
    assert len(ROWS) >= 30


@pytest.mark.parametrize(("kind", "memory"), sorted({row[:2] for row in ROWS}))
def test_the_table_says_what_each_card_gets_and_what_it_takes(tmp_path, kind, memory):
    adapter = "adapter = { type = 'lora', rank = 32 }\n" if kind == "LoRA" else ""
    optimizer = "adamw" if kind == "LoRA" else "adamw_optimi"
    path = tmp_path / "run.toml"
    path.write_text(
        f"output_dir = 'runs'\nmax_steps = 1\nmemory = '{memory}'\n{adapter}"
        f"gradient_clipping = {0.0 if 'no clipping' in kind else 1.0}\n"
        "dataset = { directory = [{ path = 'data/style' }] }\nmodel = { type = 'anima', llm_adapter_lr = 0 }\n"
        f"optimizer = {{ type = '{optimizer}', lr = 1e-5 }}\n"
    )
    choice = choice_of(load_config(path).config)
    for _, _, card, settings, gib in filter(lambda row: row[:2] == (kind, memory), ROWS):
        found = choice.chosen_for(Budget(round(int(card) * GIB - TAKEN), "", ""))
        assert float(gib) == pytest.approx(found.costs[found.index] / GIB, abs=0.006)
        said = str(found.rung).replace("the settings as they are written", "nothing")
        assert settings == ("too small" if not found.fits else said), card
