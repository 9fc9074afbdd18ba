"""A run whose numbers are read a step late, as on CUDA, is the same run: its files, what it skips, and how it ends."""

import json
import math
from functools import partial

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from anima_train.core.errors import Interrupted, NumericError
from anima_train.training import tasks as tasks_module
from anima_train.training import train as train_module
from anima_train.training.anomalies import MAX_SKIPPED, SkippedUpdates, UpdateGuard
from anima_train.training.late import LateSteps
from anima_train.training.saving import Saver
from anima_train.training.tasks import PeriodicTasks
from tests.resuming import TIMED


@pytest.fixture
def late(monkeypatch):
    """Make runs read the numbers of a step so many steps late."""
    real = train_module.train

    def set_lag(lag):
        monkeypatch.setattr(train_module, "train", partial(real, lag=lag))

    return set_lag


def break_losses(monkeypatch, is_bad, value=math.nan):
    """Multiply the losses of some micro-batches, 1 the first, by a value."""
    real = train_module.compute_loss
    number = 0

    def breaking(*arguments):
        nonlocal number
        number += 1
        return real(*arguments) * (value if is_bad(number) else 1)

    monkeypatch.setattr(train_module, "compute_loss", breaking)


def lines(path):
    return [
        {key: value for key, value in json.loads(line).items() if key not in TIMED}
        for line in path.read_text().splitlines()
    ]


def left(folder):
    """All that a run left: records, previews, weights and states."""
    records = {path.name: str(lines(path)) for path in folder.glob("*.jsonl")}  # text: NaN equals itself there
    pictures = {path.name: Image.open(path).tobytes() for path in folder.glob("samples/*")}
    tensors = {
        f"{path.parent.name}/{path.name.replace(folder.name, 'run')}": load_file(path)
        for path in folder.glob("**/*.safetensors")
    }
    return records, pictures, tensors


def assert_same(first, second):
    records, pictures, tensors = left(first)
    others, other_pictures, other_tensors = left(second)
    assert records == others
    assert pictures == other_pictures
    assert tensors.keys() == other_tensors.keys()
    for name, entries in tensors.items():
        assert entries.keys() == other_tensors[name].keys()
        for key, tensor in entries.items():
            assert torch.equal(tensor, other_tensors[name][key]), (name, key)


def everything(pictures):
    """Accumulation, evaluation, previews, states, the average, skipped steps."""
    return {
        "max_steps": 9,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "ema": {"decay": 0.9},
        "adapter": {"type": "lora", "rank": 4, "dropout": 0.2},
        "eval_datasets": [{"name": "held", "config": {"resolutions": [64], "directory": [{"path": str(pictures)}]}}],
        "eval_every_n_steps": 4,
        "sampling": {"every_n_steps": 5, "width": 64, "height": 64, "steps": 2, "prompts": ["red circle"]},
        "save_every_n_steps": 3,
        "checkpoint_every_n_steps": 2,
        "keep_last": 9,
    }


@pytest.mark.slow
@pytest.mark.parametrize("lag", [1, 3])
def test_a_run_that_is_told_late_leaves_the_same(trainer, pictures, late, monkeypatch, lag):
    """With two updates that are skipped, one of them just before a state is saved."""
    runs = []
    for name, steps in (("now", 0), ("late", lag)):
        with monkeypatch.context() as patch:
            late(steps)
            break_losses(patch, lambda number: number in (6, 12))  # in steps 3 and 6
            runs.append(trainer(name, **everything(pictures)).path)
    assert_same(*runs)
    _, shown, tensors = left(runs[1])
    assert [json.loads(line)["step"] for line in (runs[1] / "metrics.jsonl").read_text().splitlines()] == [
        *range(1, 10)
    ]
    skipped = [line["step"] for line in lines(runs[1] / "warnings.jsonl") if "update skipped" in line["text"]]
    assert skipped == [3, 6]
    assert (len(shown), len(tensors)) == (2, 3 + 3 * 4)


def test_everything_is_told_before_the_run_is_looked_at(trainer, pictures, late, monkeypatch):
    """A state holds metrics up to its step, and no evaluation or preview comes before the metrics of its step."""
    late(3)
    seen, waiting = [], []

    class NotedSteps(LateSteps):
        def __enter__(self):
            waiting.append(self.waiting)
            return super().__enter__()

    def noted(owner, name):
        real = getattr(owner, name)

        def noting(tasks, *arguments):
            if tasks.state.step:
                last = lines(tasks.context.folder.metrics_path)[-1]["step"]
                seen.append((name, tasks.state.step, len(waiting[-1]), last))
            return real(tasks, *arguments)

        monkeypatch.setattr(owner, name, noting)

    monkeypatch.setattr(tasks_module, "LateSteps", NotedSteps)
    for owner, name in (
        (PeriodicTasks, "evaluate"), (PeriodicTasks, "preview"), (Saver, "save_weights"), (Saver, "save_state"),
    ):  # fmt: skip
        noted(owner, name)
    trainer("run", **everything(pictures))
    assert {name for name, *_ in seen} == {"evaluate", "preview", "save_weights", "save_state"}
    assert all((waiting, last) == (0, step) for _, step, waiting, last in seen)


@pytest.mark.parametrize("first", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_ten_in_a_row_end_a_late_run_with_the_same_state(trainer, late, monkeypatch, first):
    """The step after the tenth would be finite; the device has made it when the host hears of the tenth."""
    folders = []
    for name, lag in (("now", 0), ("late", 1)):
        with monkeypatch.context() as patch:
            late(lag)
            break_losses(patch, lambda number: first <= number < first + MAX_SKIPPED)
            with pytest.raises(NumericError, match="10 updates in a row skipped"):
                trainer(name, max_steps=20, ema={"decay": 0.9})
        folders.append(trainer.folder / "runs" / name)
        assert [path.name for path in (folders[-1] / "checkpoints").iterdir()] == [f"step-{first - 1:06d}"]
        assert lines(folders[-1] / "metrics.jsonl")[-1]["step"] == first + MAX_SKIPPED - 1
    assert_same(*folders)
    late(1)
    whole, resumed = trainer("whole", max_steps=20), trainer("late", max_steps=20, ema={"decay": 0.9})
    assert resumed.losses == whole.losses


def test_an_error_loses_no_step_that_was_made(trainer, late, monkeypatch):
    late(2)
    break_losses(monkeypatch, lambda number: number == 6, value="no number")
    with pytest.raises(TypeError):
        trainer("run", max_steps=9)
    assert [line["step"] for line in lines(trainer.folder / "runs" / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_a_request_saves_a_state_with_all_metrics_and_resume_is_bitwise(trainer, late, monkeypatch):
    late(1)
    whole = trainer("whole", max_steps=8)
    real = PeriodicTasks.run_due

    def asked(tasks, step):
        if tasks.state.step == 5:
            (tasks.context.folder.path / "save_quit").touch()
        real(tasks, step)

    with monkeypatch.context() as patch:
        patch.setattr(PeriodicTasks, "run_due", asked)
        with pytest.raises(Interrupted, match="after step 5"):
            trainer("run", max_steps=8)
    folder = trainer.folder / "runs" / "run"
    assert [line["step"] for line in lines(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    run = trainer("run", max_steps=8)
    assert run.losses == whole.losses
    assert all(torch.equal(tensor, run.weights[key]) for key, tensor in whole.weights.items())


# Parts ---------------------------------------------------------------------------------------------------------------


def test_steps_are_told_in_order_and_none_after_one_that_ends_the_run():
    told = []

    def check(step):
        if step == 3:
            raise NumericError("too many")

    with pytest.raises(NumericError), LateSteps(2, told.append, check) as late:  # noqa: PT012
        for step in range(1, 5):
            late.add(step)
            assert told == list(range(1, step - 1))
        late.add(5)
    assert told == [1, 2, 3]


@pytest.mark.parametrize(("error", "expected"), [(ValueError, [1, 2]), (KeyboardInterrupt, [])])
def test_what_waits_is_logged_after_an_error_and_not_after_a_second_ctrl_c(error, expected):
    told = []
    with pytest.raises(error), LateSteps(2, told.append, pytest.fail) as late:  # noqa: PT012
        late.add(1)
        late.add(2)
        raise error
    assert told == expected


def test_an_error_of_the_device_is_not_hidden_by_one_of_telling():
    def log(step):
        raise RuntimeError("the device is lost")

    with pytest.raises(ValueError, match="first"), LateSteps(1, log, pytest.fail) as late:  # noqa: PT012
        late.add(1)
        raise ValueError("first")


def test_the_device_counts_as_the_host_and_skips_all_after_too_many():
    steps = [(0.1, 1.0), (math.nan, 1.0), (0.1, math.inf), (0.1, 1.0), (-math.inf, math.nan)]
    guard, skipped = UpdateGuard(torch.device("cpu"), 0), SkippedUpdates()
    for loss, norm in steps:
        found = guard.skips(torch.tensor(loss), torch.tensor(norm))
        assert bool(found) == (skipped.after(loss, norm) is not None)
        assert int(guard.in_a_row) == skipped.in_a_row
    resumed = UpdateGuard(torch.device("cpu"), MAX_SKIPPED - 1)
    assert bool(resumed.skips(torch.tensor(math.nan), torch.tensor(1.0)))
    for _ in range(3):
        assert bool(resumed.skips(torch.tensor(0.1), torch.tensor(1.0)))
