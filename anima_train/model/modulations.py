"""The modulations of all blocks, which depend on t alone, in a few products before the first block.

Each block has three pairs of small linears for one token a sample: one by one they are a third of a step's kernels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from anima_train.core.transfers import to_device
from anima_train.model.lora_linear import LoraLinear, project


class LinearBatch:
    """Frozen linears of one shape, all, some or none of them with low-rank updates, as one batch of products.

    Their weights become views of one tensor, so that nothing is held twice.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.linears = linears
        self.adapted = [linear for linear in linears if isinstance(linear, LoraLinear)]
        self.weight = self.shared()

    def shared(self) -> Float[Tensor, "n out in"]:
        """Make the linears' weights views of one tensor, and return that; note the places where updates are."""
        weights = torch.stack([linear.weight.detach() for linear in self.linears])
        for linear, weight in zip(self.linears, weights.unbind(), strict=True):
            linear.weight.data = weight
        if 0 < len(self.adapted) < len(self.linears):
            places = [place for place, linear in enumerate(self.linears) if isinstance(linear, LoraLinear)]
            self.places = to_device(torch.tensor(places, dtype=torch.long), weights.device)
        return weights

    @staticmethod
    def fits(linears: Sequence[nn.Linear]) -> bool:
        """Return True if these linears can be computed as one batch: updates of one kind are computed together."""
        updates = [linear for linear in linears if type(linear) is not nn.Linear]
        loras = [linear for linear in updates if type(linear) is LoraLinear]
        kinds = {(linear.lora_A.shape, linear.scale, linear.dropout) for linear in loras}
        same = len(loras) == len(updates) and len(kinds) <= 1
        return same and not any(linear.weight.requires_grad for linear in linears)

    def __call__(self, x: Tensor, t: Float[Tensor, "B 1"] | None) -> Float[Tensor, "n B out"]:
        """Return each linear's output for x, (B, in) for all or (n, B, in); t as for `project`."""
        now = self.linears[0].weight
        if (now.device, now.dtype) != (self.weight.device, self.weight.dtype):  # the model has been moved
            self.weight = self.shared()
        out = product(x, self.weight)
        if not self.adapted:
            return out
        first, are_all = self.adapted[0], len(self.adapted) == len(self.linears)
        if x.ndim == 3 and not are_all:
            x = x.index_select(0, self.places)
        if first.training and first.dropout:
            x = F.dropout(x.expand(len(self.adapted), *x.shape[-2:]), first.dropout)
        down = torch.stack([linear.lora_A for linear in self.adapted])
        up = torch.stack([linear.lora_B for linear in self.adapted])
        low = product(x, (down if first.scale == 1 else down * first.scale).to(x.dtype))
        if t is not None and first.lora_limits is not None:
            low = low * (t <= first.lora_limits)
        up = up.to(x.dtype).transpose(1, 2)
        if are_all:
            return torch.baddbmm(out, low, up)
        return out.index_add(0, self.places, torch.bmm(low, up))


def product(x: Tensor, weights: Float[Tensor, "n out in"]) -> Float[Tensor, "n B out"]:
    """Return x (B, in), or x (n, B, in) one by one, times each weight's transpose."""
    if x.ndim == 2:
        return F.linear(x, weights.flatten(0, 1)).unflatten(-1, weights.shape[:2]).transpose(0, 1)
    return torch.bmm(weights, x.transpose(1, 2)).transpose(1, 2)  # the weights are what is read: row by row


def modulation_of(
    pair: nn.Sequential, emb: Float[Tensor, "B D"], t: Float[Tensor, "B 1"] | None
) -> Float[Tensor, "B 3*D"]:
    """Return what a pair of linears makes of the timestep; t as for `project`."""
    for linear in (pair[1], pair[2]):
        assert isinstance(linear, nn.Linear)
        (emb,) = project(emb, linear, t=t)
    return emb


def split_modulations(out: Float[Tensor, "n B 3*D"]) -> list[tuple[Tensor, ...]]:
    """Return shift, 1 + scale and gate, each (B, D), of each of a block's three parts, in a row; block by block."""
    shift, scale, gate = out.chunk(3, dim=-1)
    parts = zip(shift.unbind(), (1 + scale).unbind(), gate.unbind(), strict=True)
    values = [value for part in parts for value in part]
    return [tuple(values[start : start + 9]) for start in range(0, len(values), 9)]
