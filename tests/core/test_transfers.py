"""Copies between host and device: none of them holds the host up."""

import contextlib
import importlib
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from anima_train.core.transfers import CopyStream, HostCopy, to_device
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


def test_a_copy_beside_the_computation_follows_what_was_told_before_it_and_is_waited_for_by_the_device_alone(
    fake_cuda, monkeypatch
):
    told = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, stream):
            told.append((self.name, "waits for", stream.name))

        def wait_event(self, event):
            told.append((self.name, "waits for", event.name))

        def synchronize(self):
            told.append(("host", "waits for", self.name))

    class Event:
        def record(self, stream):
            self.name = f"end of {len(told)}"
            told.append((stream.name, "marks", self.name))

    @contextlib.contextmanager
    def entered(stream):
        told.append((stream.name, "copies"))
        yield

    with fake_cuda() as waits, Copies() as copies:
        for name, stand_in in (
            ("Stream", lambda device: Stream("copies")), ("current_stream", lambda device: Stream("computation")),
            ("stream", entered), ("Event", Event),
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, stand_in)
        beside = CopyStream(CUDA)
        host, there = beside.host_buffer(8), torch.zeros(16, dtype=torch.uint8, device=CUDA)
        events = [beside.copy(host, there), beside.copy(there, host)]
        assert len(set(events)) == 2
        beside.wait(events[0])
        beside.finish()
        assert copies.found == [True, True]
        assert waits.total == 0
    copied = [("copies", "waits for", "computation"), ("copies", "copies")]
    assert told == [
        *copied, ("copies", "marks", "end of 2"), *copied, ("copies", "marks", "end of 5"),
        ("computation", "waits for", "end of 2"), ("host", "waits for", "copies"),
    ]  # fmt: skip


@pytest.mark.gpu
def test_a_copy_overwrites_nothing_that_is_still_to_be_read_and_what_waits_for_it_sees_it():
    copies, size = CopyStream(CUDA), 2**26
    host, there = copies.host_buffer(size).fill_(1), torch.zeros(size, dtype=torch.uint8, device=CUDA)
    torch.cuda.synchronize()
    torch.cuda._sleep(10**8)
    before = there.sum()
    copies.wait(copies.copy(host, there))
    after = there.sum()
    there.fill_(2)
    copies.copy(there, host)
    copies.finish()
    assert (int(before), int(after), int(host.sum())) == (0, size, 2 * size)


def test_pixels_on_their_way_to_latents_are_waited_for_nowhere():
    with FakeTensorMode():
        with torch.device(CUDA):
            vae = SingleFrameVAE(AutoencoderKLQwenImage(base_dim=8)).requires_grad_(False)
        with Copies() as copies:
            latents = vae.encode(to_pixels(to_device(torch.zeros(1, 64, 48, 3, dtype=torch.uint8), CUDA)))
    assert (latents.device, latents.shape) == (CUDA, (1, 16, 1, 8, 6))
    assert copies.found == [True] * 3  # the pixels, and the mean and deviation of the channels
