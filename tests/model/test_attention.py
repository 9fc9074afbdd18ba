"""Attention to counted rows of zeros against attention to the rows themselves."""

import math

import pytest
import torch
import torch.nn.functional as F

from anima_train.model import attention
from anima_train.model.attention import attend_with_zeros, can_fold

HEADS, TOKENS, ROWS, HEAD_DIM = 3, 10, 7, 8


def tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, HEADS, TOKENS, HEAD_DIM), (2, HEADS, ROWS, HEAD_DIM), (2, HEADS, ROWS, HEAD_DIM))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def log(number):
    return torch.tensor(math.log(number) if number else -math.inf, dtype=torch.float64)


def padded(q, k, v, number):
    return F.scaled_dot_product_attention(q, F.pad(k, (0, 0, 0, number)), F.pad(v, (0, 0, 0, number)))


@pytest.fixture(params=["flash", "row"])
def way(request, monkeypatch):
    """FlashAttention's log-sum-exp, and the one row of zeros where there is none."""
    monkeypatch.setattr(attention, "has_flash", lambda *_: request.param == "flash")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("number", [0, 1, 5, 505])
def test_counted_rows_are_worth_as_much_as_rows_that_are_there_and_so_are_all_gradients(error, number):
    q, k, v = tensors()
    direction = torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, expected = attend_with_zeros(q, k, v, log(number)), padded(q, k, v, number)
    assert error(found, expected) < 1e-14
    for mine, other in zip(*(torch.autograd.grad(out, (q, k, v), direction) for out in (found, expected)), strict=True):
        assert error(mine, other) < 1e-13


@pytest.mark.usefixtures("way")
def test_a_constant_log_sum_exp_would_give_other_gradients(error):
    q, k, v = tensors()
    found = torch.autograd.grad(attend_with_zeros(q, k, v, log(20)).sum(), q)[0]
    share = torch.sigmoid((q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM)).logsumexp(-1) - math.log(20)).detach()
    wrong = torch.autograd.grad((F.scaled_dot_product_attention(q, k, v) * share[..., None]).sum(), q)[0]
    assert error(found, wrong) > 0.05


@pytest.mark.parametrize("number", [3, 400])
def test_bfloat16_is_as_near_as_with_the_rows_themselves(error, number):
    exact = padded(*tensors(), number)
    rounded = tensors(torch.bfloat16)
    folded = error(attend_with_zeros(*rounded, log(number).float()), exact)
    assert folded < 1.2 * error(padded(*rounded, number), exact)


def test_half_precision_without_flash_attention_does_not_fold():
    cpu = torch.device("cpu")
    assert can_fold(cpu, torch.bfloat16, 64)
    assert can_fold(torch.device("mps"), torch.float32, 64)
    assert not can_fold(torch.device("mps"), torch.bfloat16, 64)
    assert not can_fold(cpu, torch.float16, 64)
    assert not can_fold(torch.device("cuda"), torch.bfloat16, 12)  # torch would pad the heads
