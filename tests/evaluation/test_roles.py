"""Evaluation sets of several roles in a run: what is learned, memorized and forgotten, and the drift from the base."""

import contextlib
import logging
import shutil

import pytest
import torch

from anima_train.adapters.lora import Lora
from anima_train.config.load import load_config
from anima_train.core.errors import ConfigError, DataError
from anima_train.core.text_batch import fold_rows
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.objective.timesteps import Points, Timesteps
from anima_train.optim.groups import COMPONENTS, LearningRates
from anima_train.training.prepare import scan_all


def held(name, folder, **keys):
    return {"name": name, "config": {"resolutions": [96], "directory": [{"path": str(folder)}]}, **keys}


@pytest.fixture
def other(images_drawer, tmp_path):
    """Images that are not trained, of two kinds, and new ones of the subject."""
    for name, width in (("artist", 98), ("text", 104), ("new", 110)):
        images_drawer(tmp_path / name, [(width, 90), (width, 80)])
    for path in (tmp_path / "text").glob("*.txt"):
        path.write_text("a sign, english text")
    return tmp_path


@pytest.mark.parametrize("ema", [None, pytest.param({"decay": 0.5}, marks=pytest.mark.slow)])
def test_a_run_measures_what_it_learns_memorizes_and_forgets(trainer, pictures, other, caplog, ema):
    kinds = [{"path": str(other / kind), "kind": kind} for kind in ("artist", "text")]
    retention = {"name": "known", "role": "retention", "sigmas": [0.5, 0.9], "repeats": 2}
    retention["config"] = {"resolutions": [96], "directory": kinds}
    sets = [held("seen", pictures, role="train", quantiles=[0.5]), held("new", other / "new"), retention]
    caplog.set_level(logging.INFO)
    run = trainer(eval_datasets=sets, eval_every_n_steps=4, ema=ema, optimizer={"lr": 1e-2})
    start, end = ({key: value for line in run.evaluations if line["step"] == step for key, value in line.items()}
                  for step in (0, 4))  # fmt: skip
    assert start["known/drift"] == start["known/difference_from_base"] == start["evaluation/forgetting"] == 0
    assert end["known/drift"] > 0
    assert end["known/difference_from_base"] == pytest.approx(
        end["known/drift"] + end["known/drift_cross_term"], rel=1e-3
    )
    assert {"known/loss_sigma_0.50", "known/loss_sigma_0.90", "known/difference_from_base_of_text"} <= end.keys()
    assert end["evaluation/forgetting"] == end["known/difference_from_base"]
    assert end["evaluation/learning"] == -end["new/difference_from_base"]
    assert end["evaluation/memorization"] == pytest.approx(
        end["new/difference_from_base"] - end["seen/difference_from_base"]
    )
    assert "seen/drift" in end
    assert "new/drift" not in end
    assert "step 4: known/loss " in caplog.text
    plain = trainer("plain", ema=ema, optimizer={"lr": 1e-2})
    assert plain.losses == run.losses
    assert all(torch.equal(tensor, run.weights[name]) for name, tensor in plain.weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [None, "fsdp2"])
def test_two_processes_measure_the_drift_of_one(trainer, other, sharding):
    sets = {"eval_datasets": [held("known", other / "text", role="retention")], "eval_every_n_steps": 2, "max_steps": 2}
    sets["adapter"] = {"rank": 4, "min_rank": 1}
    one = trainer("one", gradient_accumulation_steps=2, **sets)
    two = trainer.processes(2, "two", sharding=sharding, **sets)
    assert two.evaluations[-1]["known/drift"] == pytest.approx(one.evaluations[-1]["known/drift"], rel=1e-3)
    assert one.evaluations[-1]["known/drift"] > 0
    masked = [run.evaluations[-1]["known/loss_as_trained"] for run in (one, two)]
    assert masked[1] == pytest.approx(masked[0], rel=1e-4)
    norms = [{key: each for key, each in run.evaluations[-1].items() if "update" in key} for run in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    assert norms[0]["update_norm_relative/mlp"] > 0


@pytest.mark.slow
def test_a_t_lora_is_measured_as_its_file_which_is_a_plain_lora_and_as_it_is_trained(trainer, other):
    sets = {"eval_datasets": [held("known", other / "text", role="retention")], "eval_every_n_steps": 4}
    run = trainer("run", adapter={"rank": 4, "min_rank": 1}, optimizer={"lr": 1e-2}, **sets)
    start, end = ({key: value for line in run.evaluations if line["step"] == step for key, value in line.items()}
                  for step in (0, 4))  # fmt: skip
    assert start["known/loss_as_trained"] == start["known/loss"]
    at_levels = [value for key, value in end.items() if key.startswith("known/loss_as_trained_quantile_")]
    assert sum(at_levels) / len(at_levels) == pytest.approx(end["known/loss_as_trained"])
    assert end["known/loss_as_trained"] != pytest.approx(end["known/loss"], rel=1e-4)
    file = run.path / "weights" / "run.safetensors"
    plain = trainer("plain", adapter={"rank": 4, "init_from_existing": str(file)}, max_steps=1, **sets)
    first = plain.evaluations[0]
    assert "known/loss_as_trained" not in first
    for key in ("known/loss", "known/drift", "known/loss_quantile_0.90"):
        assert first[key] == pytest.approx(end[key], rel=1e-4)


FULL = {"adapter": None, "optimizer": {"lr": 1e-4}}


def test_a_full_fine_tune_is_measured_against_the_base_that_it_was(trainer, other, caplog):
    sets = [held("known", other / "text", role="retention", quantiles=[0.5, 0.9])]
    keys = {"eval_datasets": sets, "eval_every_n_steps": 2, "checkpoint_every_n_steps": 2, **FULL}
    run = trainer("run", **keys)
    ends = [line for line in run.evaluations if "known/drift" in line]
    assert [line["step"] for line in ends] == [0, 2, 4]
    assert ends[0]["known/drift"] == 0
    assert 0 < ends[1]["known/drift"] < ends[2]["known/drift"]
    for line in ends:
        expected = line["known/drift"] + line["known/drift_cross_term"]
        assert line["known/difference_from_base"] == pytest.approx(expected, rel=1e-3, abs=1e-9)
    evaluations, state = run.evaluations, run.path / "checkpoints" / "step-000002"
    assert trainer("run", resume=state, **keys).evaluations == evaluations
    assert not [record for record in caplog.records if record.levelname == "WARNING" and "drift" in record.message]
    elsewhere = trainer("elsewhere", resume=state, **keys)  # takes what is kept with it
    assert elsewhere.evaluations == evaluations
    shutil.rmtree(run.path / "base_velocities")
    last = trainer("run", resume=state, **keys).evaluations[-1]
    assert "known/difference_from_base" in last
    assert "known/drift" not in last
    assert "no drift of the evaluation set known: what the base does with these pictures is not in" in caplog.text


@pytest.mark.slow
def test_processes_keep_the_base_together_and_one_reads_what_two_have_kept(trainer, other):
    sets = {"eval_datasets": [held("known", other / "text", role="retention")], "eval_every_n_steps": 2, **FULL}
    sets |= {"checkpoint_every_n_steps": 2}
    one = trainer("one", gradient_accumulation_steps=2, **sets)
    two = trainer.processes(2, "two", **sets)
    assert two.evaluations[-1]["known/drift"] == pytest.approx(one.evaluations[-1]["known/drift"], rel=1e-3)
    drift = two.evaluations[-1]["known/drift"]
    again = trainer("two", resume=two.path / "checkpoints" / "step-000002", gradient_accumulation_steps=2, **sets)
    assert again.evaluations[-1]["known/drift"] == pytest.approx(drift, rel=1e-3)


def test_as_the_base_a_transformer_predicts_what_it_did_before_and_then_what_it_has_learned():
    model, rates = MiniTrainDIT(TransformerShape(2, 48, 24, 16, 20, 8)), LearningRates(dict.fromkeys(COMPONENTS, 1e-3))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    inputs = (torch.randn(1, 16, 1, 8, 8), torch.tensor([[0.5]]), fold_rows(torch.randn(1, 5, 20)))
    with torch.no_grad():
        base = model(*inputs)
        adapter = Lora(rank=2)
        adapter.attach(model, rates, seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
        learned = model(*inputs)
        with contextlib.suppress(KeyError), adapter.as_base(model):
            as_base = model(*inputs)
            raise KeyError  # whatever happens inside
        assert torch.equal(model(*inputs), learned)
    assert torch.allclose(as_base, base, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(learned, base, rtol=0.1, atol=0.1)
    assert all(torch.equal(parameter, kept[name]) for name, parameter in model.named_parameters())


def test_what_is_forgotten_is_not_measured_on_what_is_trained(trainer, pictures, other):
    shutil.copy(pictures / "image2.png", other / "artist" / "a copy.png")
    loaded = load_config(trainer.config(eval_datasets=[held("known", other / "artist", role="retention")]))
    with pytest.raises(
        DataError, match=r"dataset known: 1 image is in the training set too, such as .*a copy\.png; role"
    ):
        scan_all((loaded.train, *loaded.evals), 0, write=False)


def test_what_is_learned_and_measured_as_what_is_forgotten_is_told(trainer, other):
    shutil.copy(other / "new" / "image1.png", other / "artist" / "a copy.png")
    sets = [held("known", other / "artist", role="retention"), held("new", other / "new"), held("more", other / "new")]
    loaded = load_config(trainer.config(eval_datasets=sets))
    scans = scan_all((loaded.train, *loaded.evals), 0, write=False)
    found = {name: [line for line in scan.warnings if "too" in line] for name, scan in scans.items()}
    assert [len(lines) for lines in found.values()] == [0, 2, 0, 0]
    for line, name in zip(found["known"], ("new", "more"), strict=True):
        assert line.startswith(f"1 image is in the evaluation set {name} too, such as ")
        assert "a copy.png: what is learned of them counts as drift, and hides what is forgotten" in line


def test_training_pictures_that_are_not_trained_are_told(trainer, other):
    loaded = load_config(trainer.config(eval_datasets=[held("seen", other / "text", role="train")]))
    (warning,) = (
        line for line in scan_all((loaded.train, *loaded.evals), 0, write=False)["seen"].warnings if "set" in line
    )
    assert warning.startswith("2 images are not in the training set, such as ")


@pytest.mark.parametrize(
    ("keys", "changes", "problem"),
    [
        ({"quantiles": [0.2, 0.2004]}, {}, "quantiles: has levels that are equal in two decimals"),
        ({"quantiles": [0.2], "sigmas": [0.5]}, {}, "sigmas: replaces quantiles, which would have no effect"),
        ({"quantiles": [1.0]}, {}, "quantiles"),
        ({"sigmas": [0.0]}, {}, "sigmas"),
        ({"repeats": 0}, {}, "repeats: found 0"),
        ({"role": "held-out"}, {}, 'role: found "held-out"'),
        (
            {"drift": True},
            {"adapter": None, "eval_before_first_step": False, "eval_every_n_steps": 1},
            "adapter: drift of eval_datasets known needs eval_before_first_step = true in a full fine-tune",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(trainer, pictures, keys, changes, problem):
    with pytest.raises(ConfigError) as refused:
        load_config(trainer.config(eval_datasets=[held("known", pictures, **keys)], **changes))
    assert problem in str(refused.value)


def test_a_kind_in_the_training_set_alone_is_noted(trainer, pictures, caplog):
    caplog.set_level(logging.INFO)
    trainer(dataset={"directory": [{"path": str(pictures), "kind": "artist"}]}, max_steps=1)
    assert "directory[0].kind: has no effect, as only evaluation sets are told apart by it" in caplog.text


def test_points_are_levels_times_noises():
    timesteps = Timesteps(shift=3.0)
    points = Points((0.2, 0.5), (), 3)
    assert len(points) == 6
    assert points.t(1, timesteps, 100) == timesteps.at(0.5, 100)
    assert Points((0.2,), (0.25, 0.75)).names == ("sigma_0.25", "sigma_0.75")
    assert Points((0.2,), (0.25, 0.75)).t(1, timesteps, 100) == 0.75
