"""Signals and files stop a run in good order, and it goes on bitwise as if nothing had happened."""

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from anima_train.checkpoint.training_state import newest_state
from anima_train.core.errors import ConfigError, Interrupted
from anima_train.distributed.signals import NOTICE, SignalHandler, StopRequest
from anima_train.training import train as train_module

REPO = Path(__file__).parents[2]
STEPS = 60
LONG_STEP = """
import sys, time
from anima_train.cli.main import train_main
from anima_train.training import metrics, train

real, number = train.compute_loss, 0

def long_in_the_third_step(*arguments):
    global number
    number += 1
    if number == 3:
        print("in the third step", flush=True)
        time.sleep(600)
    return real(*arguments)

train.compute_loss = long_in_the_third_step
train_main()
"""
STOPS = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
STUCK = """
import hashlib
from pathlib import Path
from anima_train.distributed.signals import SignalHandler

with SignalHandler(Path()) as signals:
    signals.is_stepping = True
    print("stuck", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes in C, where no handler of Python runs
"""
STATES = {"checkpoint_every_n_steps": 1, "adapter": {"dropout": 0.2}}


def start(config, processes=1, script=None, **streams):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(REPO)}
    launch = (
        ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"] if processes > 1 else []
    )
    program = ["-m", "anima_train"] if script is None else ["-c", script]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": heed_hang_ups, **streams}
    return subprocess.Popen(
        [sys.executable, *launch, *program, str(config)], cwd=REPO, env=environment, text=True,
        start_new_session=True, **streams,
    )  # fmt: skip


def heed_hang_ups():
    """Heed SIGHUP, where these tests run under nohup, too."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def take_terminal():
    """Make stdin the terminal of this process, which it is told of when it is closed."""
    heed_hang_ups()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def in_a_long_step(trainer):
    """Starts a run; returns its process, which is in the third step for minutes."""
    processes = []

    def run(script=LONG_STEP):
        processes.append(process := start(trainer.config("run", **STATES), script=script))
        while "in the third step" not in (line := process.stdout.readline()):
            assert line, process.communicate()
        wait_for((trainer.folder / "runs" / "run" / "checkpoints" / "step-000002").exists, process)  # a thread makes it
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def first_words(process):
    """What a process says on stderr, until it says that it is stopping."""
    said = ""
    while "stopping" not in said:
        said += (line := process.stderr.readline())
        assert line, said
    return said


def num_lines(path):
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), *((name, 143) for name in STOPS)])
def test_each_signal_asks_for_a_state_and_the_end(tmp_path, name, code):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # these tests may run under nohup
    try:
        with SignalHandler(tmp_path) as signals:
            signals.is_stepping = True
            assert signals.requested(Accelerator(cpu=True)) == StopRequest(weights=False, state=False, exit_code=None)
            signal.raise_signal(number)
            assert signals.requested(Accelerator(cpu=True)) == StopRequest(weights=True, state=True, exit_code=code)
    finally:
        signal.signal(number, before)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGXCPU", 143)])
def test_a_signal_saves_after_the_step_and_resume_is_bitwise(trainer, name, code):
    keys = {"max_steps": STEPS, "adapter": {"dropout": 0.2}}
    whole = trainer("whole", **keys)
    process = start(trainer.config("stopped", **keys))
    run = trainer.folder / "runs" / "stopped"
    wait_for(lambda: num_lines(run / "metrics.jsonl") >= 3, process)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    done = num_lines(run / "metrics.jsonl")
    assert "stopping after this step; Ctrl-C stops at once" in errors
    assert f"stopped: after step {done}; resume with the same command" in errors
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{done:06d}"]
    assert (run / "weights" / f"stopped-s{done:06d}.safetensors").exists()
    resumed = trainer("stopped", resume=True, **keys)
    assert resumed.losses == whole.losses
    assert all(torch.equal(tensor, resumed.weights[key]) for key, tensor in whole.weights.items())


def read_waiting(terminal):
    """Read what a terminal has to show now; not in a thread, which would hold it open."""
    while select.select([terminal], [], [], 0)[0]:
        os.read(terminal, 4096)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_terminal_that_is_closed_saves_as_sigterm_does_although_nothing_can_be_written_any_more(trainer, processes):
    master, slave = pty.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
    process = start(trainer.config("run", max_steps=2000), processes, preexec_fn=take_terminal, **streams)
    os.close(slave)
    run = trainer.folder / "runs" / "run"
    deadline = time.monotonic() + 120
    while num_lines(run / "metrics.jsonl") < 3:
        read_waiting(master)
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.close(master)
    assert process.wait(timeout=120) == (143 if processes == 1 else 1)  # 1 is the launcher's
    done = num_lines(run / "metrics.jsonl")
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{done:06d}"]
    assert (run / "weights" / f"run-s{done:06d}.safetensors").exists()


def test_a_second_ctrl_c_ends_a_process_that_is_in_c_for_long():
    process = start("unused", script=STUCK)
    assert process.stdout.readline() == "stuck\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)  # two that come together are one
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=10)
    assert output == ""
    # The first one may have come before it was in C.
    assert errors.removeprefix(f"\n{NOTICE}\n") == "\nstopped: at once; what was saved before is whole\n"
    assert process.returncode == 130


def test_under_nohup_a_hang_up_is_not_heard(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalHandler(tmp_path) as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def interrupt_twice(process):
    """Press Ctrl-C twice; returns what the process says after the second time, which must be its end."""
    process.send_signal(signal.SIGINT)
    assert "stopping after this step; Ctrl-C stops at once" in first_words(process)
    process.send_signal(signal.SIGINT)
    return process.communicate(timeout=30)[1]


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once_and_the_saved_states_are_whole(trainer, in_a_long_step):
    process = in_a_long_step()
    errors = interrupt_twice(process)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    run = trainer.folder / "runs" / "run"
    assert newest_state(run / "checkpoints").manifest.step == 2
    assert trainer("run", **STATES).losses == trainer("whole", **STATES).losses


@pytest.mark.slow
def test_a_second_ctrl_c_waits_for_no_tracker(in_a_long_step):
    stalled = LONG_STEP.replace("\ntrain_main()", "\nmetrics.open_trackers = lambda *_: time.sleep(600)\ntrain_main()")
    process = in_a_long_step(stalled)
    interrupt_twice(process)
    assert process.returncode == 130


@pytest.mark.slow
def test_a_run_in_which_a_process_trains_is_refused_until_that_is_killed(trainer, in_a_long_step):
    process = in_a_long_step()
    metrics = trainer.folder / "runs" / "run" / "metrics.jsonl"
    before = metrics.read_text()
    for resume in (False, True):
        with pytest.raises(ConfigError, match="run: another process is training in this folder"):
            trainer("run", resume=resume, **STATES)
    assert metrics.read_text() == before
    process.kill()
    process.wait()
    assert len(trainer("run", **STATES).losses) == 4


def test_the_file_save_saves_and_goes_on_and_save_quit_stops(trainer, monkeypatch):
    keys = {"max_steps": 6}
    whole = trainer("whole", **keys)
    folder = trainer.folder / "runs" / "asked"
    real = train_module.compute_loss
    number = 0

    def asking(*arguments):
        nonlocal number
        number += 1
        if number in (2, 4):
            (folder / ("save" if number == 2 else "save_quit")).write_text("")
        return real(*arguments)

    monkeypatch.setattr(train_module, "compute_loss", asking)
    with pytest.raises(Interrupted, match="after step 4") as stopped:
        trainer("asked", **keys)
    assert stopped.value.exit_code == 0
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    assert not (folder / "save").exists()
    assert not (folder / "save_quit").exists()
    assert trainer("asked", resume=True, **keys).losses == whole.losses


@pytest.mark.slow
def test_a_signal_on_one_rank_saves_the_same_step_on_all(trainer):
    process = start(trainer.config("two", max_steps=2000), processes=2)
    run = trainer.folder / "runs" / "two"
    wait_for(lambda: num_lines(run / "metrics.jsonl") >= 3, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    done = num_lines(run / "metrics.jsonl")
    assert f"stopped: after step {done}" in errors
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{done:06d}"]


@pytest.mark.slow
def test_before_the_first_step_a_signal_stops_at_once_and_the_cache_stays(trainer, images_drawer, tmp_path):
    images = images_drawer(tmp_path / "many", [(96, 96)] * 40)
    config = trainer.config("early", dataset={"directory": [{"path": str(images)}]})
    process = start(config)
    latents = images / ".anima_cache" / "latent"
    wait_for(lambda: len(list(latents.glob("??/*.safetensors"))) >= 3, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "stopped: before the first step; what is in the cache stays" in errors
    assert len(trainer("early", dataset={"directory": [{"path": str(images)}]}).losses) == 4
