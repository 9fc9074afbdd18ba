"""Fixtures shared by all tests."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
    """Read one file of reference values by name."""

    def read(name: str) -> dict[str, Tensor] | list | dict:
        path = GOLDEN / name
        return load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())

    return read


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, in float64."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float64).tiny))


@pytest.fixture(scope="session")
def error():
    """The relative error of a tensor against its oracle."""
    return relative_error
