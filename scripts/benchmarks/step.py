"""`step`: forward, backward and AdamW step of a LoRA on all 16 linears, ours against diffusers' transformer with PEFT.

The sides take turns in an order drawn for each round; a case's ratio is the median of the rounds' ratios. On the CPU
the time is that of the process on one thread, which a busy machine changes less than the clock on the wall. Compiling
for a CPU takes minutes. Of a compiled model, what is kept is what autograd saves.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.counting import KeptBytes
from benchmarks.models import Side, build_diffusers, build_ours, diffusers, ours, random_inputs, shape_of

CASES = ("eager", "selective", "compiled")
THEIRS = "diffusers"


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the ratio of each case, ours to diffusers'."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if device.type == "cpu":
        torch.set_num_threads(1)
    shape, rank = shape_of(options.width, options.blocks), options.rank or 16
    side = options.side or 256
    inputs = random_inputs((side, side), 1, device, dtype)
    cases = options.cases or CASES
    sides = {case: ours(build_ours(shape, rank, case, device, dtype), inputs) for case in cases}
    sides[THEIRS] = diffusers(build_diffusers(shape, rank, device, dtype), inputs, dtype)
    sizes = {name: sum(parameter.numel() for parameter in side.trained) for name, side in sides.items()}
    assert len(set(sizes.values())) == 1, f"the sides train different numbers of parameters: {sizes}"
    kept = {name: kept_bytes(side, not name.startswith("compiled")) for name, side in sides.items()}
    rounds = measure({name: training_step(side) for name, side in sides.items()}, options.rounds, device)
    for case in cases:
        ratio = statistics.median(seconds[case] / seconds[THEIRS] for seconds in rounds)
        yield {"case": case, "ratio": round(ratio, 4), "kept_ratio": round(kept[case] / kept[THEIRS], 4)}


def kept_bytes(side: Side, sees_operations: bool) -> int:
    """Return the bytes that the forward pass keeps for the backward pass."""
    with KeptBytes(side.model, side.inputs.tensors, sees_operations) as kept:
        loss = side.loss()
    loss.backward()
    side.model.zero_grad(set_to_none=True)
    return kept.total


def training_step(side: Side) -> Callable[[], None]:
    """Return a function that makes one optimizer step."""
    optimizer = torch.optim.AdamW(side.trained, lr=1e-4, fused=True)

    def step() -> None:
        side.loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(steps: dict[str, Callable[[], None]], num_rounds: int, device: torch.device) -> list[dict[str, float]]:
    """Return the seconds of every step in each round; a first round warms up and does not count."""
    order = random.Random(0)
    rounds = []
    for _ in range(num_rounds + 1):
        names = order.sample(list(steps), len(steps))
        rounds.append({name: seconds(steps[name], device) for name in names})
    return rounds[1:]


def seconds(step: Callable[[], None], device: torch.device) -> float:
    """Return the time that a step takes: of the process on the CPU, of the clock on a GPU."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    started = clock()
    step()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return clock() - started
