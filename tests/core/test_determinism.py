"""Deterministic kernels are in place for as long as they are wanted."""

import contextlib
import os

import pytest
import torch
import torch.utils.deterministic

from anima_train.core.determinism import CUBLAS_VARIABLE, deterministic_kernels
from anima_train.core.errors import ConfigError


def flags():
    cudnn = torch.backends.cudnn
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warns only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fills": torch.utils.deterministic.fill_uninitialized_memory,
        "cudnn": (cudnn.benchmark, cudnn.deterministic),
        "cublas": os.environ.get(CUBLAS_VARIABLE),
    }


ON = {"deterministic": True, "warns only": False, "fills": False, "cudnn": (False, True), "cublas": ":4096:8"}


@pytest.mark.parametrize("given", [None, ":16:8"])
def test_flags_are_set_inside_and_as_before_after_it(given, monkeypatch):
    monkeypatch.delenv(CUBLAS_VARIABLE, raising=False)
    if given is not None:
        monkeypatch.setenv(CUBLAS_VARIABLE, given)
    torch.backends.cudnn.benchmark = True
    try:
        before = flags()
        with deterministic_kernels(False):
            assert flags() == before
        with contextlib.suppress(RuntimeError), deterministic_kernels(True):
            assert flags() == {**ON, "cublas": given or ON["cublas"]}
            raise RuntimeError
        assert flags() == before
    finally:
        torch.backends.cudnn.benchmark = False


def test_an_environment_that_says_otherwise_is_refused(monkeypatch):
    monkeypatch.setenv(CUBLAS_VARIABLE, ":16:4")
    with (
        pytest.raises(ConfigError, match=r'has CUBLAS_WORKSPACE_CONFIG = ":16:4", .*unset it, or set it to ":4096:8"'),
        deterministic_kernels(True),
    ):
        pass
    with deterministic_kernels(False):
        assert os.environ[CUBLAS_VARIABLE] == ":16:4"
