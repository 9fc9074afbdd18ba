"""`graphs`: how many graphs the compiled blocks have after training at 9 sizes and batches of 1, 2 and 4."""

import argparse
import importlib.util
import itertools
from typing import Any

import torch
from torch._dynamo.utils import counters

from benchmarks.models import build_ours, ours, random_inputs, shape_of

SIZES = ((16, 16), (14, 18), (18, 14), (12, 20), (20, 12), (12, 12), (8, 24), (24, 8), (32, 32))  # of latents
BATCH_SIZES = (1, 2, 4)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the number of graphs.

    Raises:
        SystemExit: the transformer has no compiled blocks.
    """
    if importlib.util.find_spec("anima_train.model.compiled") is None:
        raise SystemExit("graphs: there is nothing to count, the transformer has no compiled blocks yet")
    device = torch.device(options.device)
    model = build_ours(shape_of(256, 2), options.rank or 4, "compiled", device, torch.float32)
    counters.clear()
    for (height, width), batch_size in itertools.product(SIZES, BATCH_SIZES):
        inputs = random_inputs((height * 8, width * 8), batch_size, device, torch.float32)
        ours(model, inputs).loss().backward()
    return [{"graphs": counters["stats"]["unique_graphs"]}]
