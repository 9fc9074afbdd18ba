"""Compare speeds: two ways of doing the same, in turn, in one process, as ratios of medians.

    python scripts/benchmark.py step [--device cuda] [--width 1280] [--blocks 4] [--side 256] [--rounds 7]
    python scripts/benchmark.py vae  [--device cuda] [--side 256] [--rounds 7]

`step`: forward and backward of a rank-16 LoRA, ours against diffusers' `CosmosTransformer3DModel`.
`vae`: encoding one image, 2-D convolutions against diffusers' 3-D ones.

Absolute times say little on a shared machine; the ratio of two commands run in turn does.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import AutoencoderKLQwenImage, CosmosTransformer3DModel
from peft import LoraConfig, inject_adapter_in_model

from anima_train.adapters.lora import Lora
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.vae import FrameConv, SingleFrameVAE
from anima_train.optim.groups import COMPONENTS, LearningRates

RANK = 16
CONTEXT = 1024


def seconds(function: Callable[[], None], device: torch.device) -> float:
    """The time one call takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(ours: Callable[[], None], theirs: Callable[[], None], rounds: int, device: torch.device) -> None:
    """Run both in turn and print the ratios; the first round warms up and does not count."""
    pairs = [(seconds(ours, device), seconds(theirs, device)) for _ in range(rounds + 1)][1:]
    ratios = sorted(mine / other for mine, other in pairs)
    medians = [statistics.median(times) for times in zip(*pairs, strict=True)]
    print(f"ours {medians[0] * 1e3:.1f} ms, theirs {medians[1] * 1e3:.1f} ms (medians of {rounds})")
    print(f"ours / theirs: median {statistics.median(ratios):.3f}, from {ratios[0]:.3f} to {ratios[-1]:.3f}")


def trainable_step(model: torch.nn.Module, call: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Forward, loss, backward."""

    def step() -> None:
        call().float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return step


def benchmark_step(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """A LoRA step without the optimizer."""
    head_dim = 128 if options.width % 128 == 0 else 64
    shape = TransformerShape(options.blocks, options.width, head_dim, 16, CONTEXT, 256)
    ours = MiniTrainDIT(shape).to(device, dtype)
    Lora(rank=RANK).attach(ours, LearningRates(dict.fromkeys(COMPONENTS, 1e-4)), seed=0)
    ours.to(dtype)
    theirs = CosmosTransformer3DModel(
        in_channels=17,  # the padding mask given as a channel: its resize needs torchvision
        num_attention_heads=options.width // head_dim,
        attention_head_dim=head_dim,
        num_layers=options.blocks,
        text_embed_dim=CONTEXT,
        adaln_lora_dim=256,
        rope_scale=(1.0, 4.0, 4.0),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
    ).to(device, dtype)
    theirs.requires_grad_(False)
    blocks = r"transformer_blocks\.\d+\."
    targets = blocks + r"(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)|norm[123]\.linear_[12])"
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets), theirs)
    theirs.to(dtype)
    trained = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
    assert trained[0] == trained[1], trained

    side = options.side // 8
    x = torch.randn(1, 16, 1, side, side, device=device, dtype=dtype)
    padded = torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)
    t = torch.full((1, 1), 0.5, device=device)
    context = torch.zeros(1, 512, CONTEXT, device=device, dtype=dtype)
    context[:, :100] = torch.randn(100, CONTEXT, device=device, dtype=dtype)
    compare(
        trainable_step(ours, lambda: ours(x, t, context)),
        trainable_step(theirs, lambda: theirs(padded, t[:, 0], context, return_dict=False)[0]),
        options.rounds,
        device,
    )


@torch.no_grad()
def benchmark_vae(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """Encoding one image."""
    theirs = AutoencoderKLQwenImage().to(device, dtype)
    ours = SingleFrameVAE(AutoencoderKLQwenImage()).to(device, dtype)
    convolutions = sum(isinstance(module, FrameConv) for module in ours.modules())
    pixels = torch.randn(1, 3, options.side, options.side, device=device, dtype=dtype)
    print(f"{convolutions} convolutions in 2-D")

    def encode_ours() -> None:
        ours.encode(pixels)

    def encode_theirs() -> None:
        theirs.encode(pixels.unsqueeze(2)).latent_dist.mode()

    compare(encode_ours, encode_theirs, options.rounds, device)


def main() -> None:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "vae"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    {"step": benchmark_step, "vae": benchmark_vae}[options.what](options, device, dtype)


if __name__ == "__main__":
    main()
