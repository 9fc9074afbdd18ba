"""Times of two ways of doing the same, in turn, as ratios."""

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch


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


def child_environment() -> Mapping[str, str]:
    """What a process needs to find the same modules as this one."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
