"""What torchrun and accelerate launch tell a process about itself."""

import os


def rank() -> int:
    """This process's number, from what `accelerate launch` and `torchrun` set."""
    return int(os.environ.get("RANK", "0"))
