"""Kernels that give the same bits each time, for a run or a part of one."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.deterministic

from anima_train.core.errors import ConfigError
from anima_train.core.settings import quoted

CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_VALUES = (":4096:8", ":16:8")  # with others cuBLAS may choose a kernel by what else runs; torch asks for these

# FlashAttention-3's deterministic backward pass reached 0.63 to 0.83 of the speed of the other one on a H100, causal,
# 8,192 tokens of 128 (Dao-AILab/flash-attention, pull request 1893); torch's FlashAttention-2 and ours: not measured.
PRICE = (
    "deterministic: the same start gives the same bits on one GPU of the same kind, with the same versions; attention "
    "without cuDNN, and with a slower backward pass, is the price (unmeasured here)"
)


@contextlib.contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Have torch take kernels that give the same bits each time, and refuse operations that have none.

    Enter it before anything computes on CUDA: cuBLAS reads its environment variable at its start.

    Args:
        wanted: False to leave everything as it is.

    Raises:
        ConfigError: the environment asks cuBLAS for something else.
    """
    if not wanted:
        yield
        return
    cublas = os.environ.get(CUBLAS_VARIABLE)
    if cublas not in (None, *CUBLAS_VALUES):
        raise ConfigError(
            f"deterministic: the environment has {CUBLAS_VARIABLE} = {quoted(cublas)}, with which cuBLAS may give "
            f"other bits each time; unset it, or set it to {quoted(CUBLAS_VALUES[0])}"
        )
    was_on = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # a module with a property
    fills = memory.fill_uninitialized_memory
    benchmark, cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_VALUES[0])
    try:
        torch.use_deterministic_algorithms(True)  # with warn_only, attention would stay as it is
        memory.fill_uninitialized_memory = False  # costs a pass over each new tensor; none is read
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=warned_only)
        memory.fill_uninitialized_memory = fills
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, cudnn
        if cublas is None:
            os.environ.pop(CUBLAS_VARIABLE, None)
