"""The facts that torchrun and accelerate launch tell a process about itself."""

import os


def rank() -> int:
    """Return this process's number, from what `accelerate launch` and `torchrun` set."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes, from what `accelerate launch` and `torchrun` set."""
    return int(os.environ.get("WORLD_SIZE", "1"))
