"""Kills at any moment lose no step beyond the last save, and change nothing in those that follow."""

import contextlib
import json
import logging
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anima_train.checkpoint.async_writer import MAX_WAITING
from anima_train.checkpoint.training_state import newest_state, saved_states
from anima_train.config.load import load_config
from anima_train.training.train import run_training

NUM_KILLS = 200
BEHIND = 1 + MAX_WAITING + 1  # states not there yet: that of the last step, those that wait, and the one being written
# A server that has imported everything forks the processes, as imports would be most of the time.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__, "anima_train.training.train"])


def work(config):
    """Train in a process of its own, which leaves no output."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        torch.set_num_threads(1)
        run_training(load_config(Path(config)))


def num_lines(path):
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
def test_two_hundred_kills_lose_nothing_that_was_saved(trainer, caplog):
    trainer()  # fills the cache
    keys = {"max_steps": 100_000, "checkpoint_every_n_steps": 1, "adapter": {"dropout": 0.2}}
    config = str(trainer.config("killed", **keys))
    run = trainer.folder / "runs" / "killed"
    moments = random.Random(0)
    newest, killed_while_stepping = 0, 0
    for _ in range(NUM_KILLS):
        process = PROCESSES.Process(target=work, args=(config,))
        process.start()
        if moments.random() < 0.2:  # while it starts
            time.sleep(moments.uniform(0, 1))
        else:
            deadline = time.monotonic() + 60
            ahead = moments.choice([0, BEHIND, BEHIND])  # at its first step, or when a state more must be there
            while num_lines(run / "metrics.jsonl") <= newest + ahead and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.2))
            killed_while_stepping += 1
        assert process.is_alive()
        logged = num_lines(run / "metrics.jsonl")
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = newest_state(run / "checkpoints")
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]  # of a damaged state
        step = 0 if found is None else found.manifest.step
        assert step >= newest
        assert step >= logged - BEHIND
        assert len(saved_states(run / "checkpoints")) <= 3
        newest = step
    assert killed_while_stepping > NUM_KILLS / 2
    assert newest > killed_while_stepping / 2  # the run came on

    # The state, and what was logged on the way to it, is that of a run that was never killed.
    process = PROCESSES.Process(target=work, args=(config,))
    process.start()
    while num_lines(run / "metrics.jsonl") <= newest:
        assert process.is_alive()
        time.sleep(0.002)
    process.kill()
    process.join()
    straight = trainer("straight", **keys | {"max_steps": newest, "checkpoint_every_n_steps": newest})
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[:newest]]
    assert [line["loss"] for line in lines] == straight.losses
    final = run / "checkpoints" / f"step-{newest:06d}"
    if final.exists():
        for name in ("weights", "optimizer"):
            expected = load_file(straight.path / "checkpoints" / final.name / f"{name}.safetensors")
            assert all(
                torch.equal(tensor, expected[key]) for key, tensor in load_file(final / f"{name}.safetensors").items()
            )
