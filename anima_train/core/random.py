"""Randomness is addressed, not consumed.

Every random number of a run is a pure function of the run's seed and an address such as `("noise", epoch, sample)`.
No global generator is read, so a step, an epoch or an evaluation can be skipped, added or resumed without moving any
other number, and one or eight processes see the same ones.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

Item = TypeVar("Item")
Address = int | str


def derive(seed: int, *address: Address) -> int:
    """Return a 63-bit integer that depends on the seed and every part of the address (SHA-256)."""
    text = repr((seed, *address))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def stream(seed: int, *address: Address) -> torch.Generator:
    """Return a CPU generator of its own for this address."""
    return torch.Generator().manual_seed(derive(seed, *address))


def uniform(seed: int, *address: Address) -> float:
    """Return one number in [0, 1) for this address."""
    return (derive(seed, *address) >> 10) / 2**53  # the bits a float holds: 63 of them would round up to 1


def shuffled(items: Iterable[Item], key: Callable[[Item], Address], seed: int, *address: Address) -> list[Item]:
    """Return the items in an order that depends on the seed, the address and each item's `key` alone.

    Sorting by a hash needs no generator, so the order is the same in every version of every library, and adding an
    item leaves the relative order of the others alone.
    """
    return sorted(items, key=lambda item: (derive(seed, *address, key(item)), str(key(item))))
