"""Whole runs with each optimizer: it trains, saves, is resumed bit for bit, and is looked at without a trace."""

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file

from anima_train.core.errors import ConfigError, NumericError
from anima_train.core.random import stream
from anima_train.core.text_batch import TextContext
from anima_train.data.loader import Batch
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.objective.losses import Loss
from anima_train.objective.step import compute_loss
from anima_train.optim.groups import COMPONENTS, LearningRates, optimizer_groups
from anima_train.optim.optimizers import AnyOptimizer
from anima_train.optim.schedule_free import averages_in_place
from anima_train.training import train as train_module
from anima_train.training.build import build_optimizer, check_release
from tests.resuming import STATES, run_until

HALF_LORA = {"adapter": {"type": "lora", "rank": 4, "dtype": "bfloat16"}}
FULL = {"adapter": None, "model": {"dtype": "bfloat16"}}
RELEASED = {"gradient_release": True}
OPTIMIZERS = {
    "stochastic": {"type": "adamw_optimi", "lr": 1e-3, "rounding": "stochastic"},
    "8 bits": {"type": "AdamW8bit", "lr": 1e-3, "moments_device": "cpu"},
    "schedule_free": {"type": "schedule_free", "lr": 1e-2},
    "prodigy": {"type": "Prodigy", "lr": 1.0, "d0": 1e-3},
    "lion": {"type": "lion", "lr": 1e-4},
    "adafactor": {"type": "adafactor", "lr": 1e-3},
    "muon": {"type": "muon", "lr": 1e-3},
    "released": {"type": "adamw_optimi", "lr": 1e-3, **RELEASED},
    "released, 8 bits, stochastic": {"type": "adamw8bit", "lr": 1e-3, "rounding": "stochastic", **RELEASED},
}
QUICK = [("prodigy", "LoRA")]
CASES = [
    pytest.param(name, kind, marks=[] if (name, kind) in QUICK else pytest.mark.slow)
    for name in OPTIMIZERS
    for kind in ("LoRA", "full")
]
NO_CLIPPING = {"gradient_clipping": 0.0}


def changes(name, kind):
    return (HALF_LORA if kind == "LoRA" else FULL) | NO_CLIPPING | {"optimizer": OPTIMIZERS[name]}


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_run_is_resumed_bit_for_bit_whatever_was_looked_at(trainer, monkeypatch, name, kind):
    keys = changes(name, kind)
    whole = trainer("whole", **keys)
    looked_at = keys | {"save_every_n_steps": 1}
    run_until(trainer, 2, **looked_at)
    resumed = trainer("run", **STATES, **looked_at)
    assert resumed.losses == whole.losses
    assert all(torch.equal(tensor, resumed.weights[key]) for key, tensor in whole.weights.items())
    for key in ("grad_norm", "share_moved", "share_moved_in_run", "lr"):
        assert [line[key] for line in resumed.metrics] == [line[key] for line in whole.metrics]
    assert 0 < whole.metrics[-1]["share_moved_in_run"] <= 1
    assert ("effective_lr/mlp" in whole.metrics[0]) == (name == "prodigy")


def test_what_a_schedule_free_run_saves_is_its_average(trainer):
    keys = {"optimizer": {"type": "schedule_free", "lr": 1e-2}, "checkpoint_every_n_steps": 4, "keep_last": 2}
    run = trainer(**keys)
    folder = run.path / "checkpoints" / "step-000004"
    weights, state = (load_file(folder / f"{name}.safetensors") for name in ("weights", "optimizer"))
    assert len(run.weights) == len(weights)
    averages = [weights[name].lerp(state[f"{name}.z"], 1 - 1 / 0.9) for name in weights]
    left = list(run.weights.values())
    for average in averages:
        same = [index for index, saved in enumerate(left) if torch.equal(saved, average)]
        assert same
        left.pop(same[0])


def test_several_processes_do_not_release_gradients():
    check_release(True, 1)
    check_release(False, 2)
    with pytest.raises(ConfigError, match=r"gradient_release: excludes several processes \(there are 2\)"):
        check_release(True, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loss_of_a_batch_falls(name):
    shape = TransformerShape(num_blocks=1, width=48, head_dim=24, in_channels=16, context_width=32, adaln_lora_dim=8)
    model = MiniTrainDIT(shape)
    for key, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=stream(0, key)) * parameter.shape[1] ** -0.5
    model.to(torch.bfloat16)
    rates = LearningRates(dict.fromkeys(COMPONENTS, OPTIMIZERS[name]["lr"]))
    settings = TypeAdapter(AnyOptimizer).validate_python(OPTIMIZERS[name])
    optimizer, release = build_optimizer(settings, optimizer_groups(model.named_parameters(), rates, 0.0), 0)
    latents, noise = (torch.randn(4, 16, 1, 8, 8, generator=stream(0, what)) for what in ("latents", "noise"))
    context = TextContext(torch.randn(4, 8, 32, generator=stream(0, "context")).bfloat16(), 0)
    batch = Batch(latents, noise, torch.full((4,), 0.5), context, None, ())
    losses = []
    for step in range(60):
        for group in optimizer.param_groups:
            group["step_index"] = step
        if release is not None:
            release.begin(torch.tensor(False))
        loss = compute_loss(model, batch, Loss()).mean()
        loss.backward()
        if release is None:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    with averages_in_place(optimizer):
        last = float(compute_loss(model, batch, Loss()).mean().detach())
    assert last < 0.5 * losses[0]


@pytest.mark.slow
def test_updates_that_are_half_made_are_not_saved_as_a_state_before_them(trainer, monkeypatch):
    real = train_module.compute_loss
    monkeypatch.setattr(train_module, "compute_loss", lambda *arguments: real(*arguments) * torch.inf)
    with pytest.raises(NumericError, match=r"10 updates in a row skipped.* no state is saved"):
        trainer("run", max_steps=12, **changes("released", "full"))
    assert not (trainer.folder / "runs" / "run" / "checkpoints").exists()
