"""`save`: how long a step waits for a training state, against copying the tensors to the host."""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from anima_train.checkpoint.async_writer import AsyncWriter, Groups, on_host
from anima_train.checkpoint.training_state import StateManifest, save_state
from benchmarks.timing import seconds


def run(options: argparse.Namespace) -> None:
    """How long a step waits for a training state, against copying its tensors, and against writing them at once."""
    device = torch.device(options.device)
    weights = {f"weight {index}": torch.randn(1 << 20, device=device) for index in range(options.megabytes // 12)}
    groups = {
        "weights": weights,
        "optimizer": {f"{name}.{key}": torch.randn_like(tensor) for name, tensor in weights.items() for key in "ab"},
    }
    facts = StateManifest(step=1, optimizer="")
    rows = []
    with tempfile.TemporaryDirectory() as name, AsyncWriter() as writer:
        folder = Path(name)

        def job(copies: Groups) -> None:
            save_state(folder / str(len(rows)), facts, copies, 2)

        for _ in range(options.rounds + 1):
            waits = seconds(lambda: writer.write(groups, job), device)
            writer.wait()
            rows.append((waits, seconds(lambda: on_host(groups), device), writer.seconds))
    waits, copies, writes = (statistics.median(times) for times in zip(*rows[1:], strict=True))
    ratios = sorted(mine / other for mine, other, _ in rows[1:])
    print(f"a step waits {waits * 1e3:.0f} ms, copying takes {copies * 1e3:.0f} ms, writing {writes * 1e3:.0f} ms")
    print(f"waits / copying: median {statistics.median(ratios):.3f}, from {ratios[0]:.3f} to {ratios[-1]:.3f}")
