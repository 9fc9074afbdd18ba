"""The device that everything computes on, decided in one place, and described in one line."""

import gc
import os

import psutil
import torch

from anima_train.core.format import count, format_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# In messages of errors that are RuntimeErrors like any other: of the CPU, on Linux and Windows; of MPS, and of CUDA
# outside of torch's allocator; of cuBLAS and cuDNN.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "alloc_failed")
SLOW = "; a model of 2 billion parameters is slow here, a GPU is what it needs"


def choose_device() -> torch.device:
    """Return the accelerator that is there, else the CPU.

    A build of torch for an accelerator names that one whether it is there or not, so it is asked for one that is.
    `ACCELERATE_USE_CPU`, which `accelerate launch --cpu` sets, is honoured.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t"):
        return torch.device("cpu")
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def describe_device(device: torch.device, dtype: torch.dtype) -> str:
    """Return a line with the device's name, memory and dtype; of a CPU, that it is slow."""
    facts = f"{format_bytes(memory_bytes(device))}, {str(dtype).removeprefix('torch.')}"
    if device.type == "cpu":
        return f"device: CPU with {count(os.cpu_count() or 1, 'core')}, {facts}{SLOW}"
    return f"device: {device_name(device)} ({device}), {facts}"


def memory_bytes(device: torch.device) -> int:
    """Return the memory that the device has in all, in bytes."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().total)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return torch.accelerator.get_memory_info(device)[1]


def device_name(device: torch.device) -> str:
    """Return the device's name, such as that of a GPU."""
    module = torch.get_device_module(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else device.type.upper()


def free_device_bytes(device: torch.device) -> int:
    """Return the bytes that tensors may still take of a device: free, or kept by torch without a use."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    unused = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return torch.accelerator.get_memory_info(device)[0] + unused


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if memory ran out, on any device; only some of them have a class of errors for it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        sign in str(error).lower() for sign in OUT_OF_MEMORY
    )


def release_memory(device: torch.device) -> None:
    """Return the memory of deleted modules to the device, for other users of it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
