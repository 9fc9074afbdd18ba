"""The strengths of a LoRA that are tried when a run is at its end."""

import json
import logging
import os
import re
import signal

import pytest
import torch
from safetensors.torch import save_file

from anima_train.adapters.addition import adapted_layers
from anima_train.adapters.loha import Loha
from anima_train.adapters.lokr import Lokr
from anima_train.adapters.lora import Lora, lora_layers
from anima_train.adapters.parts import read_adapter
from anima_train.config.load import load_config
from anima_train.core.errors import ConfigError, Interrupted
from anima_train.core.text_batch import fold_rows
from anima_train.evaluation.strengths import at_strength
from anima_train.evaluation.strengths_table import strengths_table
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.optim.groups import COMPONENTS, LearningRates
from anima_train.reports.strengths import read_strengths
from anima_train.training import strengths
from anima_train.training.train import run_training


def sets(folder):
    at = {"resolutions": [96], "directory": [{"path": str(folder)}]}
    return [
        {"name": "new", "config": at, "quantiles": [0.9, 0.5]},
        {"name": "known", "role": "retention", "config": at, "sigmas": [0.5]},
    ]


@pytest.fixture(scope="module")
def others(images_drawer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    images_drawer(folder, [(98, 90), (98, 80)])
    return folder


PICTURES = {"width": 32, "height": 32, "steps": 1, "prompts": ["a <b>", "c"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory, trainer_in, others):
    """A run that tries strengths; it draws, and has an average of its weights."""
    trainer = trainer_in(tmp_path_factory.mktemp("run"))
    return trainer(
        eval_datasets=sets(others), eval_every_n_steps=2, max_steps=2, optimizer={"lr": 1e-2}, ema={"decay": 0.5},
        strengths_after_training=[0.5, 1.0, 1.25], sampling=PICTURES, checkpoint_every_n_steps=2,
    )  # fmt: skip


def record_of(run):
    return json.loads((run.path / "strengths.json").read_text())


def evaluated(run, step):
    found = {key: value for line in run.evaluations if line["step"] == step for key, value in line.items()}
    return {key: value for key, value in found.items() if key not in ("step", "examples")}


def test_strength_0_is_the_base_and_strength_1_the_last_evaluation(run):
    record = record_of(run)
    assert record["step"] == 2
    by_strength = {each["strength"]: each["metrics"] for each in record["strengths"]}
    assert list(by_strength) == [0.0, 0.5, 1.0, 1.25]
    for strength, step in ((0.0, 0), (1.0, 2)):
        logged = evaluated(run, step)
        assert by_strength[strength] == {key: logged[key] for key in logged if not key.startswith("update_norm")}
        assert {"new/loss", "known/drift", "evaluation/learning", "evaluation/forgetting"} <= logged.keys()
    drifts = [metrics["known/drift"] for metrics in by_strength.values()]
    assert drifts[0] == 0 < drifts[1] < drifts[2] < drifts[3]


def test_trying_strengths_leaves_no_trace_in_the_curves(run):
    assert [line["step"] for line in run.evaluations if "new/loss" in line] == [0, 2]


def test_previews_are_drawn_at_each_strength_and_shown_in_strips(run):
    record = record_of(run)
    for each in record["strengths"]:
        assert each["previews"] == [f"strengths/{each['strength']:g}/s000002_{number:02d}.png" for number in (0, 1)]
    contents = [[(run.path / file).read_bytes() for file in each["previews"]] for each in record["strengths"]]
    assert len({tuple(each) for each in contents}) == 4
    page = (run.path / "report.html").read_text()
    part = page[page.index("<h2>Strengths</h2>") :].partition("<h2>")[2].partition("<h2>")[0]
    captions = ["strength 0, the base", "strength 0.5", "strength 1", "strength 1.25"]
    assert re.findall("<figcaption>(.*?)</figcaption>", part) == captions * 2
    assert re.findall(r'alt="(.*?) at strength 1"', part) == ["a &lt;b&gt;", "c"]
    assert "at quantile_0.90" in part


def test_the_table_shows_the_larger_error_the_level_with_most_noise_and_the_drift(run):
    record = record_of(run)
    headings, rows = strengths_table(record)
    assert headings == [
        "strength", "new (validation)", "standard error", "at quantile_0.90", "known (retention)", "standard error",
        "at sigma_0.50", "drift, relative",
    ]  # fmt: skip
    metrics = record["strengths"][1]["metrics"]
    change = "new/difference_from_base"
    numbers = [f"{metrics[change]:+.5f}", f"{metrics[f'{change}_stderr']:.5f}"]
    assert rows[1][:4] == ["0.5", *numbers, f"{metrics[f'{change}_quantile_0.90']:+.5f}"]
    assert rows[1][-1] == f"{metrics['known/drift_relative']:.5f}"
    metrics["new/difference_from_base_stderr_kinds"] = 7
    assert strengths_table(record)[1][1][2] == "7.00000"


def test_a_damaged_record_is_noted(run, tmp_path):
    assert read_strengths(tmp_path) is None
    for text in ("{", "[]", '{"step": 1, "sets": [], "strengths": [{"strength": "x", "metrics": {}}]}'):
        (tmp_path / "strengths.json").write_text(text)
        assert read_strengths(tmp_path).notes == ["strengths.json is damaged"]


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.25])
def test_a_strength_scales_what_the_lora_adds_and_leaves_no_trace(strength):
    rates = LearningRates(dict.fromkeys(COMPONENTS, 1e-3))
    model = MiniTrainDIT(TransformerShape(2, 48, 24, 16, 20, 8))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    inputs = (torch.randn(1, 16, 1, 8, 8), torch.tensor([[0.5]]), fold_rows(torch.randn(1, 5, 20)))
    Lora(rank=2).attach(model, rates, seed=0)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        learned = model(*inputs)
        for _, layer in lora_layers(model):
            layer.scale = strength
        expected = model(*inputs)
        for _, layer in lora_layers(model):
            layer.scale = 1.0
        with at_strength(model, strength):
            torch.testing.assert_close(model(*inputs), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(*inputs), learned)


@pytest.mark.parametrize("adapter", [Lokr(rank=2, alpha=3.0), Lokr(full_matrix=True), Loha(rank=2, alpha=3.0)])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.25])
def test_a_strength_of_any_adapter_is_that_of_its_file_when_it_is_merged(adapter, strength, tmp_path, error):
    model, merged = (MiniTrainDIT(TransformerShape(2, 48, 24, 16, 20, 8)) for _ in range(2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    merged.load_state_dict(model.state_dict())
    adapter.attach(model, LearningRates(dict.fromkeys(COMPONENTS, 1e-3)), seed=0)
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.get_parameter(layer.zero))
    save_file(adapter.tensors(model), tmp_path / "adapter.safetensors")
    file = read_adapter(tmp_path / "adapter.safetensors")
    for name in file.changes if strength else ():
        weight = merged.get_parameter(name)
        weight.data = file.updated(name, weight.data, strength)
    inputs = (torch.randn(1, 16, 1, 8, 8), torch.tensor([[0.5]]), fold_rows(torch.randn(1, 5, 20)))
    with torch.no_grad():
        learned, expected = model(*inputs), merged(*inputs)
        with at_strength(model, strength):
            assert error(model(*inputs), expected) < 1e-5
        assert torch.equal(model(*inputs), learned)
        assert error(learned, expected) > 1e-2


def test_a_run_that_is_stopped_while_strengths_are_tried_tries_them_when_it_is_resumed(
    run, trainer, others, monkeypatch, caplog
):
    keys = {
        "eval_datasets": sets(others), "eval_every_n_steps": 2, "max_steps": 2, "optimizer": {"lr": 1e-2},
        "ema": {"decay": 0.5}, "strengths_after_training": [0.5, 1.0, 1.25],
    }  # fmt: skip
    real = strengths.at_strength

    def stopped(transformer, strength):
        if strength == 0.5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(transformer, strength)

    monkeypatch.setattr(strengths, "at_strength", stopped)
    with pytest.raises(Interrupted, match="while strengths were tried; resume with the same command"):
        trainer(**keys)
    assert not (trainer.folder / "runs" / "run" / "strengths.json").exists()
    monkeypatch.setattr(strengths, "at_strength", real)
    caplog.set_level(logging.INFO)
    resumed = trainer(**keys)
    found, expected = ([each["metrics"] for each in record_of(each)["strengths"]] for each in (resumed, run))
    assert found == expected
    assert "strength  new (validation)  standard error  at quantile_0.90" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [None, "fsdp2"])
def test_two_processes_find_what_one_does(trainer, others, sharding):
    keys = {
        "eval_datasets": sets(others), "max_steps": 2, "optimizer": {"lr": 1e-2}, "strengths_after_training": [0.5],
        "sampling": PICTURES,
    }  # fmt: skip
    one = trainer("one", gradient_accumulation_steps=2, **keys)
    two = trainer.processes(2, "two", sharding=sharding, **keys)
    found, expected = ([each["metrics"] for each in record_of(each)["strengths"]] for each in (two, one))
    assert found[0]["known/drift"] == 0
    assert found[1]["known/drift"] == pytest.approx(expected[1]["known/drift"], rel=1e-2)
    assert [len(each["previews"]) for each in record_of(two)["strengths"]] == [2, 2]


def test_a_dry_run_counts_them_among_the_evaluations(trainer, others, capsys):
    keys = {"eval_datasets": sets(others)[:1], "eval_every_n_steps": 2, "strengths_after_training": [0.5, 1.0]}
    run_training(load_config(trainer.config(**keys)), dry_run=True)
    # one before the first step, two in four steps, three strengths with the base's; two images at two noise levels
    told = capsys.readouterr().out
    assert "evaluations: 6 with 4 passes of an image each" in told
    assert "evaluation sets: new (validation)" in told


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"strengths_after_training": [0.5]}, "strengths_after_training: needs a set in eval_datasets with role"),
        ({"strengths_after_training": [-1.0]}, r"strengths_after_training\[0\]: found -1"),
        ({"strengths_after_training": [0.5], "adapter": {"type": "full"}, "eval_datasets": True},
         "adapter: a full fine-tune has no strength, as an adapter has; remove strengths_after_training"),
        ({"strengths_after_training": [0.5], "adapter": {"type": "lora", "use_dora": True}, "eval_datasets": True},
         "adapter: use_dora: at a strength, ComfyUI draws with weights between .* remove strengths_after_training"),
    ],
)  # fmt: skip
def test_what_cannot_be_tried_is_refused(trainer, others, keys, problem):
    if "eval_datasets" in keys:
        keys = keys | {"eval_datasets": sets(others)[:1]}
        trainer.base["adapter"] = {}
    with pytest.raises(ConfigError, match=problem):
        trainer(**keys)
