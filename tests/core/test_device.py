"""The device is one that is there, and is described as it is."""

import os

import psutil
import pytest
import torch

from anima_train.core.device import choose_device, describe_device


def test_the_device_can_hold_a_tensor(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    device = choose_device()
    assert torch.zeros(1, device=device).device.type == device.type
    assert (device.type == "cpu") == (not torch.accelerator.is_available())


@pytest.mark.parametrize("value", ["1", "true", "TRUE", "yes", "on"])
def test_accelerate_can_ask_for_the_cpu(value, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", value)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    assert choose_device().type == "cpu"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    assert choose_device().type == "cuda"


def test_a_cpu_is_named_with_its_memory_and_that_it_is_slow():
    line = describe_device(torch.device("cpu"), torch.bfloat16)
    gib = psutil.virtual_memory().total / 2**30
    assert line.startswith(f"device: CPU with {os.cpu_count()} core")
    assert f"{gib:.1f} GiB, bfloat16; " in line
    assert line.endswith("a model of 2 billion parameters is slow here, a GPU is what it needs")


@pytest.mark.gpu
def test_a_gpu_is_named():
    device = torch.device("cuda", 0)
    line = describe_device(device, torch.bfloat16)
    assert torch.cuda.get_device_name(device) in line
    assert "slow" not in line
