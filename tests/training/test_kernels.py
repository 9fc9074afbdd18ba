"""Runs compute attention with the kernel that they name, and with deterministic kernels where that is asked for."""

import logging
import os

import pytest
import torch

from anima_train.core.determinism import CUBLAS_VARIABLE, PRICE
from anima_train.core.errors import ConfigError
from anima_train.training import train as train_module


@pytest.fixture
def seen(monkeypatch):
    """The state of torch's switches at each step."""
    found = []
    real = train_module.train_step

    def spy(*arguments):
        found.append(
            {
                "deterministic": torch.are_deterministic_algorithms_enabled(),
                "warns only": torch.is_deterministic_algorithms_warn_only_enabled(),
                "cudnn": torch.backends.cudnn.deterministic,
                "cublas": os.environ.get(CUBLAS_VARIABLE),
                "flash": torch.backends.cuda.flash_sdp_enabled(),
                "math": torch.backends.cuda.math_sdp_enabled(),
            }
        )
        return real(*arguments)

    monkeypatch.setattr(train_module, "train_step", spy)
    return found


def lines(caplog, start):
    return [text for record in caplog.records if (text := record.getMessage()).startswith(start)]


def test_a_deterministic_run_has_its_switches_on_for_as_long_as_it_runs(trainer, seen, caplog, monkeypatch):
    monkeypatch.delenv(CUBLAS_VARIABLE, raising=False)
    with caplog.at_level(logging.INFO, logger="anima_train"):
        run = trainer("deterministic", deterministic=True)
    assert len(seen) == 4
    for switches in seen:
        assert (switches["deterministic"], switches["warns only"], switches["cudnn"]) == (True, False, True)
        assert switches["cublas"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic
    assert CUBLAS_VARIABLE not in os.environ
    assert lines(caplog, "deterministic: ") == [PRICE]
    caplog.clear()

    with caplog.at_level(logging.INFO, logger="anima_train"):
        other = trainer("other")
    assert not any(switches["deterministic"] for switches in seen[4:])
    assert lines(caplog, "deterministic: ") == []
    assert run.losses == other.losses
    assert run.weights.keys() == other.weights.keys()
    assert all(torch.equal(run.weights[name], other.weights[name]) for name in run.weights)


@pytest.mark.parametrize("changes", [{"adapter": None}, {"model": {"llm_adapter_lr": 1e-4}, "huber_delta": 0.1}])
def test_no_step_has_an_operation_without_a_deterministic_form(changes, trainer):
    """On the CPU; on a GPU the marked tests look."""
    changes = {"optimizer": {"lr": 1e-4}, "uncond_fraction": 0.5, "ema": {"decay": 0.9}, **changes}
    assert len(trainer("run", deterministic=True, **changes).losses) == 4


def test_the_kernel_of_attention_is_told_used_and_in_the_manifest(trainer, seen, caplog):
    with caplog.at_level(logging.INFO, logger="anima_train"):
        run = trainer("flash")
    assert lines(caplog, "attention: ") == ["attention: flash, the first that works here"]
    assert run.manifest["attention"] == "flash"
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="anima_train"):
        by_math = trainer("math", attention="math")
    assert lines(caplog, "attention: ") == ["attention: math, as the configuration says"]
    assert by_math.manifest["attention"] == "math"
    assert [switches["flash"] for switches in seen] == [True] * 4 + [False] * 4
    assert torch.backends.cuda.flash_sdp_enabled()
    assert by_math.losses == pytest.approx(run.losses, rel=1e-4)


def test_a_kernel_that_does_not_work_here_ends_the_run_before_the_model_is_loaded(trainer, seen):
    with pytest.raises(ConfigError, match=r'found "cudnn", which does not work on the CPU .*; use "flash", "math"'):
        trainer("run", attention="cudnn")
    assert seen == []


def test_the_kernel_and_determinism_may_change_when_a_run_is_resumed(trainer):
    trainer("run", attention="math", checkpoint_every_n_steps=2, max_steps=2)
    resumed = trainer("run", resume=True, deterministic=True, checkpoint_every_n_steps=2, max_steps=4)
    assert [line["step"] for line in resumed.metrics] == [1, 2, 3, 4]
    assert resumed.manifest["attention"] == "flash"
    assert resumed.losses == pytest.approx(trainer("whole").losses, rel=1e-4)


@pytest.mark.gpu
def test_resume_is_bitwise_on_a_gpu_with_deterministic_kernels(trainer, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    changes = {"deterministic": True, "model": {"dtype": "bfloat16"}, "checkpoint_every_n_steps": 2}
    whole, again = trainer("whole", **changes), trainer("again", **changes)
    trainer("parts", **{**changes, "max_steps": 2})
    parts = trainer("parts", resume=True, **changes)
    assert whole.losses == again.losses == parts.losses
    for name, tensor in whole.weights.items():
        assert torch.equal(again.weights[name], tensor), name
        assert torch.equal(parts.weights[name], tensor), name


@pytest.mark.gpu
@pytest.mark.parametrize("adapter", [{"type": "lora", "rank": 4}, None], ids=["lora", "full"])
def test_a_gpu_trains_as_the_cpu_does(adapter, trainer, monkeypatch, error):
    changes = {"adapter": adapter, "optimizer": {"lr": 1e-4}, "deterministic": True}
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    on_cpu = trainer("cpu", **changes)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    on_gpu = trainer("gpu", **changes)
    assert on_gpu.losses == pytest.approx(on_cpu.losses, rel=1e-3)
    for line, expected in zip(on_gpu.metrics, on_cpu.metrics, strict=True):
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)
    # Adam's first steps are lr times a sign, so that one of a gradient near 0 may differ: in all, few do.
    for name, tensor in on_cpu.weights.items():
        assert error(on_gpu.weights[name], tensor) < 0.05 or not tensor.any(), name
