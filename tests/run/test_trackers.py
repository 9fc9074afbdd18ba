"""Trackers that stall or fail leave the training alone."""

import threading
import time

import pytest
import torch
from accelerate.state import PartialState
from accelerate.tracking import GeneralTracker

from anima_train.config.sections import Monitoring
from anima_train.run import trackers as trackers_module
from anima_train.run.trackers import Trackers, make_trackers, open_trackers


class Recorder(GeneralTracker):
    """A tracker that keeps what it gets, and may wait or fail."""

    name = "recorder"
    requires_logging_directory = False
    main_process_only = False

    def __init__(self, fails_at=None, gate=None):
        super().__init__()
        self.records = []
        self.finished = False
        self.fails_at = fails_at
        self.gate = gate

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        pass

    def log(self, values, step):
        if self.gate is not None:
            self.gate.wait(30)
        if step == self.fails_at:
            raise RuntimeError("no quota")
        self.records.append((values, step))

    def finish(self):
        self.finished = True


@pytest.fixture
def trackers_of():
    """Makes trackers, which are closed at the end."""
    made = []

    def make(*recorders):
        made.append(Trackers(lambda: list(recorders)))
        return made[-1]

    yield make
    for each in made:
        each.close(patience=0.1)


def test_every_record_arrives_in_order_before_the_end(trackers_of, caplog):
    recorder = Recorder()
    trackers = trackers_of(recorder)
    for step in range(500):
        trackers.log({"loss": step / 2}, step)
    trackers.close()
    assert recorder.records == [({"loss": step / 2}, step) for step in range(500)]
    assert recorder.finished
    assert caplog.messages == []


def test_a_record_is_what_it_was_when_it_was_handed_over(trackers_of):
    gate = threading.Event()
    recorder = Recorder(gate=gate)
    trackers = trackers_of(recorder)
    values = {"loss": 1.0}
    trackers.log(values, 1)
    values["loss"] = 2.0
    gate.set()
    trackers.close()
    assert recorder.records == [({"loss": 1.0}, 1)]


def test_a_stalled_tracker_holds_nothing_up(trackers_of, monkeypatch, caplog):
    monkeypatch.setattr(trackers_module, "MAX_WAITING", 100)
    gate = threading.Event()
    trackers = trackers_of(Recorder(gate=gate))
    started = time.monotonic()
    for step in range(1000):
        trackers.log({"loss": 0.0}, step)
    trackers.close(patience=0.2)
    assert time.monotonic() - started < 5
    assert any("records not sent" in line for line in caplog.messages)
    assert any("has not taken all numbers" in line for line in caplog.messages)
    gate.set()


def test_a_failing_tracker_is_told_once_and_the_others_go_on(trackers_of, caplog):
    bad, good = Recorder(fails_at=3), Recorder()
    trackers = trackers_of(bad, good)
    for step in range(10):
        trackers.log({"loss": 0.0}, step)
    trackers.close()
    assert [step for _, step in bad.records] == [0, 1, 2]
    assert [step for _, step in good.records] == list(range(10))
    assert caplog.messages == ["recorder has failed (no quota) and gets no more numbers; metrics.jsonl has them all"]


def test_trackers_that_cannot_be_opened_are_a_warning(caplog):
    def opens():
        raise OSError("no network")

    trackers = Trackers(opens)
    for step in range(10):
        trackers.log({"loss": 0.0}, step)
    trackers.close(patience=1)
    assert caplog.messages == ["the trackers could not be opened (no network); metrics.jsonl has all numbers"]


def test_a_run_with_trackers_that_fail_is_the_one_without(trainer, caplog):
    plain = trainer("plain")
    folder = trainer.folder / "runs" / "tracked"
    folder.mkdir(parents=True)
    (folder / "anima-train").write_text("where TensorBoard's folder would be")
    tracked = trainer("tracked", monitoring={"tensorboard": True})
    assert tracked.losses == plain.losses
    assert all(torch.equal(tensor, tracked.weights[name]) for name, tensor in plain.weights.items())
    assert sum(text.startswith("the trackers could not be opened") for text in caplog.messages) == 1


def test_the_project_of_wandb_is_not_the_name_of_the_folder_of_tensorboard(tmp_path):
    monitoring = Monitoring(enable_wandb=True, wandb_tracker_name="portraits", wandb_run_name="third")
    PartialState()
    board, wandb = make_trackers(monitoring, tmp_path / "a run", offline=True)
    assert (wandb.run_name, wandb.init_kwargs["name"]) == ("portraits", "third")
    board.start()
    board.finish()
    assert list((tmp_path / "a run" / "anima-train").glob("events.out.tfevents*"))
    assert not (tmp_path / "a run" / "portraits").exists()
    assert open_trackers(False, monitoring, tmp_path, offline=True) == []
