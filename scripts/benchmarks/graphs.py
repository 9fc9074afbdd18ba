"""`graphs`: how many graphs the compiled blocks have after training at 9 sizes and batches of 1, 2 and 4."""

import argparse
import itertools
from typing import Any

import torch
from torch._dynamo.utils import counters

from anima_train.model.compiled import CompiledBlocks
from anima_train.model.recompute import runner
from benchmarks.models import build_ours, ours, random_inputs, shape_of

SIZES = ((16, 16), (14, 18), (18, 14), (12, 20), (20, 12), (12, 12), (8, 24), (24, 8), (32, 32))  # of latents
BATCH_SIZES = (1, 2, 4)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the number of graphs."""
    device = torch.device(options.device)
    model = build_ours(shape_of(256, 2), options.rank or 4, "eager", device, torch.float32)
    # On a CPU the graphs are made, and not what a compiler makes of them, which takes minutes.
    model.run_block = CompiledBlocks(runner("nothing"), "aot_eager" if device.type == "cpu" else "inductor")
    counters.clear()
    for (height, width), batch_size in itertools.product(SIZES, BATCH_SIZES):
        inputs = random_inputs((height * 8, width * 8), batch_size, device, torch.float32)
        ours(model, inputs).loss().backward()
    return [{"graphs": counters["stats"]["unique_graphs"]}]
