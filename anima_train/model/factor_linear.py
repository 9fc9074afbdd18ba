"""The linear whose update is made of other factors than LoRA's: LoKr's Kronecker product, LoHa's Hadamard product."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.compiler import is_compiling

from anima_train.model.lora_linear import AdaptedLinear, base_gradient, base_outputs, quantized_weights
from anima_train.model.quantized import QuantizedProducts

FactorKind = Literal["lokr", "loha"]


class FactorLinear(AdaptedLinear):
    """A frozen linear and an update of its weight by factors: `y = x W^T + b + x D^T`, D made of the factors.

    Args:
        base: the linear; its parameters, or its quantised weight, become this module's.
        kind: of the factors.
        factors: by their names, in the order that the kind takes; trained.
        zero: name of the one that is zero at the start.
        scale: factor on the update.
        dropout: share of the update's inputs set to zero in training.
    """

    def __init__(
        self, base: nn.Linear, kind: FactorKind, factors: Mapping[str, Tensor], zero: str, scale: float, dropout: float
    ) -> None:
        super().__init__(base, scale, dropout)
        self.kind: FactorKind = kind
        self.names, self.zero = tuple(factors), zero
        for name, values in factors.items():
            self.register_parameter(name, nn.Parameter(values))

    @property
    def factors(self) -> list[nn.Parameter]:
        """The factors, in order."""
        return [self.get_parameter(name) for name in self.names]

    def starts(self) -> list[tuple[nn.Parameter, Tensor | None]]:
        """Return the factor that is zero at the start."""
        return [(self.get_parameter(self.zero), None)]

    def forward(self, x: Float[Tensor, "... D"]) -> Tensor:
        tokens = x.flatten(0, -2)  # (N, D)
        dropped = F.dropout(tokens, self.dropout) if self.training and self.dropout else None
        if is_compiling() or torch.is_autocast_enabled(x.device.type):  # as in `lora_outputs`
            weights = quantized_weights([self])
            (base,) = QuantizedProducts.apply(tokens, weights) if weights else base_outputs(tokens, [self])
            read = tokens if dropped is None else dropped
            out = base + UPDATES[self.kind](read, self.factors, self.scale).to(base.dtype)
        else:
            out = FactorProduct.apply(tokens, dropped, self, *self.factors)
        return out.unflatten(0, x.shape[:-1])


class FactorProduct(torch.autograd.Function):
    """The output of a `FactorLinear`. Kept for the backward pass is the input alone, the update is made again."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, dropped: Tensor | None, linear: FactorLinear, *factors: Tensor) -> Tensor:
        read = tokens if dropped is None else dropped
        ctx.linear, ctx.has_dropout = linear, dropped is not None
        ctx.save_for_backward(read, *factors)
        (base,) = base_outputs(tokens, [linear])
        # Not in place: selective checkpointing keeps the base's product, and makes the update again.
        return base + update_output(linear.kind, read, list(factors), linear.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        read, *factors = ctx.saved_tensors
        make = GRADIENTS[ctx.linear.kind]
        read_gradient, *factor_gradients = make(gradient, read, factors, ctx.linear.scale)
        token_gradient = None
        if ctx.needs_input_grad[0]:
            token_gradient = base_gradient([gradient], [ctx.linear])
            if not ctx.has_dropout:
                token_gradient = token_gradient.add_(read_gradient)
        return token_gradient, read_gradient if ctx.has_dropout else None, None, *factor_gradients


def lokr_update(read: Float[Tensor, "N D"], factors: Sequence[Tensor], scale: float) -> Float[Tensor, "N out"]:
    """Return `scale x kron(w1, w2)^T` without the product of w1 and w2.

    Args:
        read: the input x.
        factors: w1 (o1, i1) and w2 (o2, i2), or w1 and the two factors of w2, (o2, rank) and (rank, i2).
        scale: factor on the update.
    """
    first, *second = factors
    rows = read.unflatten(-1, (first.shape[1], -1))  # (N, i1, i2)
    for factor in reversed(second):
        rows = rows @ factor.to(read.dtype).t()  # (N, i1, o2)
    return torch.matmul((first if scale == 1 else first * scale).to(rows.dtype), rows).flatten(-2)


def loha_delta(factors: Sequence[Tensor], scale: float) -> Float[Tensor, "out in"]:
    """Return `scale (w1_a w1_b) * (w2_a w2_b)`, elementwise."""
    first_a, first_b, second_a, second_b = factors
    return (first_a @ first_b) * (second_a @ second_b) * scale


def loha_update(read: Float[Tensor, "N D"], factors: Sequence[Tensor], scale: float) -> Float[Tensor, "N out"]:
    """Return the input times the transpose of `loha_delta`."""
    return F.linear(read, loha_delta(factors, scale).to(read.dtype))


Update = Callable[[Tensor, Sequence[Tensor], float], Tensor]
UPDATES: dict[str, Update] = {"lokr": lokr_update, "loha": loha_update}


@torch.library.custom_op("anima_train::update_output", mutates_args=())
def update_output(kind: str, read: Tensor, factors: Sequence[Tensor], scale: float) -> Tensor:
    """Return an update's output, as an operation of its own: selective checkpointing keeps none of its products."""
    return UPDATES[kind](read, factors, scale)


@update_output.register_fake
def _(kind: str, read: Tensor, factors: Sequence[Tensor], scale: float) -> Tensor:
    return UPDATES[kind](read, factors, scale)


def lokr_gradients(gradient: Tensor, read: Tensor, factors: Sequence[Tensor], scale: float) -> tuple[Tensor, ...]:
    """Return the gradients of the input and of each factor of `lokr_update`."""
    first, *second = (factor.to(read.dtype) for factor in factors)
    passed = [read.unflatten(-1, (first.shape[1], -1))]  # (N, i1, ...), before each of the second's factors
    for factor in reversed(second):
        passed.append(passed[-1] @ factor.t())
    outer = gradient.unflatten(-1, (len(first), -1))  # (N, o1, o2)
    of_first = outer.transpose(0, 1).flatten(1) @ passed.pop().transpose(0, 1).flatten(1).t()
    inner = torch.matmul(first.t() * scale, outer)  # (N, i1, o2)
    of_second = []
    for factor in second:
        of_second.append(inner.flatten(0, 1).t() @ passed.pop().flatten(0, 1))
        inner = inner @ factor
    of_factors = [of_first * scale, *of_second]
    return inner.flatten(1), *(found.to(factor.dtype) for found, factor in zip(of_factors, factors, strict=True))


def loha_gradients(gradient: Tensor, read: Tensor, factors: Sequence[Tensor], scale: float) -> tuple[Tensor, ...]:
    """Return the gradients of the input and of each factor of `loha_update`."""
    first_a, first_b, second_a, second_b = factors
    first, second = first_a @ first_b, second_a @ second_b
    of_delta = (gradient.t() @ read).to(first.dtype) * scale
    of_first, of_second = of_delta * second, of_delta * first
    of_read = gradient @ (first * second * scale).to(gradient.dtype)
    return (
        of_read, of_first @ first_b.t(), first_a.t() @ of_first, of_second @ second_b.t(), second_a.t() @ of_second
    )  # fmt: skip


Gradients = Callable[[Tensor, Tensor, Sequence[Tensor], float], tuple[Tensor, ...]]
GRADIENTS: dict[str, Gradients] = {"lokr": lokr_gradients, "loha": loha_gradients}
