"""Layers that the transformer and the LLM adapter share, in as few passes over memory as torch has for them."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.compiler import is_compiling

EPS = 1e-6  # of every norm


class RMSNorm(nn.Module):
    """The root-mean-square norm, computed in float32 whatever the dtype of x, eps 1e-6."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype == torch.float32 and x.device.type == "cpu" and not is_compiling():
            return RowNorm.apply(x, self.weight)
        if x.dtype == self.weight.dtype:  # torch's own computes in float32 and rounds once; one kernel on CUDA
            return F.rms_norm(x, self.weight.shape, self.weight, eps=EPS)
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), eps=EPS).to(x.dtype)


class RowNorm(torch.autograd.Function):
    """The same on the CPU, where torch has no kernel for it and keeps every intermediate for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(EPS).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, inverse = ctx.saved_tensors
        weighted = gradient * weight
        mean = (weighted * x).mean(dim=-1, keepdim=True)
        x_gradient = weighted.mul_(inverse).addcmul_(x, mean.mul_(inverse**3), value=-1)
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = (gradient * x * inverse).flatten(0, -2).sum(dim=0)
        return x_gradient, weight_gradient


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Apply the rotary embedding in its rotate-half form.

    Args:
        x: (..., d).
        cos: of the angles, broadcast to x.
        signed_sin: of the angles, negative in the first half, as `rope_values` gives it.
    """
    if is_compiling():
        first, second = x.chunk(2, dim=-1)
        return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), signed_sin)
    return Rotation.apply(x, cos, signed_sin)


class Rotation(torch.autograd.Function):
    """The rotary embedding, whose gradient is turned back: three passes each way, and nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, signed_sin)
        return turned(x, cos, signed_sin, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, signed_sin = ctx.saved_tensors
        return turned(gradient, cos, signed_sin, -1), None, None


def turned(x: Tensor, cos: Tensor, signed_sin: Tensor, direction: int) -> Tensor:
    """Return x turned by the angles, or by their negatives for a direction of -1."""
    out = x * cos
    halves = zip(out.chunk(2, dim=-1), reversed(x.chunk(2, dim=-1)), signed_sin.chunk(2, dim=-1), strict=True)
    for half, other, sin in halves:
        half.addcmul_(other, sin, value=direction)
    return out


def rope_values(angles: Float[Tensor, "N d/2"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and signed sin (N, d) of float32 angles for `rotate`, rounded to a dtype."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def modulate(
    x: Float[Tensor, "B N D"], shift: Float[Tensor, "B D"], one_plus_scale: Float[Tensor, "B D"]
) -> Float[Tensor, "B N D"]:
    """Return `norm(x) * (1 + scale) + shift`, where the LayerNorm has no parameters and is not rounded before."""
    if is_compiling():  # fused into one pass, for any batch size
        norm = F.layer_norm(x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1:], eps=EPS)
        return (norm * one_plus_scale[:, None] + shift[:, None]).to(x.dtype)
    # Each sample's modulation is what torch's kernel takes for the norm's own parameters: one pass each way, and the
    # gradients of shift and scale in one more.
    if len(x) == 1:  # without a copy of the gradient
        return F.layer_norm(x, one_plus_scale.shape[1:], one_plus_scale.squeeze(0), shift.squeeze(0), EPS)
    rows = zip(x.unbind(), one_plus_scale.unbind(), shift.unbind(), strict=True)
    return torch.stack([F.layer_norm(tokens, scale.shape, scale, bias, EPS) for tokens, scale, bias in rows])


def add_gated(x: Float[Tensor, "B N D"], update: Float[Tensor, "B N D"], gate: Float[Tensor, "B D"]) -> Tensor:
    """Return `x + gate * update`, (B, N, D)."""
    return torch.addcmul(x, update, gate[:, None]) if is_compiling() else GatedSum.apply(x, update, gate)


class GatedSum(torch.autograd.Function):
    """The same in one pass, and two back; torch's own gradient multiplies the update by 1 in a pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(update, gate)
        return torch.addcmul(x, update, gate[:, None])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        update, gate = ctx.saved_tensors
        gate_gradient = (gradient * update).sum(dim=1) if ctx.needs_input_grad[2] else None
        return gradient, gradient * gate[:, None], gate_gradient
