"""Attention to text whose padding is not computed.

Cross-attention masks nothing: a row of zeros past the caption has the key 0 and the value 0, so it adds exp(0) to the
softmax's denominator and nothing else. With the log-sum-exp over the real rows, n zero rows are worth

    output * sigmoid(lse - ln n)    and    logaddexp(lse, ln n)

exactly, and FlashAttention's own backward pass, given these two, returns the exact gradients.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

aten = torch.ops.aten

Heads = Float[Tensor, "B heads N d"]


def attend_with_zeros(
    q: Heads, k: Heads, v: Heads, log_zeros: Float[Tensor, ""] | Float[Tensor, "B 1 1 N"] | None
) -> Heads:
    """Return the attention of q to k and v and further rows of zeros.

    Args:
        q: queries.
        k: keys of the rows that are not zero.
        v: their values.
        log_zeros: the logarithm of the number of zero rows, float32; minus infinity, or None, for none. Or, where none
            follow, a bias on the logits of the rows themselves, of which some are there for a longer caption.
    """
    if log_zeros is None:
        return F.scaled_dot_product_attention(q, k, v)
    if log_zeros.dim() > 0:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=log_zeros.to(q.dtype))
    if has_flash(q.device, q.dtype, q.shape[-1]):
        return FoldedAttention.apply(q, k, v, log_zeros)
    assert q.dtype.itemsize > 2, "a logit in half precision is not exact enough: see can_fold"
    # One row of zeros for all, its logit the logarithm of their number.
    bias = F.pad(q.new_zeros(k.shape[-2]), (0, 1)) + F.pad(log_zeros.to(q.dtype)[None], (k.shape[-2], 0))
    return F.scaled_dot_product_attention(q, F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), attn_mask=bias[None])


def can_fold(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return True if rows of zeros can be counted instead of computed without loss."""
    return dtype.itemsize > 2 or has_flash(device, dtype, head_dim)


def has_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return True if torch's FlashAttention, which tells the log-sum-exp, runs here."""
    if device.type == "cpu":
        return dtype != torch.float16
    fits = dtype.itemsize == 2 and head_dim % 8 == 0 and head_dim <= 256
    return device.type == "cuda" and torch.version.hip is None and fits and has_tensor_cores(device)


def has_tensor_cores(device: torch.device) -> bool:
    """Return True if a CUDA device is of the Ampere generation or newer, as torch's FlashAttention asks."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def folds_exactly(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return True if this device's FlashAttention gives with counted zeros what it gives with the rows themselves.

    Asked once at the start of a run on a GPU: a log-sum-exp of another kind would train another model in silence.
    """
    if not has_flash(device, dtype, head_dim):
        return False
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 1, 2, 64, head_dim, generator=generator).to(device, dtype)
    q, k, v, direction = (tensor.requires_grad_() for tensor in values.unbind())
    number = 200
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            whole = F.scaled_dot_product_attention(q, F.pad(k, (0, 0, 0, number)), F.pad(v, (0, 0, 0, number)))
        folded = FoldedAttention.apply(q, k, v, torch.tensor(math.log(number), device=device))
        pairs = zip(
            (folded, *torch.autograd.grad(folded, (q, k, v), direction)),
            (whole, *torch.autograd.grad(whole, (q, k, v), direction)),
            strict=True,
        )
        tolerance = 0.05 if dtype.itemsize == 2 else 1e-4
        return all(bool((mine - other).norm() <= tolerance * other.norm()) for mine, other in pairs)
    except RuntimeError:
        return False


class FoldedAttention(torch.autograd.Function):
    """FlashAttention with rows of zeros folded into its result."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_zeros: Tensor) -> Tensor:
        if q.device.type == "cpu":
            real, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
            ctx.lengths, random = (), ()
        else:
            real, lse, *sequences, max_q, max_k, seed, offset, _ = aten._scaled_dot_product_flash_attention(q, k, v)
            ctx.lengths, random = (max_q, max_k), (*sequences, seed, offset)
        share = torch.sigmoid(lse - log_zeros)[..., None]  # of the real rows; float32: bfloat16 has but 8 bits
        # Not in place: a checkpoint may have kept what the kernel gave.
        out = (
            (real * share).to(q.dtype)
            if torch.compiler.is_compiling()
            else torch.mul(real, share, out=torch.empty_like(real))
        )
        ctx.save_for_backward(q, k, v, out, torch.logaddexp(lse, log_zeros), *random)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *random = ctx.saved_tensors
        if q.device.type == "cpu":
            gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient.contiguous(), q, k, v, out, lse, 0.0, False
            )
        else:
            cum_q, cum_k, seed, offset = random
            gradients = aten._scaled_dot_product_flash_attention_backward(
                gradient, q, k, v, out, lse, cum_q, cum_k, *ctx.lengths, 0.0, False, seed, offset
            )
        return (*gradients, None)
