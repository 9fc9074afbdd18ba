"""Attention to counted rows of zeros against attention to the rows themselves."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from anima_train.core.text_batch import fold_rows, pad_rows, row_bias
from anima_train.model import attention
from anima_train.model.attention import attend_with_zeros, can_fold, folds_exactly
from anima_train.model.dit import MiniTrainDIT, TransformerShape

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


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_a_transformer_that_may_not_count_computes_the_rows(error, dtype, bound):
    model = MiniTrainDIT(TransformerShape(1, 48, 24, 16, 20, 8))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.2).to(dtype)
    x, t, text = torch.randn(2, 16, 1, 4, 6), torch.rand(2, 1), torch.randn(2, 9, 20)
    counted = model(x, t, fold_rows(text))
    model.folds_zeros = False
    computed = model(x, t, fold_rows(text))
    assert error(counted, computed) < bound
    assert torch.equal(computed, model(x, t, pad_rows(text)))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("counts", [True, False])
def test_a_caption_has_its_own_rows_beside_a_longer_one(error, dtype, bound, counts):
    """A caption of 20 tokens has 512 rows, alone and in a batch with one of 701."""
    model = MiniTrainDIT(TransformerShape(1, 48, 24, 16, 20, 8))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.2).to(dtype)
    model.folds_zeros = counts
    x, t = torch.randn(3, 16, 1, 4, 6), torch.rand(3, 1)
    lengths = (701, 20, 530)
    texts = [torch.randn(length, 20, generator=generator) for length in lengths]
    context = fold_rows(pad_sequence(texts, batch_first=True), row_bias(lengths))
    together = model(x, t, context)
    alone = torch.cat([model(x[[place]], t[[place]], pad_rows(text[None])) for place, text in enumerate(texts)])
    shared = model(x, t, fold_rows(context.rows))  # 701 rows for all
    assert error(together, alone) < bound
    if dtype == torch.float32:
        assert error(shared[1:], alone[1:]) > 100 * bound


def test_rows_are_hidden_only_where_a_batch_has_captions_of_both_kinds():
    assert row_bias([3, 512, 40]) is None
    assert row_bias([600, 600]) is None
    assert row_bias([600]) is None
    found = row_bias([514, 1, 513])
    assert found is not None
    assert found.shape == (3, 1, 1, 514)
    assert found.isinf().sum(-1).flatten().tolist() == [0, 2, 1]
    assert found[1, 0, 0, 511:].tolist() == [0, -math.inf, -math.inf]


def test_the_question_at_a_gpus_start_finds_a_wrong_log_sum_exp(monkeypatch):
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        assert folds_exactly(cpu, dtype, 16)
    logaddexp = torch.logaddexp
    monkeypatch.setattr(torch, "logaddexp", lambda lse, log: logaddexp(lse * math.log2(math.e), log))  # in base 2
    assert not folds_exactly(cpu, torch.bfloat16, 16)
    assert not folds_exactly(torch.device("mps"), torch.bfloat16, 16)


def test_half_precision_without_flash_attention_does_not_fold():
    cpu = torch.device("cpu")
    assert can_fold(cpu, torch.bfloat16, 64)
    assert can_fold(torch.device("mps"), torch.float32, 64)
    assert not can_fold(torch.device("mps"), torch.bfloat16, 64)
    assert not can_fold(cpu, torch.float16, 64)
    assert not can_fold(torch.device("cuda"), torch.bfloat16, 12)  # torch would pad the heads
