"""`counts`: kernels, bytes and kept activations of a training step at full size, on fake CUDA tensors.

Two depths are traced, and the rest is as many times their difference.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.counting import KeptBytes, KernelCounter
from benchmarks.fake_cuda import fake_cuda
from benchmarks.models import Side, build_diffusers, build_ours, diffusers, ours, random_inputs, shape_of

CASES = ("eager", "selective", "checkpointing", "int8", "int8 selective", "float8", "diffusers")
WIDTH, NUM_BLOCKS, DTYPE = 2048, 28, torch.bfloat16
DEPTHS = (2, 4)  # that are traced


@dataclass(frozen=True)
class Counts:
    """What a step launches, moves and keeps."""

    kernels: int
    elementwise_bytes: int
    kept_bytes: int


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a line for each case."""
    for case in options.cases or CASES:
        low, high = (count(case, depth, options.rank or 32, options.side or 1024) for depth in DEPTHS)

        def extrapolated(low: int, high: int) -> float:
            return low + (high - low) / (DEPTHS[1] - DEPTHS[0]) * (NUM_BLOCKS - DEPTHS[0])

        yield {
            "case": case,
            "kernels": round(extrapolated(low.kernels, high.kernels)),
            "elementwise_gb": round(extrapolated(low.elementwise_bytes, high.elementwise_bytes) / 1e9, 1),
            "kept_gib": round(extrapolated(low.kept_bytes, high.kept_bytes) / 2**30, 2),
        }


def count(case: str, depth: int, rank: int, side: int) -> Counts:
    """Return the counts of one step, forward and backward."""
    device = torch.device("cuda")
    with fake_cuda():
        inputs = random_inputs((side, side), 1, device, DTYPE)
        step = build(case, depth, rank, device)(inputs)
        with KeptBytes(step.model, inputs.tensors) as kept:
            loss = step.loss()
        del loss
        with KernelCounter("cuda") as counter:
            step.loss().backward()
    return Counts(counter.kernels, counter.elementwise_bytes, kept.total)


def build(case: str, depth: int, rank: int, device: torch.device) -> Callable[..., Side]:
    """Return what makes a side of a comparison of inputs."""
    shape = shape_of(WIDTH, depth)
    if case == "diffusers":
        theirs = build_diffusers(shape, rank, device, DTYPE)
        return lambda inputs: diffusers(theirs, inputs, DTYPE)
    mine = build_ours(shape, rank, case, device, DTYPE)
    return lambda inputs: ours(mine, inputs)
