"""The choice of settings that save memory: by the estimate, confirmed by a trial, the same when a run is resumed."""

import logging
import re
import sys

import pytest
import torch

from anima_train.config.config import Config
from anima_train.config.ladder import Rung, rungs
from anima_train.config.load import load_config
from anima_train.core.errors import ConfigError
from anima_train.data.buckets import Size
from anima_train.training import ladder as ladder_module
from anima_train.training import memory_check
from anima_train.training.ladder import GIB, Budget, Choice, device_budget
from anima_train.training.memory import MicroBatchShape
from tests.conftest import merge
from tests.training.test_memory import LIMITED

POLICY = "activation_checkpointing"
SHAPE = MicroBatchShape(1024, Size(1024, 1024), 1)
CONFIG = Config.model_construct()
RUNGS = [Rung(CONFIG, {}), *(Rung(CONFIG, {POLICY: policy}) for policy in ("selective", True, "offload"))]


def choice_for(gib, costs=(16.4, 11.2, 5.6, 5.2), is_cap=False):
    budget = Budget(round(gib * GIB), f"{gib} GiB", "a card", is_cap)
    costs = [round(cost * GIB) for cost in costs]
    return Choice("auto", SHAPE, RUNGS[: len(costs)], costs, budget, 0).chosen_for(budget)


# The choice


@pytest.mark.parametrize(("gib", "index"), [(32, 0), (16.4, 1), (12, 1), (11.2, 2), (8, 2), (5.6, 3), (4, 3)])
def test_the_first_rung_that_fits_is_chosen_else_that_of_least_memory(gib, index):
    """A twentieth of what is free is left."""
    choice = choice_for(gib)
    assert choice.index == index
    assert choice.fits == (gib > 4)


def test_the_choice_says_what_it_takes_and_what_did_not_fit():
    memory, reason = choice_for(8).lines
    assert memory == "memory: about 5.6 GiB (an estimate) for 1 image of 1024x1024 at once, of 8 GiB"
    assert reason == (
        'memory = "auto" sets activation_checkpointing = true (about 40 % more work); '
        'activation_checkpointing = "selective" would take 11.2 GiB'
    )
    assert choice_for(24).lines == ["memory: about 16.4 GiB (an estimate) for 1 image of 1024x1024 at once, of 24 GiB"]
    assert choice_for(4).lines[0].endswith("of 4 GiB; it may run out")


def test_common_cards_are_named_with_what_they_would_get():
    lines = choice_for(4).card_lines
    assert lines[1:] == [
        "  6 GiB: too small (5.2 GiB)",
        "  8 GiB: activation_checkpointing = true (5.6 GiB)",
        "  12 GiB: activation_checkpointing = true (5.6 GiB)",
        '  16 GiB: activation_checkpointing = "selective" (11.2 GiB)',
        "  24 GiB: the settings as they are written (16.4 GiB)",
        "  32 GiB: the settings as they are written (16.4 GiB)",
    ]


def test_the_next_rung_is_one_that_takes_less():
    choice = choice_for(32, costs=(16.0, 16.5, 5.6))
    assert choice.index == 0
    assert choice.next_rung().index == 2
    assert choice.next_rung().next_rung() is None


def test_a_repeatable_run_counts_on_all_of_the_device():
    """What is free changes from day to day, and so would the bits of a compiled step."""
    cpu = torch.device("cpu")
    assert device_budget(cpu, None, True) == device_budget(cpu, None, True)
    assert device_budget(cpu, None, False).num_bytes < device_budget(cpu, None, True).num_bytes
    assert device_budget(cpu, 0.5, False).num_bytes == GIB // 2
    assert device_budget(cpu, 1e6, False).num_bytes < 1e6 * GIB


# A run


def test_a_run_takes_what_fits_under_the_cap_says_so_and_trains_the_same(trainer, caplog):
    """The bits of an eager step do not depend on it."""
    changes = {"max_steps": 2, "micro_batch_size_per_gpu": 3}
    caplog.set_level(logging.INFO)
    whole = trainer("whole", **changes)
    assert whole.manifest["memory"] == {}
    (whole_cost,) = estimates(caplog)
    caplog.clear()
    capped = trainer("capped", max_memory_gib=0.9 * whole_cost, **changes)
    assert capped.manifest["memory"] == {POLICY: "selective"}
    assert 'memory = "auto" sets activation_checkpointing = "selective"' in caplog.text
    assert capped.losses == whole.losses
    assert all(torch.equal(tensor, whole.weights[name]) for name, tensor in capped.weights.items())
    assert POLICY not in (capped.path / "config.toml").read_text()


def estimates(caplog):
    """The estimates that were told, in GiB."""
    units = {"KiB": 2**-20, "MiB": 2**-10, "GiB": 1.0}
    words = [line.split() for line in caplog.messages if line.startswith("memory: about ")]
    return [float(number) * units[unit] for _, _, number, unit, *_ in words]


def test_a_cap_below_what_is_written_is_refused_with_both(trainer):
    with pytest.raises(ConfigError, match=r"max_memory_gib: found 1e-05, and 1 image of .* take about .* at least"):
        trainer(max_memory_gib=1e-5, **{POLICY: False})


@pytest.fixture
def full_memory(monkeypatch):
    """Lets memory run out in a step of blocks that keep more than this policy."""
    real = memory_check.compute_loss

    def limit(*too_much):
        def compute_loss(model, batch, loss):
            if model.training and current["policy"] in too_much:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB")
            return real(model, batch, loss)

        monkeypatch.setattr(memory_check, "compute_loss", compute_loss)

    current = {}
    build = ladder_module.build_model

    def build_model(run, *rest):
        current["policy"] = run.config.activation_checkpointing
        return build(run, *rest)

    monkeypatch.setattr(ladder_module, "build_model", build_model)
    return limit


def test_where_the_trial_runs_out_the_next_rung_is_taken(trainer, full_memory, caplog):
    whole = trainer("whole", max_steps=2)
    full_memory(False, "selective")
    caplog.set_level(logging.INFO)
    found = trainer("full", max_steps=2)
    assert found.manifest["memory"] == {POLICY: "offload"}  # of two blocks, one keeps as much as both with true
    assert "ran out in the trial with the settings as they are written; the next rung is tried" in caplog.text
    assert 'ran out in the trial with activation_checkpointing = "selective"' in caplog.text
    assert found.losses == whole.losses


def test_the_lora_that_a_run_begins_with_is_told_once_however_many_rungs_are_built(trainer, full_memory, caplog):
    adapter = {"init_from_existing": str(trainer("first", max_steps=1).path / "weights" / "first.safetensors")}
    whole = trainer("whole", max_steps=1, adapter=adapter)
    full_memory(False, "selective")
    caplog.clear()
    caplog.set_level(logging.INFO)
    found = trainer("second", max_steps=1, adapter=adapter)
    assert found.losses == whole.losses
    assert sum("begins with first.safetensors" in message for message in caplog.messages) == 1
    assert sum("the next rung is tried" in message for message in caplog.messages) > 1


@pytest.mark.slow
def test_a_resumed_run_begins_with_the_rung_that_it_had(trainer, full_memory):
    full_memory(False, "selective")
    changes = {"checkpoint_every_n_steps": 1, "run_name": "run"}
    trainer("run", max_steps=1, **changes)
    full_memory()  # all would fit now
    found = trainer("run", resume=True, max_steps=2, **changes)
    assert found.manifest["memory"] == {POLICY: "offload"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit a process's memory")
def test_memory_that_really_runs_out_is_answered_rung_by_rung_in_one_process(trainer, images_drawer, command, tmp_path):
    folder = images_drawer(tmp_path / "images", [(256, 256)] * 2)
    dataset = {"resolutions": [256], "directory": [{"path": str(folder), "num_repeats": 32}]}
    trainer("cached", dataset=dataset, max_steps=1)
    config = trainer.config("big", dataset=dataset, micro_batch_size_per_gpu=64)
    result = command([sys.executable, "-c", LIMITED, str(config), "250"])
    assert result.returncode == 6, result.stderr
    said = result.stderr + result.stdout
    rungs_tried = re.findall(r"memory ran out in the trial with (.+?); the next rung is tried", said)
    selective = f'{POLICY} = "selective"'
    assert rungs_tried == ["the settings as they are written", selective, f"{selective}, checkpointed_blocks = 1"]
    assert f'a trial before the first step with {POLICY} = "offload", as memory has chosen, with 64 images' in said


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_rung_of_least_memory_trains_as_the_first(trainer, kind):
    """Of "auto": swapped blocks, moments on the host and released gradients move no bit."""
    changes = {"max_steps": 2, "checkpoint_every_n_steps": 1, "gradient_clipping": 0.0}
    changes |= {"model": {"dtype": "bfloat16"}, "optimizer": {"type": "adamw_optimi", "lr": 1e-3}}
    changes |= {} if kind == "lora" else {"adapter": None}
    config = load_config(trainer.config(**changes)).config
    last = rungs(config, 2)[-1]
    assert last.settings["blocks_to_swap"] == 2
    assert ("optimizer.gradient_release" in last.settings) == (kind == "full")
    least = {key: value for key, value in last.settings.items() if "." not in key}
    least["optimizer"] = {key.split(".")[1]: value for key, value in last.settings.items() if "." in key}
    whole = trainer("whole", **changes)
    found = trainer("least", **merge(changes, least))
    assert found.losses == whole.losses
    assert all(torch.equal(tensor, whole.weights[name]) for name, tensor in found.weights.items())


@pytest.mark.slow
def test_a_resumed_run_keeps_what_its_results_depend_on(trainer):
    changes = {"run_name": "run", "checkpoint_every_n_steps": 1, "model": {"dtype": "bfloat16"}}
    low = trainer("run", max_steps=1, memory="low", **changes)
    assert low.manifest["memory"] == {POLICY: True, "model.transformer_dtype": "int8"}
    with pytest.raises(ConfigError, match=r'trained with model\.transformer_dtype = "int8", and now it would be the'):
        trainer("run", resume=True, max_steps=2, **changes)
    again = trainer("run", resume=True, max_steps=2, memory="fast", **changes)  # which has this rung, too
    assert again.manifest["memory"] == low.manifest["memory"]


def test_a_ladder_without_anything_to_set_is_told(trainer, caplog):
    caplog.set_level(logging.INFO)
    written = {POLICY: True, "blocks_to_swap": 0, "model": {"transformer_dtype": "float32"}, "max_steps": 1}
    trainer(memory="low", **written)
    assert 'memory = "low" has no effect, as all that it could set is written' in caplog.text
