"""Blocks compiled by `torch.compile`: one graph for all of them, for every size and aspect ratio."""

import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._dynamo.utils import counters
from torch._inductor.cpp_builder import get_cpp_compiler
from torch.fx.experimental import _config as shape_config
from torch.utils._triton import has_triton

from anima_train.core.device import is_out_of_memory
from anima_train.model.dit import Block, RunBlock

logger = logging.getLogger(__name__)

# What runs blocks is one function for dynamo, however many ways there are to run them: two for the first blocks and the
# others, each with a graph for each kind of batch. Beyond dynamo's own limit of 8 nothing more would be compiled.
MAX_GRAPHS = 64


def missing_compiler(device: torch.device) -> str | None:
    """Return the reason why nothing can be compiled for a device; None if it can, as far as one can tell.

    Kernels for CUDA, ROCm and XPU are made by Triton, whose launcher is C; those for the CPU are C++.
    """
    if device.type == "mps":  # Metal comes with the system
        return None
    if device.type == "cpu":
        missing = missing_cpp_compiler()
    elif not has_triton():
        return "Triton is missing, or has nothing for this device"
    else:
        missing = missing_c_compiler()
    if missing is None and not has_python_headers():
        return "the headers of Python are missing (python3-dev)"
    return missing


def missing_cpp_compiler() -> str | None:
    """Return what is missing to compile C++; None if nothing is."""
    try:
        get_cpp_compiler()  # torch's own search, which $CXX changes
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        return f"there is no C++ compiler ({str(error).rstrip('.')})"
    return None


def missing_c_compiler() -> str | None:
    """Return what is missing to compile Triton's launchers; None if nothing is."""
    # As Triton searches. The one for Windows brings a compiler.
    if sys.platform == "win32" or "CC" in os.environ or shutil.which("gcc") or shutil.which("clang"):
        return None
    return "there is no C compiler (gcc or clang; the variable CC may name another)"


def has_python_headers() -> bool:
    """Return True if C can be compiled against this Python."""
    # Debian's own scheme points to a folder that is never there, as does that of Python as a framework of macOS.
    scheme = "nt" if os.name == "nt" else "posix_prefix"
    folders = (
        sysconfig.get_path("include"),
        sysconfig.get_path("include", scheme),
        sysconfig.get_config_var("INCLUDEPY"),
    )
    return any((Path(folder) / "Python.h").exists() for folder in folders if folder)


class CompiledBlocks:
    """The way to run a block, compiled at the first call; what cannot be compiled runs as it is, with a warning.

    One graph serves all blocks, as their parameters are inputs of it, and all sizes, as every dimension of an input is
    a variable of its own. A batch of one sample and a pass without gradients take one more each.

    Args:
        run: the way to run a block.
        backend: of `torch.compile`.
        beside: the way to run the other blocks of the model: what it has told is not told again.
    """

    def __init__(self, run: RunBlock, backend: Any = "inductor", beside: "CompiledBlocks | None" = None) -> None:
        self.run = run
        self.told: set[str] = set() if beside is None else beside.told
        self.compiled: RunBlock | None = torch.compile(run, dynamic=True, fullgraph=True, backend=backend)
        logging.getLogger("torch._higher_order_ops.wrap").addFilter(is_about_this_run)

    def __call__(self, block: Block, tokens: Tensor, *inputs: Any) -> Tensor:
        if self.compiled is None:
            return self.run(block, tokens, *inputs)
        if torch.is_grad_enabled() and not tokens.requires_grad:  # the first block's, which would be another graph
            tokens = tokens.detach().requires_grad_()
        self.tell(
            logging.INFO, "compiling the blocks: it takes a minute or two, and happens again for other kinds of batches"
        )
        configure_compiler()
        before, start = num_graphs(), time.monotonic()
        try:
            out = self.compiled(block, tokens, *inputs)
        except Exception as error:
            if is_out_of_memory(error) or not is_of_compiler(error):
                raise
            cause = getattr(error, "inner_exception", error)  # torch wraps what a compiler raises
            reason = next((line for line in str(cause).splitlines() if line.strip()), "no reason given")
            text = f"the blocks run without being compiled, and slower: {type(cause).__name__}: {reason}"
            self.tell(logging.WARNING, text)
            self.compiled = None
            return self.run(block, tokens, *inputs)
        if num_graphs() > before:
            purpose = "training" if torch.is_grad_enabled() else "evaluation and previews"
            one = ", one image at a time" if len(tokens) == 1 else ""
            logger.info("compiled the blocks for %s%s in %.0f s", purpose, one, time.monotonic() - start)
        return out

    def tell(self, level: int, text: str) -> None:
        """Log what was not told yet."""
        if text not in self.told:
            self.told.add(text)
            logger.log(level, "%s", text)


def configure_compiler() -> None:
    """Set what one graph for all sizes needs; since torch 2.12 it holds for the calling thread only."""
    # Else a dimension that happens to equal another one is compiled as that.
    shape_config.use_duck_shape = False
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    # A backward pass that cannot be compiled is known while the forward pass can still be run in another way.
    torch._functorch.config.force_non_lazy_backward_lowering = True


def is_of_compiler(error: Exception) -> bool:
    """Return True if an error was raised while compiling, False if what was compiled raised it."""
    if isinstance(error, TorchDynamoException | FailOnRecompileLimitHit):
        return True
    # A compiler's own mistakes, such as a failed assertion, come as they are.
    modules = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)}
    return "torch._dynamo.convert_frame" in modules


def is_about_this_run(record: logging.LogRecord) -> bool:
    """Return False for torch's general advice against operations in place under selective checkpointing."""
    return "Detected that context_fn is passed to torch.utils.checkpoint" not in str(record.msg)


def num_graphs() -> int:
    """Return the number of graphs that dynamo has made in this process."""
    return counters["stats"]["unique_graphs"]
