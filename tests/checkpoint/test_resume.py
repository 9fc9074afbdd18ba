"""A run that was stopped goes on as if it had not been, and what is not the same run is refused."""

import importlib.util
import json
import shutil
import signal
import threading
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from anima_train.checkpoint import training_state as states_module
from anima_train.checkpoint.async_writer import AsyncWriter
from anima_train.checkpoint.training_state import newest_state
from anima_train.cli.train import with_resume_path
from anima_train.config.load import load_config
from anima_train.core.errors import ConfigError, Interrupted, ModelFileError, NumericError
from anima_train.evaluation import evaluate as evaluate_module
from anima_train.evaluation import previews as previews_module
from anima_train.model.tiny import write_tiny
from anima_train.training import train as train_module
from anima_train.training.train import run_training

STATES = {"checkpoint_every_n_steps": 1, "keep_last": 20}
RANDOM = {"adapter": {"dropout": 0.2}, "uncond_fraction": 0.3}


def run_until(trainer, monkeypatch, name, step, **changes):
    """A run that fails in the step after `step`, as after a power cut."""
    real = train_module.compute_loss
    number = 0

    def failing(*arguments):
        nonlocal number
        number += 1
        if number > step:
            raise ZeroDivisionError
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "compute_loss", failing)
        with pytest.raises(ZeroDivisionError):
            trainer(name, **STATES, **changes)
    return trainer.folder / "runs" / name


def same(first, second):
    assert second.losses == first.losses
    assert second.weights.keys() == first.weights.keys()
    assert all(torch.equal(tensor, second.weights[key]) for key, tensor in first.weights.items())
    return True


def pictures_of(run):
    return {path.name: Image.open(path).tobytes() for path in (run / "samples").iterdir()}  # without the run's name


def states(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# Which run, and which state ------------------------------------------------------------------------------------------


def test_the_same_command_goes_on_with_an_unfinished_run_and_refuses_a_finished_one(trainer, monkeypatch, capsys):
    whole = trainer("whole", **RANDOM)
    run_until(trainer, monkeypatch, "run", 2, **RANDOM)
    capsys.readouterr()
    assert same(whole, trainer("run", **STATES, **RANDOM))
    assert "resuming after step 2" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="already holds a run that is finished; to train it further raise max_steps"):
        trainer("run", **STATES, **RANDOM)


def test_without_a_run_name_the_same_command_finds_its_unfinished_run(trainer, monkeypatch):
    run_until(trainer, monkeypatch, "style", 2, run_name=None)
    (name,) = (path.name for path in (trainer.folder / "runs").iterdir())
    assert name.startswith("style-2")
    assert trainer("style", **STATES, run_name=None).path.name == name
    time.sleep(1)  # names are made from seconds
    assert trainer("style", **STATES, run_name=None).path.name != name


def test_a_changed_configuration_is_told_apart(trainer, monkeypatch, capsys):
    run_until(trainer, monkeypatch, "run", 2)
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


def test_another_run_begins_with_the_state_of_one(trainer, monkeypatch):
    whole = trainer("whole")
    run = run_until(trainer, monkeypatch, "run", 3)
    branch = trainer("branch", resume=run / "checkpoints" / "step-000002", **STATES)
    assert same(whole, branch)
    assert states(run) == ["step-000001", "step-000002", "step-000003"]
    assert same(whole, trainer("other", resume=run, **STATES))  # its newest
    with pytest.raises(ConfigError, match="branch: already holds a run"):
        trainer("branch", resume=run, **STATES)
    with pytest.raises(ConfigError, match="there is no training state"):
        trainer("more", resume=run.parent, **STATES)


def test_a_run_goes_back_to_an_older_state_and_loses_nothing(trainer, monkeypatch):
    whole = trainer("whole")
    run = run_until(trainer, monkeypatch, "run", 3)
    assert same(whole, trainer("run", resume=run / "checkpoints" / "step-000001", **STATES))
    assert [name for name in states(run) if "unused" in name] == ["unused-step-000002", "unused-step-000003"]


def test_a_damaged_newest_state_costs_one_step_and_a_warning(trainer, monkeypatch, capsys):
    whole = trainer("whole", **RANDOM)
    run = run_until(trainer, monkeypatch, "run", 3, **RANDOM)
    path = run / "checkpoints" / "step-000003" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    resumed = trainer("run", **STATES, **RANDOM)
    assert same(whole, resumed)
    assert "step-000003: damaged: weights.safetensors has other content" in capsys.readouterr().out
    texts = [json.loads(line)["text"] for line in (run / "warnings.jsonl").read_text().splitlines()]
    assert sum("going back to step 2" in text for text in texts) == 1


def test_a_run_without_a_state_starts_again(trainer, monkeypatch, capsys):
    whole = trainer("whole")
    run = run_until(trainer, monkeypatch, "run", 2)
    shutil.rmtree(run / "checkpoints")
    assert same(whole, trainer("run", **STATES))
    assert "starts again, as no training state was saved" in capsys.readouterr().out


def test_other_processes_times_accumulation_are_refused_with_the_remedy(trainer, monkeypatch):
    run_until(trainer, monkeypatch, "run", 2)
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


# What goes on --------------------------------------------------------------------------------------------------------


def test_the_average_is_what_is_saved_and_goes_on_bitwise(trainer, monkeypatch):
    ema = {"ema": {"decay": 0.9}}
    plain, whole = trainer("plain"), trainer("whole", **ema)
    assert whole.losses == plain.losses  # training does not see it
    key = next(iter(whole.weights))
    assert not torch.equal(whole.weights[key], plain.weights[key])
    run_until(trainer, monkeypatch, "run", 2, **ema)
    assert same(whole, trainer("run", **STATES, **ema))


@pytest.mark.slow
def test_evaluations_go_on_with_the_same_base(trainer, pictures, monkeypatch):
    keys = {
        "eval_datasets": [{"name": "held", "config": {"resolutions": [64], "directory": [{"path": str(pictures)}]}}],
        "eval_every_n_steps": 1,
    }
    whole = trainer("whole", **keys)
    run_until(trainer, monkeypatch, "run", 2, **keys)
    resumed = trainer("run", **STATES, **keys)
    assert resumed.evaluations == whole.evaluations
    assert "held/difference_from_base" in resumed.evaluations[-1]


def test_a_lora_that_changes_nothing_is_told(trainer, capsys):
    trainer("some")
    assert "changes nothing" not in "".join(capsys.readouterr())
    trainer("none", optimizer={"lr": 1e-60})
    assert "none.safetensors changes nothing: every lora_B in it is zero" in "".join(capsys.readouterr())


def test_an_average_whose_decay_is_not_reached_is_told(trainer, capsys):
    trainer("short", ema={"decay": 0.999})
    assert "note: ema.decay: 0.999 is not reached in 4 steps" in capsys.readouterr().out
    trainer("shorter", ema={"decay": 0.3})
    assert "ema.decay" not in capsys.readouterr().out


def test_the_worst_steps_end_with_the_last_good_state(trainer, monkeypatch):
    whole = trainer("whole", max_steps=20)
    real = train_module.compute_loss
    number = 0

    def breaking(*arguments):
        nonlocal number
        number += 1
        return real(*arguments) * (float("nan") if number > 3 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "compute_loss", breaking)
        with pytest.raises(NumericError, match="10 updates in a row skipped"):
            trainer("run", max_steps=20)
    assert states(trainer.folder / "runs" / "run") == ["step-000003"]
    assert same(whole, trainer("run", max_steps=20))


# Stopping in every phase ---------------------------------------------------------------------------------------------


def signal_at(patch, module, name, number, kind=signal.SIGTERM):
    """Send a signal to this process at the n-th call of a function; return what is set when that is done."""
    real = getattr(module, name)
    calls = 0
    sent = threading.Event()

    def sending(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == number:
            signal.raise_signal(kind)
            sent.set()
        return real(*arguments, **options)

    patch.setattr(module, name, sending)
    return sent


PHASES = {
    "evaluation": (evaluate_module, "predict", 30, ["evaluation", "preview"]),
    "preview": (previews_module, "generate", 2, ["preview"]),
    "decoding": (previews_module, "decode", 2, []),
    "saving": (states_module, "write_tensors", 1, []),
}


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase_saves_and_what_was_left_is_made_later(trainer, pictures, phase):
    keys = {
        **RANDOM,
        "checkpoint_every_n_steps": 2,
        "eval_datasets": [{"name": "held", "config": {"resolutions": [64], "directory": [{"path": str(pictures)}]}}],
        "eval_every_n_steps": 2,
        "eval_before_first_step": False,
        "sampling": {
            "every_n_steps": 2, "before_first_step": False, "width": 64, "height": 64, "steps": 2,
            "prompts": ["red circle", "blue"],
        },
    }  # fmt: skip
    whole = trainer("whole", **keys)
    module, name, number, pending = PHASES[phase]
    with pytest.MonkeyPatch.context() as patch:
        sent = signal_at(patch, module, name, number)
        if phase == "saving":  # in the background: the steps wait until it has begun
            write = AsyncWriter.write
            patch.setattr(AsyncWriter, "write", lambda *arguments: (write(*arguments), sent.wait(60)))
        with pytest.raises(Interrupted) as stopped:
            trainer("run", **keys)
    assert sent.is_set()
    assert stopped.value.exit_code == 143
    run = trainer.folder / "runs" / "run"
    newest = states(run)[-1]
    assert newest in ("step-000002", "step-000003")  # what is written in the background may end in the next step
    if newest == "step-000002":
        assert json.loads((run / "checkpoints" / newest / "state.json").read_text())["pending"] == pending
    resumed = trainer("run", **keys)
    assert same(whole, resumed)
    assert resumed.evaluations == whole.evaluations
    assert pictures_of(run) == pictures_of(whole.path)


# Every step, in new processes ----------------------------------------------------------------------------------------

EVERYTHING = {
    "max_steps": 9,
    "gradient_accumulation_steps": 2,
    "uncond_fraction": 0.3,
    "lr_scheduler": "cosine",
    "warmup_steps": 2,
    "ema": {"decay": 0.9},
    "eval_every_n_steps": 2,
    "num_workers": 2,
    **STATES,
}
KINDS = {
    "lora": {"adapter": {"type": "lora", "rank": 4, "dropout": 0.2}, "model": {"llm_adapter_lr": 1e-3}},
    "full": {"adapter": None, "optimizer": {"type": "adamw_optimi", "lr": 1e-4}, "model": {"dtype": "bfloat16"}},
    "no workers": {"num_workers": 0, "adapter": {"dropout": 0.2}},
}


def everything(trainer, pictures, kind):
    """Accumulation, buckets, two resolutions, dropout of all kinds, evaluation and previews."""
    directory = {"path": str(pictures), "shuffle_tags": True, "tag_dropout": 0.2, "num_repeats": 1.5}
    held = {"resolutions": [64], "directory": [{"path": str(pictures)}]}
    trainer.base["dataset"] |= {"resolutions": [64, 96], "directory": [directory]}
    trainer.base["eval_datasets"] = [{"name": "held", "config": held}]
    trainer.base["sampling"] = {"every_n_steps": 3, "width": 64, "height": 64, "steps": 2, "prompts": ["red circle"]}
    for key, value in KINDS[kind].items():
        old = trainer.base.get(key)
        trainer.base[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    trainer.base = {key: value for key, value in trainer.base.items() if value is not None}
    return {key: value for key, value in EVERYTHING.items() if key not in KINDS[kind]}


def left(run):
    """All that a run left that must not depend on where it was stopped."""
    timed = ("seconds", "images_per_second", "memory_bytes")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {
        "metrics": [{key: value for key, value in line.items() if key not in timed} for line in metrics],
        "evaluations": [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()],
        "samples": pictures_of(run),
    }
    final = [path for path in (run / "weights").iterdir() if "-s0" not in path.name]
    files = [
        run / "checkpoints" / "step-000009" / f"{name}.safetensors" for name in ("weights", "optimizer", "average")
    ]
    return found, [load_file(path) for path in (*final, *files)]


def assert_same_run(expected, run):
    found, tensors = left(run)
    assert found == expected[0]
    assert len(tensors) == len(expected[1])
    for first, second in zip(expected[1], tensors, strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bitwise_from_every_step_in_a_new_process(trainer, pictures, forks, kind):
    keys = everything(trainer, pictures, kind)
    config = trainer.config("run", **keys)
    (first,) = forks(1, str(config))
    assert first.returncode == 0, first.stderr
    run = trainer.folder / "runs" / "run"
    expected = left(run)
    whole = run.rename(run.with_name("whole"))
    for step in range(1, 9):
        # As a kill in the next step leaves it: all that was logged later is there, the later states are not.
        shutil.copytree(whole, run)
        for path in (run / "checkpoints").iterdir():
            if int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path)
        manifest = json.loads((run / "manifest.json").read_text())
        (run / "manifest.json").write_text(json.dumps(manifest | {"finished": False}))
        (result,) = forks(1, str(config))
        assert result.returncode == 0, result.stderr
        assert f"resuming after step {step}" in result.stdout
        assert_same_run(expected, run)
        shutil.rmtree(run)


@pytest.mark.slow
def test_a_run_that_is_stopped_after_every_step_is_bitwise_the_one_that_never_was(trainer, pictures, forks):
    keys = everything(trainer, pictures, "lora")
    (whole,) = forks(1, str(trainer.config("whole", **keys)))
    assert whole.returncode == 0, whole.stderr
    config = trainer.config("run", **keys)
    run = trainer.folder / "runs" / "run"
    for step in range(1, 9):
        run.mkdir(parents=True, exist_ok=True)
        (run / "save_quit").write_text("")
        (result,) = forks(1, str(config))
        assert result.returncode == 0, result.stderr
        assert f"stopped: after step {step};" in result.stderr
    assert forks(1, str(config))[0].returncode == 0
    expected = left(trainer.folder / "runs" / "whole")
    assert_same_run(expected, run)


@pytest.mark.slow
def test_two_processes_go_on_with_the_state_of_one(trainer, monkeypatch):
    keys = {"max_steps": 6, "gradient_accumulation_steps": 2, **RANDOM}
    whole = trainer("whole", **keys)
    run_until(trainer, monkeypatch, "run", 6, **keys)  # micro-batches: 3 steps
    resumed = trainer.processes(2, "run", resume=True, **STATES, **keys | {"gradient_accumulation_steps": 1})
    assert [line["examples"] for line in resumed.metrics] == [line["examples"] for line in whole.metrics]
    assert resumed.losses[:3] == whole.losses[:3]
    assert resumed.losses == pytest.approx(whole.losses, abs=1e-5)


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
