"""A run that was stopped goes on as if it had not been."""

import json
import shutil
import signal
import threading

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from anima_train.checkpoint import training_state as states_module
from anima_train.checkpoint.async_writer import AsyncWriter
from anima_train.core.errors import Interrupted, NumericError
from anima_train.evaluation import evaluate as evaluate_module
from anima_train.evaluation import previews as previews_module
from anima_train.training import train as train_module
from tests.resuming import RANDOM, STATES, TIMED, run_until, same, states


def pictures_of(run):
    return {path.name: Image.open(path).tobytes() for path in (run / "samples").iterdir()}  # without the run's name


# What goes on --------------------------------------------------------------------------------------------------------


def test_the_average_is_what_is_saved_and_goes_on_bitwise(trainer):
    ema = {"ema": {"decay": 0.9}}
    plain, whole = trainer("plain"), trainer("whole", **ema)
    assert whole.losses == plain.losses  # training does not see it
    key = next(iter(whole.weights))
    assert not torch.equal(whole.weights[key], plain.weights[key])
    run_until(trainer, 2, **ema)
    assert same(whole, trainer("run", **STATES, **ema))


@pytest.mark.slow
def test_evaluations_go_on_with_the_same_base(trainer, pictures):
    keys = {
        "eval_datasets": [{"name": "held", "config": {"resolutions": [64], "directory": [{"path": str(pictures)}]}}],
        "eval_every_n_steps": 1,
    }
    whole = trainer("whole", **keys)
    run_until(trainer, 2, **keys)
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
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {
        "metrics": [{key: value for key, value in line.items() if key not in TIMED} for line in metrics],
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
def test_two_processes_go_on_with_the_state_of_one(trainer):
    keys = {"max_steps": 6, "gradient_accumulation_steps": 2, **RANDOM}
    whole = trainer("whole", **keys)
    run_until(trainer, 6, **keys)  # micro-batches: 3 steps
    resumed = trainer.processes(2, "run", resume=True, **STATES, **keys | {"gradient_accumulation_steps": 1})
    assert [line["examples"] for line in resumed.metrics] == [line["examples"] for line in whole.metrics]
    assert resumed.losses[:3] == whole.losses[:3]
    assert resumed.losses == pytest.approx(whole.losses, abs=1e-5)
