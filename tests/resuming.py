"""Runs that are cut off and resumed, and the comparison of what they leave."""

import pytest
import torch

from anima_train.training import train as train_module

STATES = {"checkpoint_every_n_steps": 1, "keep_last": 20}
RANDOM = {"adapter": {"dropout": 0.2}, "uncond_fraction": 0.3}
TIMED = ("seconds", "images_per_second", "memory_bytes")


def run_until(trainer, step, name="run", **changes):
    """A run that fails in the micro-batch after `step`, as after a power cut."""
    real, number = train_module.compute_loss, 0

    def failing(*arguments):
        nonlocal number
        number += 1
        if number > step:
            raise ZeroDivisionError
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "compute_loss", failing)
        with pytest.raises(ZeroDivisionError):
            trainer(name, **STATES | changes)
    return trainer.folder / "runs" / name


def numbers(run):
    """What a run logged at its steps, without what depends on the machine."""
    return [{key: value for key, value in line.items() if key not in TIMED} for line in run.metrics]


def same(first, second):
    """True for runs with the same losses and the same final weights."""
    assert second.losses == first.losses
    assert second.weights.keys() == first.weights.keys()
    assert all(torch.equal(tensor, second.weights[key]) for key, tensor in first.weights.items())
    return True


def states(run):
    """The names of the training states that a run has kept."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())
