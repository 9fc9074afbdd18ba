"""The measurements. Each yields rows as it goes, so that those it has made are kept where its time runs out."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from torch import Tensor
from transformers import Qwen3Config, Qwen3Model

from anima_train.adapters.full import Full
from anima_train.core.text_batch import fold_rows, pad_states
from anima_train.model.attention_choice import AttentionChoice, AttentionShape, choose_attention
from anima_train.model.dit import MiniTrainDIT
from anima_train.model.llm_adapter import LLMAdapter
from anima_train.model.recompute import runner
from anima_train.model.text import TextEncoder, Tokens
from anima_train.model.vae import SingleFrameVAE
from anima_train.optim.groups import optimizer_groups
from anima_train.optim.optimizers import AdamWKahan
from gpu_checks.models import RATES, Built, Case, Inputs, Policy, Scale, build, random_inputs

Row = dict[str, Any]
GIB = 2**30
PATCH_PIXELS = 16  # of a token's side
CAPTION_TOKENS = 100
CURVE_SIDE = 256


@dataclass(frozen=True)
class Place:
    """A device, the dtype that is measured on it, and the sizes."""

    device: torch.device
    dtype: torch.dtype
    scale: Scale

    def synchronize(self) -> None:
        """Wait until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def start_peak(self) -> None:
        """Forget the memory that was in use until now."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        """Return the most memory that tensors took since then; None on a CPU."""
        return torch.cuda.max_memory_allocated() / GIB if self.device.type == "cuda" else None

    def attention(self, side: int, batch_size: int) -> AttentionChoice:
        """Return the kernel that a run with these images would use."""
        shape = self.scale.shape
        tokens = (side // PATCH_PIXELS) ** 2
        wanted = AttentionShape(batch_size, shape.width // shape.head_dim, tokens, shape.head_dim)
        return choose_attention("auto", self.device, self.dtype, wanted)


def median_ms(work: Callable[[], object], place: Place, rounds: int) -> float:
    """Return the median time of a call, the device's work included, after two calls that do not count."""
    times = []
    for _ in range(rounds + 2):
        place.synchronize()
        start = time.perf_counter()
        work()
        place.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:]) * 1e3


def device_part(place: Place) -> Iterator[Row]:
    """Yield the device, the kernels of attention that are chosen, and the rate of a large product."""
    row: Row = {"torch": torch.__version__, "device": "CPU"}
    if place.device.type == "cuda":
        properties = torch.cuda.get_device_properties(place.device)
        row |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": properties.total_memory / GIB,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    yield row
    for side in place.scale.sides:
        choice = place.attention(side, 1)
        yield {"side": side, "attention": choice.kernel, "milliseconds": dict(choice.milliseconds)}
    rows, inner, columns = place.scale.gemm
    x = torch.randn(rows, inner, device=place.device, dtype=place.dtype)
    weight = torch.randn(columns, inner, device=place.device, dtype=place.dtype)
    taken = median_ms(lambda: [F.linear(x, weight) for _ in range(20)], place, place.scale.rounds) / 20
    yield {"gemm_tflops": 2 * rows * inner * columns / taken / 1e9}


def step_part(place: Place, whose: str, policy: Policy) -> Iterator[Row]:
    """Yield time and peak memory of a LoRA's forward and backward pass, for each size and batch."""
    scale = place.scale
    case = {"case": f"{whose} {policy}"}
    choice = place.attention(scale.sides[0], 1)
    built = build(Case(whose, policy, scale.shape, scale.rank, place.device, place.dtype))
    used = choice if whose == "ours" else AttentionChoice("default", "as torch decides")  # what a user of it gets
    with used.in_use(place.device):
        for batch_size in scale.batch_sizes:
            for side in scale.sides:
                row = case | {"side": side, "batch": batch_size, "attention": used.kernel}
                try:
                    yield row | step_costs(place, built, side, batch_size)
                except torch.OutOfMemoryError:
                    built.model.zero_grad(set_to_none=True)
                    yield row | {"note": "does not fit"}


def step_costs(place: Place, built: Built, side: int, batch_size: int) -> Row:
    """Return milliseconds and peak of forward and backward; with the seconds of the first, which may compile."""
    inputs = random_inputs(place.scale.shape, side, batch_size, place.device, place.dtype)

    def step() -> None:
        built.loss(inputs).backward()
        built.model.zero_grad(set_to_none=True)

    place.start_peak()
    start = time.perf_counter()
    step()
    place.synchronize()
    first = time.perf_counter() - start
    place.start_peak()
    taken = median_ms(step, place, place.scale.rounds)
    return {"ms": taken, "peak_gib": place.peak_gib(), "first_s": first}


def full_part(place: Place) -> Iterator[Row]:
    """Yield time and peak memory of steps of a full fine-tune, checkpointed, the optimizer included."""
    scale = place.scale
    place.start_peak()
    with place.device:
        model = MiniTrainDIT(scale.shape)
    model.to(place.dtype)
    Full().attach(model, RATES, seed=0)
    model.run_block = runner("blocks")
    optimizer = AdamWKahan(lr=1e-6).build(optimizer_groups(model.named_parameters(), RATES, 0.01))
    side = scale.sides[0]
    inputs = random_inputs(scale.shape, side, 1, place.device, place.dtype)

    def step() -> None:
        loss = F.mse_loss(model(inputs.latents, inputs.t, fold_rows(inputs.text)).float(), inputs.target.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with place.attention(side, 1).in_use(place.device):
        step()
        place.start_peak()
        taken = median_ms(step, place, scale.rounds)
    yield {
        "case": "full fine-tune, checkpointing, adamw_optimi",
        "side": side,
        "ms": taken,
        "peak_gib": place.peak_gib(),
    }


@torch.no_grad()
def caching_part(place: Place) -> Iterator[Row]:
    """Yield images and captions encoded in a second, by random weights in the official shape."""
    yield from vae_rows(place)
    place.start_peak()
    yield from text_rows(place)


def vae_rows(place: Place) -> Iterator[Row]:
    """Yield the images that the VAE encodes in a second."""
    scale = place.scale
    with place.device:
        vae = SingleFrameVAE(AutoencoderKLQwenImage(base_dim=scale.vae_width)).to(place.dtype).eval()
    for side in scale.sides:
        for batch_size in scale.batch_sizes:
            pixels = torch.randn(batch_size, 3, side, side, device=place.device, dtype=place.dtype)
            taken = median_ms(partial(vae.encode, pixels), place, scale.rounds)
            yield {"case": "VAE", "side": side, "batch": batch_size, "images_per_s": batch_size / taken * 1e3}


def text_rows(place: Place) -> Iterator[Row]:
    """Yield the captions that text encoder and LLM adapter encode in a second, in float32, as for the cache."""
    scale = place.scale
    with place.device:
        encoder = TextEncoder(Qwen3Model(Qwen3Config(**scale.text_encoder)).eval(), pad_id=0)
        adapter = LLMAdapter(scale.llm_adapter).eval()

    def encode(tokens: list[Tokens]) -> Tensor:
        states = pad_states(encoder.encode(tokens)).to(place.device)
        return adapter(states.source, states.t5_ids, states.source_mask, states.t5_mask)

    ids = [index * 7 % (scale.llm_adapter.vocab_size - 1) + 1 for index in range(CAPTION_TOKENS)]
    for batch_size in (1, 16):
        taken = median_ms(partial(encode, [Tokens(ids, ids)] * batch_size), place, scale.rounds)
        yield {"case": "text encoder and LLM adapter", "batch": batch_size, "captions_per_s": batch_size / taken * 1e3}


def curve_part(place: Place) -> Iterator[Row]:
    """Yield the losses of the same steps in float32, in bfloat16 and on int8 weights, and how far they are apart."""
    exact = losses(place, torch.float32, "eager")
    for name, policy in (("bfloat16", "eager"), ("int8", "int8"), ("float8", "float8")):
        found = losses(place, torch.bfloat16, policy)
        pairs = list(zip(exact, found, strict=True))
        yield {
            "case": f"loss in {name} against float32",
            "steps": len(pairs),
            "mean_relative_difference": statistics.mean(abs(low - high) / high for high, low in pairs),
            "first_loss": found[0],
            "last_loss": found[-1],
            "losses": found,
            "exact": exact,
        }


def losses(place: Place, dtype: torch.dtype, policy: Policy) -> list[float]:
    """Return the losses of a LoRA's steps on four images, from the same weights and inputs whatever their types."""
    scale = place.scale
    torch.manual_seed(0)  # of the base weights, drawn in float32 on the device
    built = build(Case("ours", policy, scale.curve_shape, scale.rank, place.device, dtype))
    optimizer = torch.optim.AdamW(built.trained, lr=1e-3)
    images: list[Inputs] = [
        random_inputs(scale.curve_shape, min(CURVE_SIDE, scale.sides[0]), 1, place.device, torch.float32, seed)
        for seed in range(4)
    ]
    found = []
    for step in range(scale.curve_steps):
        image = images[step % len(images)]
        cast = Inputs(image.latents.to(dtype), image.t, image.text.to(dtype), image.target)
        loss = built.loss(cast)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(loss.detach())
    return torch.stack(found).tolist()
