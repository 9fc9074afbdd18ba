"""Copies between host and device: none of them holds the host up."""

import torch
from diffusers import AutoencoderKLQwenImage
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from anima_train.core.transfers import pinned_copy, to_device, to_host
from anima_train.model.vae import SingleFrameVAE, to_pixels

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


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


def test_the_cpu_copies_nothing():
    tensor = torch.arange(6.0).view(2, 3)
    assert to_device(tensor, CPU) is tensor
    copy, arrival = to_host(tensor)
    assert copy is tensor
    assert arrival is None


def test_copies_to_and_from_a_gpu_are_not_waited_for():
    with FakeTensorMode(), Copies() as copies:
        there = to_device(torch.zeros(2, 3), CUDA)
        back = pinned_copy(there)
    assert (there.device, there.shape, there.dtype) == (CUDA, (2, 3), torch.float32)
    assert (back.device, back.shape, back.dtype) == (CPU, (2, 3), torch.float32)
    assert copies.found == [True, True]


def test_pixels_on_their_way_to_latents_are_waited_for_nowhere():
    with FakeTensorMode():
        with torch.device(CUDA):
            vae = SingleFrameVAE(AutoencoderKLQwenImage(base_dim=8)).requires_grad_(False)
        with Copies() as copies:
            latents = vae.encode(to_pixels(to_device(torch.zeros(1, 64, 48, 3, dtype=torch.uint8), CUDA)))
    assert (latents.device, latents.shape) == (CUDA, (1, 16, 1, 8, 6))
    assert copies.found == [True] * 3  # the pixels, and the mean and deviation of the channels
