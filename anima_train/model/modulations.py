"""The modulations of all blocks, which depend on t alone, in a few products before the first block.

Each block has three pairs of small linears for one token a sample: one by one they are a third of a step's kernels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from anima_train.model.lora_linear import LoraLinear


class LinearBatch:
    """Frozen linears of one shape, with low-rank updates or without, as one batch of products.

    Their weights become views of one tensor, so that nothing is held twice.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.linears = linears
        self.adapted = [linear for linear in linears if isinstance(linear, LoraLinear)]
        self.weight = self.shared()

    def shared(self) -> Float[Tensor, "n out in"]:
        """Make the linears' weights views of one tensor, and return that."""
        weights = torch.stack([linear.weight.detach() for linear in self.linears])
        for linear, weight in zip(self.linears, weights.unbind(), strict=True):
            linear.weight.data = weight
        return weights

    @staticmethod
    def fits(linears: Sequence[nn.Linear]) -> bool:
        """Return True if these linears can be computed as one batch."""
        kinds = {(type(linear), linear.lora_A.shape if isinstance(linear, LoraLinear) else None) for linear in linears}
        return len(kinds) == 1 and not any(linear.weight.requires_grad for linear in linears)

    def __call__(self, x: Tensor) -> Float[Tensor, "n B out"]:
        """Return each linear's output for x, (B, in) for all or (n, B, in)."""
        now = self.linears[0].weight
        if (now.device, now.dtype) != (self.weight.device, self.weight.dtype):  # the model has been moved
            self.weight = self.shared()
        out = product(x, self.weight)
        if not self.adapted:
            return out
        first = self.adapted[0]
        if first.training and first.dropout:
            x = F.dropout(x.expand(len(self.weight), *x.shape[-2:]), first.dropout)
        down = torch.stack([linear.lora_A for linear in self.adapted])
        up = torch.stack([linear.lora_B for linear in self.adapted])
        low = product(x, (down if first.scale == 1 else down * first.scale).to(x.dtype))
        return torch.baddbmm(out, low, up.to(x.dtype).transpose(1, 2))


def product(x: Tensor, weights: Float[Tensor, "n out in"]) -> Float[Tensor, "n B out"]:
    """Return x (B, in), or x (n, B, in) one by one, times each weight's transpose."""
    if x.ndim == 2:
        return F.linear(x, weights.flatten(0, 1)).unflatten(-1, weights.shape[:2]).transpose(0, 1)
    return torch.bmm(weights, x.transpose(1, 2)).transpose(1, 2)  # the weights are what is read: row by row


def split_modulations(out: Float[Tensor, "n B 3*D"]) -> list[tuple[Tensor, ...]]:
    """Return shift, 1 + scale and gate, each (B, D), of each of a block's three parts, in a row; block by block."""
    shift, scale, gate = out.chunk(3, dim=-1)
    parts = zip(shift.unbind(), (1 + scale).unbind(), gate.unbind(), strict=True)
    values = [value for part in parts for value in part]
    return [tuple(values[start : start + 9]) for start in range(0, len(values), 9)]
