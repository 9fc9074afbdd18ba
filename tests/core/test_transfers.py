"""Copies between host and device: none of them holds the host up."""

import importlib
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from anima_train.core.transfers import HostCopy, to_device
from anima_train.model.vae import SingleFrameVAE, to_pixels

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def fake_cuda(monkeypatch):
    """The context in which CUDA tensors are fake, and events are counted when they are waited for."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    return importlib.import_module("benchmarks.fake_cuda").fake_cuda


class Copies(TorchDispatchMode):
    """Notes for each copy between devices if it is one that the host does not wait for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and result.device != args[0].device:
            self.found.append((kwargs or {}).get("non_blocking", False))
        if function is torch.ops.aten.copy_.default and args[0].device != args[1].device:
            self.found.append(args[2] if len(args) > 2 else (kwargs or {}).get("non_blocking", False))
        return result


def test_to_the_cpu_there_is_nothing_to_copy():
    tensor = torch.arange(6.0).view(2, 3)
    assert to_device(tensor, CPU) is tensor


def test_a_copy_on_the_host_is_of_now():
    tensor = torch.arange(6.0).view(2, 3)
    copy = HostCopy(tensor)
    row = copy.values[1]
    tensor.zero_()
    assert copy.wait().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert row.tolist() == [3, 4, 5]


def test_copies_to_and_from_a_gpu_hold_nobody_up_but_who_reads_them(fake_cuda):
    with fake_cuda() as waits, Copies() as copies:
        there = to_device(torch.zeros(2, 3), CUDA)
        copy = HostCopy(there)
        assert waits.total == 0
        back = copy.wait()
        assert waits.numbers == {"event": 1}
    assert (there.device, there.shape, there.dtype) == (CUDA, (2, 3), torch.float32)
    assert (back.device, back.shape, back.dtype) == (CPU, (2, 3), torch.float32)
    assert copies.found == [True, True]


@pytest.mark.gpu
def test_what_a_copy_has_is_of_before_what_the_device_was_told_after_it():
    values = torch.ones(1000, device=CUDA)
    copy = HostCopy(values)
    values.zero_()
    assert copy.wait().tolist() == [1.0] * 1000


def test_pixels_on_their_way_to_latents_are_waited_for_nowhere():
    with FakeTensorMode():
        with torch.device(CUDA):
            vae = SingleFrameVAE(AutoencoderKLQwenImage(base_dim=8)).requires_grad_(False)
        with Copies() as copies:
            latents = vae.encode(to_pixels(to_device(torch.zeros(1, 64, 48, 3, dtype=torch.uint8), CUDA)))
    assert (latents.device, latents.shape) == (CUDA, (1, 16, 1, 8, 6))
    assert copies.found == [True] * 3  # the pixels, and the mean and deviation of the channels
