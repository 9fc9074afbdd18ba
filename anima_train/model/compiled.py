"""Blocks compiled by `torch.compile`: one graph for all of them, for every size and aspect ratio."""

import logging
import shutil
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from torch._inductor.exc import InductorError
from torch.fx.experimental import _config as shape_config
from torch.utils._triton import has_triton

from anima_train.model.dit import Block, RunBlock

logger = logging.getLogger(__name__)

FAILURES = (TorchDynamoException, InductorError)


def missing_compiler(device: torch.device) -> str | None:
    """Return the reason why nothing can be compiled for a device; None if it can."""
    if device.type == "cuda" and not has_triton():
        return "Triton is missing, or knows no GPU as old as this one"
    names = ("cc", "gcc", "clang", "cl") if device.type == "cuda" else ("c++", "g++", "clang++", "cl")
    if not any(map(shutil.which, names)):
        return f"there is no C compiler ({', '.join(names)})"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's headers are missing (python3-dev)"
    return None


class CompiledBlocks:
    """The way to run a block, compiled at the first call; what cannot be compiled runs as it is, with a warning.

    One graph serves all blocks, as their parameters are inputs of it, and all sizes, as every dimension of an input is
    a variable of its own. A batch of one sample and a pass without gradients take one more each.
    """

    def __init__(self, run: RunBlock, backend: str = "inductor") -> None:
        self.run = run
        # Else a dimension that happens to equal another one is compiled as that. The setting belongs to the thread.
        shape_config.use_duck_shape = False
        # A backward pass that cannot be compiled is known while the forward pass can still be run in another way.
        torch._functorch.config.force_non_lazy_backward_lowering = True
        self.compiled: RunBlock | None = torch.compile(run, dynamic=True, fullgraph=True, backend=backend)

    def __call__(self, block: Block, tokens: Tensor, *inputs: Any) -> Tensor:
        if self.compiled is None:
            return self.run(block, tokens, *inputs)
        if torch.is_grad_enabled() and not tokens.requires_grad:  # the first block's, which would be another graph
            tokens = tokens.detach().requires_grad_()
        before, start = num_graphs(), time.monotonic()
        try:
            out = self.compiled(block, tokens, *inputs)
        except FAILURES as error:
            reason = str(error).strip().partition("\n")[0]
            logger.warning("blocks run without being compiled, and slower: %s: %s", type(error).__name__, reason)
            self.compiled = None
            return self.run(block, tokens, *inputs)
        if num_graphs() > before:
            logger.info("compiled the blocks in %.0f s", time.monotonic() - start)
        return out


def num_graphs() -> int:
    """Return the number of graphs that dynamo has made in this process."""
    return counters["stats"]["unique_graphs"]
