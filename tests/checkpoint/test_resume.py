"""Which run is resumed, from which of its states, and what is refused."""

import importlib.util
import json
import shutil
import time

import pytest

from anima_train.checkpoint.training_state import newest_state
from anima_train.cli.train import with_resume_path
from anima_train.config.load import load_config
from anima_train.core.errors import ConfigError, ModelFileError
from anima_train.model.tiny import write_tiny
from anima_train.training.train import run_training
from tests.resuming import RANDOM, STATES, run_until, same, states


def test_the_same_command_goes_on_with_an_unfinished_run_and_refuses_a_finished_one(trainer, capsys):
    whole = trainer("whole", **RANDOM)
    run_until(trainer, 2, **RANDOM)
    capsys.readouterr()
    assert same(whole, trainer("run", **STATES, **RANDOM))
    assert "resuming after step 2" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="already holds a run that is finished; to train it further raise max_steps"):
        trainer("run", **STATES, **RANDOM)


def test_without_a_run_name_the_same_command_finds_its_unfinished_run(trainer):
    run_until(trainer, 2, "style", run_name=None)
    (name,) = (path.name for path in (trainer.folder / "runs").iterdir())
    assert name.startswith("style-2")
    assert trainer("style", **STATES, run_name=None).path.name == name
    time.sleep(1)  # names are made from seconds
    assert trainer("style", **STATES, run_name=None).path.name != name


def test_a_changed_configuration_is_told_apart(trainer, capsys):
    run_until(trainer, 2)
    with pytest.raises(ConfigError, match=r"optimizer\.lr: 0\.001 -> 0\.002") as caught:
        trainer("run", **STATES, optimizer={"lr": 0.002})
    assert "--resume" in str(caught.value)
    with pytest.raises(ConfigError, match=r"adapter\.rank: 4 -> 8") as caught:
        trainer("run", resume=True, **STATES, adapter={"rank": 8}, optimizer={"lr": 0.002})
    assert "optimizer.lr: 0.001 -> 0.002" in str(caught.value)
    capsys.readouterr()
    found = trainer("run", resume=True, **STATES, optimizer={"lr": 0.002}, max_steps=5)
    assert [line["lr"] for line in found.metrics] == [0.001, 0.001, 0.002, 0.002, 0.002]
    assert "changed: optimizer.lr: 0.001 -> 0.002" in capsys.readouterr().out


def test_a_finished_run_is_trained_further(trainer):
    whole = trainer("whole", max_steps=6)
    trainer("run", max_steps=4, checkpoint_every_n_steps=4)
    assert same(whole, trainer("run", resume=True, max_steps=6, checkpoint_every_n_steps=4))


@pytest.mark.parametrize("resume", [False, True])
def test_a_finished_run_without_a_state_is_not_trained_over(trainer, resume):
    run = trainer("run", max_steps=2)
    weights = run.path / "weights" / "run.safetensors"
    before = weights.read_bytes()
    with pytest.raises(ConfigError, match="is finished and has no training state to train it further from"):
        trainer("run", resume=resume, max_steps=3)
    assert weights.read_bytes() == before


def test_another_run_begins_with_the_state_of_one(trainer):
    whole = trainer("whole")
    run = run_until(trainer, 3)
    branch = trainer("branch", resume=run / "checkpoints" / "step-000002", **STATES)
    assert same(whole, branch)
    assert states(run) == ["step-000001", "step-000002", "step-000003"]
    assert same(whole, trainer("other", resume=run, **STATES))  # its newest
    with pytest.raises(ConfigError, match="branch: already holds a run"):
        trainer("branch", resume=run, **STATES)
    with pytest.raises(ConfigError, match="there is no training state"):
        trainer("more", resume=run.parent, **STATES)


def test_a_run_goes_back_to_an_older_state_and_loses_nothing(trainer):
    whole = trainer("whole")
    run = run_until(trainer, 3)
    assert same(whole, trainer("run", resume=run / "checkpoints" / "step-000001", **STATES))
    assert [name for name in states(run) if "unused" in name] == ["unused-step-000002", "unused-step-000003"]


def test_a_damaged_newest_state_costs_one_step_and_a_warning(trainer, capsys):
    whole = trainer("whole", **RANDOM)
    run = run_until(trainer, 3, **RANDOM)
    path = run / "checkpoints" / "step-000003" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    resumed = trainer("run", **STATES, **RANDOM)
    assert same(whole, resumed)
    assert "step-000003: damaged: weights.safetensors has other content" in capsys.readouterr().out
    texts = [json.loads(line)["text"] for line in (run / "warnings.jsonl").read_text().splitlines()]
    assert sum("going back to step 2" in text for text in texts) == 1


def test_a_run_without_a_state_starts_again(trainer, capsys):
    whole = trainer("whole")
    run = run_until(trainer, 2)
    shutil.rmtree(run / "checkpoints")
    assert same(whole, trainer("run", **STATES))
    assert "starts again, as no training state was saved" in capsys.readouterr().out


def test_other_processes_times_accumulation_are_refused_with_the_remedy(trainer):
    run_until(trainer, 2)
    with pytest.raises(ModelFileError, match=r"a step had 1 micro-batches, and has 2; set gradient_accumulation_steps"):
        trainer("run", resume=True, **STATES, gradient_accumulation_steps=2)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a.toml", "--resume"], ["a.toml", "--resume"]),
        (["a.toml", "--resume", "--dry-run"], ["a.toml", "--resume", "--dry-run"]),
        (["--resume", "a.toml"], ["--resume", "a.toml"]),
        (["--resume", "out/run", "a.toml"], ["--resume-path", "out/run", "a.toml"]),
        (["a.toml", "--resume=out/run"], ["a.toml", "--resume-path", "out/run"]),
    ],
)
def test_the_path_after_resume_may_be_absent(given, expected):
    assert with_resume_path(given) == expected


def test_a_dry_run_refuses_what_cannot_be_resumed_and_tells_what_would_be(trainer, tmp_path, monkeypatch, capsys):
    config = trainer.config("run", **STATES)
    with pytest.raises(ConfigError, match="there is no run to resume"):
        run_training(load_config(config), dry_run=True, resume=True)
    with pytest.raises(ConfigError, match="does not exist"):
        run_training(load_config(config), dry_run=True, resume_path=tmp_path / "nowhere")
    run = trainer("run", **STATES, max_steps=7)  # an epoch has six

    def dry_run(*overrides):
        run_training(load_config(config, ["max_steps=9", *overrides]), dry_run=True, resume=True)

    with pytest.raises(ConfigError, match=r"adapter\.rank: 4 -> 8"):
        dry_run("adapter.rank=8")
    dry_run()
    assert "changed: max_steps: 7 -> 9\nresuming after step 7" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"^epochs: the run would end at step 6, and .* is of step 7"):
        dry_run("epochs=1")
    write_tiny(tmp_path / "another", seed=1)
    with pytest.raises(ModelFileError, match="the transformer file's SHA-256 was"):
        dry_run(f"model.tiny_path='{tmp_path / 'another'}'")
    with monkeypatch.context() as patch:
        real = importlib.util.find_spec
        patch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else real(name, *rest))
        with pytest.raises(ConfigError, match="needs W&B"):
            dry_run("monitoring.enable_wandb=true", "monitoring.wandb_tracker_name='a'")

    saved = newest_state(run.path / "checkpoints")

    def begun_with(memory):
        facts = {**saved.manifest.run, "memory": memory}
        (saved.folder / "state.json").write_text(saved.manifest.model_copy(update={"run": facts}).text())

    begun_with({"activation_checkpointing": True})
    dry_run()
    assert 'memory = "auto" sets activation_checkpointing = true' in capsys.readouterr().out
    begun_with({"model.transformer_dtype": "int8"})
    with pytest.raises(ConfigError, match=r"was trained with model\.transformer_dtype"):
        dry_run()
