"""Several processes: one that fails ends all and says why; they start from the same facts, or not at all."""

import os
import sys
import time
from types import SimpleNamespace

import pytest

from anima_train.config.load import load_config
from anima_train.core.errors import Interrupted, UserError
from anima_train.distributed.collectives import broadcast_from_main
from anima_train.training.build import plan_run
from anima_train.training.prefetch import rank_steps
from anima_train.training.prepare import scan_all

LIMIT = 30.0  # seconds from the fault to the end of all processes
KILL = 30.0  # seconds after which the launcher kills a process that takes no notice of SIGTERM
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
ACCELERATE = (
    "-m", "accelerate.commands.launch", "--multi_gpu", "--mixed_precision", "no", "--num_machines", "1",
    "--dynamo_backend", "no", "--main_process_port", "0", "--num_processes",
)  # fmt: skip

# A program that has nothing to do but to fail: argument 1 on the process that is argument 2, on all if that is absent.
PROGRAM = """
import os, signal, sys, time
from datetime import timedelta
from accelerate import Accelerator, InitProcessGroupKwargs
from anima_train.core.errors import DataError
from anima_train.distributed import failures
from anima_train.distributed.collectives import any_rank, patient_barrier, process_group

failures.HEAD_START = 3.0

def user():
    raise DataError("cats/a.png: is gone")

def bug():
    raise RuntimeError("a fault of ours")

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def leave():
    sys.exit(7)

def stop():
    os.kill(os.getpid(), signal.SIGSTOP)

def wait():
    time.sleep(10.0)

def work():
    accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=6))])
    with process_group(accelerator):
        patient_barrier(accelerator)
        if accelerator.process_index == int((*sys.argv, accelerator.process_index)[2]):
            globals()[sys.argv[1]]()
        if sys.argv[1] == "wait":
            patient_barrier(accelerator)
        print(any_rank(accelerator, [accelerator.is_main_process, False]), flush=True)

failures.run_program(work)
"""

# `anima-train`, something in it changed first, on some process or on all.
SCRIPT = """
import ctypes, json, os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import anima_train.config.load
from anima_train.cli.main import train_main
from anima_train.core.errors import ConfigError, DataError
from anima_train.data.loader import CachedData
from anima_train.run import accelerator
from anima_train.training import context, prepare, saving, setup, tasks, train

RANK, FOLDER = int(os.environ["RANK"]), Path(__file__).parent

def fault(act):
    def call(*arguments, **keys):
        with open(FOLDER / "faults.txt", "a") as file:
            file.write(f"{time.time()}\\n")
        act()
    return call

def third_time(act, real):
    left = [None] * 2
    def call(*arguments):
        return left.pop() or real(*arguments) if left else fault(act)()
    return call

def user():
    raise DataError("cats/a.png: is gone")

def config():
    raise ConfigError("run.toml: seed: is wrong")

def bug():
    raise RuntimeError("a fault of ours")

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def stop():
    os.kill(os.getpid(), signal.SIGSTOP)

def wait():
    while True:  # SIGTERM wakes it, and no exception reaches it, as in NCCL
        ctypes.CDLL(None).sleep(600)

def in_step(act):
    train.compute_loss = third_time(act, train.compute_loss)

def in_loader(act):
    CachedData.training_batch = third_time(act, CachedData.training_batch)

def before(act):
    anima_train.config.load.load_config = fault(act)

def at(name, act):
    module = next(module for module in (saving, tasks, prepare, setup) if hasattr(module, name))
    setattr(module, name, fault(act))

def slowly(name):
    module = next(module for module in (context, prepare, saving, setup, tasks, train) if hasattr(module, name))
    real = getattr(module, name)
    def call(*arguments, **keys):
        print(f"slow: {name}", flush=True)
        time.sleep(16.0)
        return real(*arguments, **keys)
    setattr(module, name, call)

"""


@pytest.fixture
def launch(trainer, command, monkeypatch):
    """Trains on several processes after a change, which is Python; returns the result."""
    monkeypatch.setenv("PYTHONPATH", os.getcwd())

    def run(change, number=2, launcher=TORCHRUN, name="run", max_steps=2000, **keys):
        script = trainer.folder / "script.py"
        script.write_text(f"{SCRIPT}\n{change}\ntrain_main()\n")
        config = trainer.config(name, max_steps=max_steps, **keys)
        return command([sys.executable, *launcher, str(number), str(script), str(config)])

    return run


@pytest.fixture
def program(tmp_path, command, monkeypatch):
    """Runs PROGRAM on several processes; returns the result."""
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(*arguments, number=2):
        return command([sys.executable, *TORCHRUN, str(number), str(tmp_path / "program.py"), *arguments])

    return run


def seconds_since_fault(trainer):
    return time.time() - float((trainer.folder / "faults.txt").read_text().split()[0])


def messages(result):
    """The lines that speak of errors, without those of the launcher's own traceback, which comes last."""
    ours = result.stderr.partition('Traceback (most recent call last):\n  File "<frozen runpy>"')[0]
    starts = ("error", "Traceback", "[rank", "RuntimeError")
    return [line for line in ours.splitlines() if line.startswith(starts)]


def root_cause(result):
    """What `torchrun` names as the first failure: its process, exit code and text."""
    lines = result.stderr.split("Root Cause")[1].splitlines()
    facts = dict(line.strip().split(":", 1) for line in lines if ":" in line)
    return int(facts["rank      "].split()[0]), int(facts["exitcode  "].split()[0]), facts["traceback "].strip()


GONE = "cats/a.png: is gone"
ENDED = "another process has ended"
LATE = "no answer from another process: it hangs, or the network between them is gone"


@pytest.mark.parametrize(
    "arguments",
    [
        ("user", "1"),
        pytest.param(("user",), marks=pytest.mark.slow),  # on all at once
    ],
)
def test_a_mistake_is_said_once_and_is_what_the_launcher_names(program, arguments):
    result = program(*arguments)
    rank = int((*arguments, "0")[1])
    assert messages(result) == [f"error (process {rank}): {GONE}"], result.stderr
    assert root_cause(result) == (rank, 3, f"error: {GONE}")


@pytest.mark.parametrize(
    ("act", "faulty", "code"),
    [("kill", 0, -9), *(pytest.param(*values, marks=pytest.mark.slow) for values in [("leave", 1, 7), ("bug", 0, 1)])],
)
def test_however_a_process_ends_the_others_end_as_well_and_without_a_traceback(program, act, faulty, code):
    result = program(act, str(faulty))
    assert root_cause(result)[:2] == (faulty, code), result.stderr
    last = f"error (process {faulty}): RuntimeError: a fault of ours"
    own = ["Traceback (most recent call last):", "RuntimeError: a fault of ours", last] if act == "bug" else []
    assert messages(result) == own, result.stderr
    followers = [line for line in result.stderr.splitlines() if line.startswith("stopped")]
    assert set(followers) <= {f"stopped (process {1 - faulty}): {ENDED}"}


@pytest.mark.slow
def test_a_patient_barrier_outlives_the_timeout_of_the_process_group(program):
    result = program("wait", "1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.replace("\n", "") == "[True, False]" * 2  # of both, at the same moment


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run_at_the_timeout(program):
    started = time.time()
    result = program("stop", "0")
    (line,) = messages(result)
    assert line.startswith(f"error (process 1): {LATE} (")
    assert root_cause(result)[:2] == (1, 1)
    assert time.time() - started < LIMIT + KILL


# The training


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "faulty", "options"),
    [
        ("if RANK == 0: in_step(user)", 0, {}),
        ("if RANK == 2: in_step(user)", 2, {"number": 3}),
        ("if RANK == 1: in_loader(user)", 1, {"launcher": ACCELERATE}),
        ("if RANK == 0: at('scan_all', user)", 0, {}),
        ("if RANK == 1: at('fill_cache', user)", 1, {}),
        ("if RANK == 0: at('save_state', user)", 0, {"checkpoint_every_n_steps": 2}),
        ("in_step(wait if RANK == 0 else user)", 1, {}),
    ],
)
def test_a_process_that_fails_ends_all_with_one_message(launch, trainer, change, faulty, options):
    result = launch(change, **options)
    assert seconds_since_fault(trainer) < (LIMIT + KILL if "wait" in change else LIMIT)
    assert messages(result) == [f"error (process {faulty}): {GONE}"], result.stderr
    assert root_cause(result) == (faulty, 3, f"error: {GONE}")
    assert result.returncode == 1  # the launcher's own


@pytest.mark.slow
def test_a_fault_of_ours_has_one_traceback(launch, trainer, pictures):
    held = {"name": "held", "config": {"resolutions": [96], "directory": [{"path": str(pictures)}]}}
    result = launch("if RANK == 1: at('evaluate', bug)", eval_datasets=[held], eval_before_first_step=True)
    assert seconds_since_fault(trainer) < LIMIT
    last = "error (process 1): RuntimeError: a fault of ours"
    first = "Traceback (most recent call last):"
    assert messages(result) == [first, "RuntimeError: a fault of ours", last], result.stderr
    assert root_cause(result) == (1, 1, first)


@pytest.mark.slow
@pytest.mark.parametrize("faulty", [0, 2])
def test_a_process_that_is_killed_ends_all_and_the_launcher_names_it(launch, trainer, faulty):
    result = launch(f"if RANK == {faulty}: in_step(kill)", number=3)
    assert seconds_since_fault(trainer) < LIMIT
    assert messages(result) == [], result.stderr
    rank, code, text = root_cause(result)
    assert (rank, code) == (faulty, -9)
    assert text.startswith("Signal 9 (SIGKILL) received")


@pytest.mark.slow
def test_a_process_that_hangs_in_a_step_ends_the_training_at_the_timeout(launch, trainer):
    change = "accelerator.TIMEOUT = timedelta(seconds=20)\nif RANK == 1: in_step(stop)"
    result = launch(change)
    assert seconds_since_fault(trainer) < 20.0 + LIMIT + KILL
    (line,) = messages(result)
    assert line.startswith(f"error (process 0): {LATE} (")


@pytest.mark.slow
def test_long_work_of_one_process_does_not_fall_under_the_timeout(launch):
    change = """
accelerator.TIMEOUT = timedelta(seconds=12)
for name in (("scan_all", "find_resume_point", "save_weights"), ("fill_cache", "load_trained"))[RANK]: slowly(name)
if RANK == 0:
    real = setup.Previews.draw
    def draw(*arguments):
        print("slow: draw", flush=True)
        time.sleep(16.0)
        return real(*arguments)
    setup.Previews.draw = draw
"""
    sampling = {"prompts": ["a cat"], "steps": 1, "width": 64, "height": 64, "before_first_step": False}
    result = launch(change, max_steps=2, sampling=sampling | {"every_n_steps": 1})
    assert result.returncode == 0, result.stderr
    slow = {line for line in result.stdout.splitlines() if line.startswith("slow: ")}
    names = ("scan_all", "find_resume_point", "save_weights", "fill_cache", "load_trained", "draw")
    assert slow == {f"slow: {name}" for name in names}


@pytest.mark.slow
def test_what_is_wrong_with_a_config_is_said_once(launch, trainer):
    result = launch("before(config)")
    assert seconds_since_fault(trainer) < LIMIT
    assert messages(result) == ["error (process 0): run.toml: seed: is wrong"]
    assert "exitcode  : 2 " in result.stderr


@pytest.mark.slow
def test_a_signal_to_one_process_before_the_first_step_stops_all(launch, trainer):
    result = launch("if RANK == 1: at('fill_cache', lambda: os.kill(os.getpid(), signal.SIGTERM))")
    assert seconds_since_fault(trainer) < LIMIT
    assert messages(result) == []
    assert root_cause(result) == (1, 143, "stopped: before the first step; what is in the cache stays")


# What they start from


@pytest.mark.slow
def test_another_dataset_on_one_process_is_refused_by_all(launch, trainer, images_drawer):
    """The same relative path leads elsewhere, as it may on two machines."""
    for rank in (0, 1):
        images_drawer(trainer.folder / f"rank{rank}" / "images", [(96, 96), (96, 96)])
    (trainer.folder / "rank1" / "images" / "image1.txt").write_text("another caption")
    result = launch('os.chdir(FOLDER / f"rank{RANK}")', dataset={"directory": [{"path": "images"}]})
    first, second = messages(result)
    assert first.startswith("error (process 0): process 1 differs from process 0 in dataset train: 2 samples (sha256 ")
    assert "a folder was changed while the run started, or it is not the same on all machines" in second
    assert "exitcode  : 3 " in result.stderr
    assert not (trainer.folder / "runs" / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_another_configuration_on_one_process_is_refused_by_all(launch, trainer):
    result = launch('if RANK == 1: sys.argv += ["--set", "optimizer.lr=2e-3"]')
    first, second = messages(result)
    assert first == "error (process 0): process 1 differs from process 0 in optimizer.lr: 0.002 there, 0.001 here"
    assert second.endswith("all processes must get the same configuration: copy the files to all machines")
    assert "exitcode  : 2 " in result.stderr


@pytest.mark.slow
def test_only_process_0_writes_and_all_take_its_name_of_the_run_and_other_versions_are_noted(launch, trainer):
    """Without `run_name` the clock names the run: here it is an hour later on one process."""
    change = """
WRITTEN = open(FOLDER / f"written{RANK}.txt", "w", buffering=1)

def note(event, arguments):
    changes = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.symlink", "os.link", "os.chmod"}
    if event in changes or event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
        path = str(arguments[0])
        if str(FOLDER / "runs") in path:
            WRITTEN.write(f"{event} {path}\\n")

sys.addaudithook(note)
if RANK == 1:
    from datetime import datetime, timedelta
    from anima_train.config import load
    from anima_train.distributed import consistency
    class Later(datetime):
        @classmethod
        def now(cls): return datetime.now() + timedelta(hours=1)
    load.datetime = Later
    consistency.__version__ = "0.0.1"
"""
    keys = {
        "checkpoint_every_n_steps": 2,
        "save_every_n_steps": 2,
        "sampling": {"prompts": ["a cat"], "steps": 1, "width": 64, "height": 64},
    }
    result = launch(change, max_steps=4, name="named", run_name=None, **keys)
    assert result.returncode == 0, result.stderr
    (run,) = (trainer.folder / "runs").iterdir()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
    assert (trainer.folder / "written1.txt").read_text() == ""
    assert len((trainer.folder / "written0.txt").read_text().splitlines()) > 20
    note = "process 1 differs from process 0 in anima-train: 0.0.1 there"
    assert result.stdout.count(note) == 1
    assert (run / "warnings.jsonl").read_text().count(note) == 1


def test_every_process_has_the_same_steps_and_none_loses_a_micro_batch(trainer):
    loaded = load_config(trainer.config("three", max_steps=20))
    samples = scan_all((loaded.train, *loaded.evals), loaded.config.seed, write=False)["train"].samples
    plan, schedule = plan_run(loaded.config, samples, 3)
    shares = [list(rank_steps(plan, schedule, 0, rank, 3)) for rank in range(3)]
    meetings = [[(step.index, step.epoch, len(step.micro_batches)) for step in share] for share in shares]
    assert meetings[0] == meetings[1] == meetings[2]
    assert [index for index, *_ in meetings[0]] == list(range(20))
    for steps in zip(*shares, strict=True):
        mine = [each for step in steps for each in step.micro_batches]
        assert len({each.address for each in mine}) == len(mine)
        assert sum(len(each.micro_batch.refs) for each in mine if not each.is_padding) == steps[0].planned.num_samples


def kinds_of(kind):
    """The kinds of an error, of which a process may raise any where the others wait for it."""
    return [kind, *(each for below in kind.__subclasses__() for each in kinds_of(below))]


@pytest.mark.parametrize("kind", [kind for kind in kinds_of(UserError) if kind is not Interrupted])
def test_what_the_main_process_refuses_is_raised_again_as_what_it_is(kind):
    def refuse():
        raise kind(["a.png: is gone", "b.png: too"])

    with pytest.raises(kind) as caught:
        broadcast_from_main(SimpleNamespace(is_main_process=True, num_processes=1), refuse)
    assert type(caught.value) is kind
    assert caught.value.problems == ["a.png: is gone", "b.png: too"]
