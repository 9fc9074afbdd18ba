"""The linear with a low-rank update, and several of them on one input in as few products and passes as possible."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.compiler import is_compiling

from anima_train.model.quantized import QuantizedProducts, QuantizedWeight, quantized_gradient, quantized_outputs

SHORTEST = 1e-6  # length of a row of a weight that is divided by


class AdaptedLinear(nn.Linear):
    """A frozen linear and a trained update of it.

    Args:
        base: the linear; its parameters, or its quantised weight, become this module's.
        scale: factor on the update.
        dropout: share of the update's inputs set to zero in training.
    """

    def __init__(self, base: nn.Linear, scale: float, dropout: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.dropout = scale, dropout

    def starts(self) -> list[tuple[nn.Parameter, Tensor | None]]:
        """Return the parameters with which the update is none, and their values then; None: zero."""
        raise NotImplementedError


class LoraLinear(AdaptedLinear):
    """A frozen linear and its low-rank update, `y = x W^T + b + scale x A^T B^T` (LoRA, arXiv:2106.09685).

    With limits, of each sample at noise level t only the rows of A with `t <= limit` act (T-LoRA, arXiv:2507.05964).

    Args:
        base: the linear; its parameters, or its quantised weight, become this module's.
        lora_a: (rank, in), trained; its dtype may be another than the base's, which is what is computed in.
        lora_b: (out, rank), trained.
        scale: alpha / rank.
        dropout: share of the update's inputs set to zero in training.
        limits: (rank,), float32; None: all rows act at any t.
    """

    def __init__(
        self, base: nn.Linear, lora_a: Tensor, lora_b: Tensor, scale: float, dropout: float,
        limits: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(base, scale, dropout)
        self.lora_A, self.lora_B = nn.Parameter(lora_a), nn.Parameter(lora_b)
        self.lora_limits = limits  # no buffer: processes would exchange it in each pass

    def starts(self) -> list[tuple[nn.Parameter, Tensor | None]]:
        """Return B, which is zero at the start."""
        return [(self.lora_B, None)]

    def scaled(self, out: Tensor) -> Tensor:
        """Return the linear's output, of base and update together."""
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(lora_outputs(x, [self])[0])


class DoraLinear(LoraLinear):
    """A linear with a low-rank update and lengths of its rows that are trained by themselves (DoRA, arXiv:2402.09353).

    `y = x W'^T + b`, `W' = m (W + scale B A) / ||W + scale B A||` by rows. As its authors say, the lengths that are
    divided by count as constants for gradients.

    Args:
        norms: ||W|| by rows, (out,), with which the trained lengths m begin.
    """

    def __init__(
        self, base: nn.Linear, lora_a: Tensor, lora_b: Tensor, scale: float, dropout: float, norms: Tensor
    ) -> None:
        super().__init__(base, lora_a, lora_b, scale, dropout)
        self.has_bias = base.bias is not None
        self.lora_norms = nn.Parameter(norms, requires_grad=False)
        self.lora_magnitude = nn.Parameter(norms.clone())

    def starts(self) -> list[tuple[nn.Parameter, Tensor | None]]:
        """Return B, zero at the start, and the lengths of the rows."""
        return [(self.lora_B, None), (self.lora_magnitude, self.lora_norms)]

    @torch.no_grad()
    def current_norms(self) -> Float[Tensor, " out"]:
        """Return ||W + scale B A|| by rows without that sum: ||W||^2 + 2 W (scale B A) + ||scale B A||^2 by rows."""
        with torch.autocast(self.weight.device.type, enabled=False):
            up = self.lora_B.float() * self.scale
            down = self.lora_A.float()
            products = (self.weight @ self.lora_A.to(self.weight.dtype).t()).float()  # (out, rank)
            added = (up * (2 * products + up @ (down @ down.t()))).sum(dim=1)
        norms = self.lora_norms.float().clamp_min(SHORTEST)  # a row of zeros has no direction to keep
        return norms * (1 + added / norms.square()).clamp_min(SHORTEST).sqrt()  # with B = 0 the same bits

    def scaled(self, out: Tensor) -> Tensor:
        """Return the output with the lengths of the rows; of base and update together, without the bias."""
        # The difference from 1 has more digits in bfloat16 than what is near 1.
        gain = (self.lora_magnitude / self.current_norms() - 1).to(out.dtype)
        return torch.addcmul(out, out - self.bias if self.has_bias else out, gain)


def project(x: Float[Tensor, "... D"], *linears: nn.Linear, t: Float[Tensor, "B 1"] | None = None) -> list[Tensor]:
    """Return the outputs of linears that read the same input; low-rank updates share their first product.

    Args:
        x: the input, B samples.
        linears: that read it.
        t: noise levels, for updates with limits; None: the whole of each acts.
    """
    adapted = [linear for linear in linears if isinstance(linear, LoraLinear)]
    if len(adapted) < len(linears):
        return [project(x, each, t=t)[0] if isinstance(each, LoraLinear) else each(x) for each in linears]
    return [linear.scaled(out) for linear, out in zip(adapted, lora_outputs(x, adapted, t), strict=True)]


def lora_outputs(
    x: Float[Tensor, "... D"], linears: Sequence[LoraLinear], t: Float[Tensor, "B 1"] | None = None
) -> list[Tensor]:
    """Return the outputs of linears with a low-rank update that read the same input, in its dtype; see `project`."""
    tokens = x.flatten(0, -2)  # (N, D)
    dropout = linears[0].dropout if linears[0].training else 0.0
    dropped = F.dropout(tokens, dropout) if dropout else None
    down = down_weights(linears).to(x.dtype)
    ups = [linear.lora_B.to(x.dtype) for linear in linears]
    limits = [linear.lora_limits for linear in linears if linear.lora_limits is not None]  # of all, or of none
    mask = None
    if t is not None and limits:
        highest = limits[0] if len(limits) == 1 else torch.cat(limits)
        mask = t.view(-1, *[1] * (x.ndim - 1)) <= highest  # (B, 1, ranks)
    # A compiler makes the products itself, and autocast rules the dtypes of float32 weights: torch's own gradients.
    if is_compiling() or torch.is_autocast_enabled(x.device.type):
        low = masked(F.linear(tokens if dropped is None else dropped, down), mask, x.shape)
        parts = low.split([len(linear.lora_A) for linear in linears], dim=-1)
        weights = quantized_weights(linears)
        bases = QuantizedProducts.apply(tokens, weights) if weights else base_outputs(tokens, linears)
        outputs: Sequence[Tensor] = [
            # Eager in place, or "selective" would keep both products; autocast leaves the dtypes there alone.
            torch.addmm(base, part, up.t()) if is_compiling() else base.addmm_(part, up.to(base.dtype).t())
            for base, part, up in zip(bases, parts, ups, strict=True)
        ]
    else:
        outputs = LoraProducts.apply(tokens, dropped, down, mask, x.shape, linears, *ups)
    return [output.unflatten(0, x.shape[:-1]) for output in outputs]


def quantized_weights(linears: Sequence[Any]) -> list[QuantizedWeight]:
    """Return the base weights of linears that read the same input, if they are quantised: all are, or none is."""
    weights = (linear.weight for linear in linears)
    return [weight for weight in weights if isinstance(weight, QuantizedWeight)]


def base_outputs(tokens: Float[Tensor, "N D"], linears: Sequence[AdaptedLinear]) -> list[Tensor]:
    """Return the outputs of linears without their updates."""
    if weights := quantized_weights(linears):
        return quantized_outputs(tokens, weights)
    return [F.linear(tokens, linear.weight, linear.bias) for linear in linears]


def base_gradient(gradients: Sequence[Tensor], linears: Sequence[AdaptedLinear]) -> Float[Tensor, "N D"]:
    """Return the gradient of the input of `base_outputs`."""
    if weights := quantized_weights(linears):
        return quantized_gradient(gradients, weights)
    token_gradient = gradients[0] @ linears[0].weight
    for gradient, linear in zip(gradients[1:], linears[1:], strict=True):
        token_gradient.addmm_(gradient, linear.weight)
    return token_gradient


def down_weights(linears: Sequence[LoraLinear]) -> Float[Tensor, "ranks D"]:
    """Return A of all linears, one below the other, times their scales."""
    weights = [linear.lora_A if linear.scale == 1 else linear.lora_A * linear.scale for linear in linears]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def masked(
    low: Float[Tensor, "N ranks"], mask: Bool[Tensor, "B ... ranks"] | None, shape: torch.Size
) -> Float[Tensor, "N ranks"]:
    """Return products of A with an input of some shape, samples first; zeros for rows that do not act on a sample."""
    # By shape and not by (B, -1): the quotient in it is half of the time that the compiler takes to trace a block.
    return low if mask is None else (low.unflatten(0, shape[:-1]) * mask).flatten(0, -2)


class LoraProducts(torch.autograd.Function):
    """The products of `lora_outputs`: each update is added by the product that makes it, forward and backward.

    Kept for the backward pass are the input and its products with A. The base weights get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, dropped: Tensor | None, down: Tensor, mask: Tensor | None, shape: torch.Size,
        linears: Sequence[LoraLinear], *ups: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        read = tokens if dropped is None else dropped  # by the updates
        low = masked(read @ down.t(), mask, shape)
        ctx.linears, ctx.ranks, ctx.has_dropout = linears, [up.shape[1] for up in ups], dropped is not None
        ctx.shape = shape
        ctx.save_for_backward(read, low, down, mask, *ups)
        return tuple(
            base.addmm_(part, up.t())
            for base, part, up in zip(base_outputs(tokens, linears), low.split(ctx.ranks, dim=1), ups, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        read, low, down, mask, *ups = ctx.saved_tensors
        low_gradients = [gradient @ up for gradient, up in zip(gradients, ups, strict=True)]
        low_gradient = low_gradients[0] if len(ups) == 1 else torch.cat(low_gradients, dim=1)
        low_gradient = masked(low_gradient, mask, ctx.shape)
        up_gradients = [
            gradient.t() @ part for gradient, part in zip(gradients, low.split(ctx.ranks, dim=1), strict=True)
        ]
        down_gradient = low_gradient.t() @ read
        token_gradient = dropped_gradient = None
        if ctx.needs_input_grad[0]:
            token_gradient = base_gradient(gradients, ctx.linears)
            if ctx.has_dropout:
                dropped_gradient = low_gradient @ down
            else:
                token_gradient.addmm_(low_gradient, down)
        return token_gradient, dropped_gradient, down_gradient, None, None, None, *up_gradients
