"""`vae`: encoding one image, 2-D convolutions against diffusers' 3-D ones."""

import argparse

import torch
from diffusers import AutoencoderKLQwenImage

from anima_train.model.vae import FrameConv, SingleFrameVAE
from benchmarks.timing import compare


@torch.no_grad()
def run(options: argparse.Namespace) -> None:
    """Encoding one image."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    side = options.side or 256
    theirs = AutoencoderKLQwenImage().to(device, dtype)
    ours = SingleFrameVAE(AutoencoderKLQwenImage()).to(device, dtype)
    convolutions = sum(isinstance(module, FrameConv) for module in ours.modules())
    pixels = torch.randn(1, 3, side, side, device=device, dtype=dtype)
    print(f"{convolutions} convolutions in 2-D")

    def encode_ours() -> None:
        ours.encode(pixels)

    def encode_theirs() -> None:
        theirs.encode(pixels.unsqueeze(2)).latent_dist.mode()

    compare(encode_ours, encode_theirs, options.rounds, device)
