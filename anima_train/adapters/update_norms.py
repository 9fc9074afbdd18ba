"""The norms of what a run has added to the base model's weights, by component, measured between steps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from anima_train.adapters.addition import adapted_layers
from anima_train.core.divided import whole
from anima_train.model.dit import MiniTrainDIT
from anima_train.model.factor_linear import FactorLinear, loha_delta
from anima_train.model.lora_linear import SHORTEST, AdaptedLinear, DoraLinear, LoraLinear, quantized_weights
from anima_train.model.quantized import QuantizedWeight
from anima_train.optim.groups import Component, component_of

NUM_EACH = 1024  # weights of each trained tensor, less than twice that


@dataclass
class Squares:
    """Sums of squares of a component, and how many of its weights have moved."""

    update: float = 0.0
    base: float = 0.0
    num_moved: float = 0.0
    num_trained: float = 0.0  # of those that are trained themselves; updates of linears do not count


class UpdateNorms:
    """Measures what was added since the base model. Waits for the device.

    An adapter's update is that of its linears, exactly: a LoRA's |s B A|^2 = s^2 tr(B^T B A A^T) and a LoKr's
    |kron(a, b)| = |a| |b| need no product of their size; a DoRA's is W' - W. Of weights that are trained themselves
    evenly spaced ones are compared with what they were when this was made, before the first step and before a state is
    loaded; the norms are estimates from these. All processes of a divided model call both together.

    Args:
        transformer: with what is trained attached.
    """

    def __init__(self, transformer: MiniTrainDIT) -> None:
        self.transformer = transformer
        self.layers: list[tuple[str, AdaptedLinear]] = list(adapted_layers(transformer))
        adapted = {name for name, _ in self.layers}
        names = [name for name, parameter in transformer.named_parameters() if parameter.requires_grad]
        self.trained = [name for name in names if name.rpartition(".")[0] not in adapted]
        self.first = self.samples()
        self.base: dict[Component, float] | None = None  # of the linears with an update, when it is first needed

    def samples(self) -> dict[str, Float[Tensor, " S"]]:
        """Return evenly spaced values of each trained weight, in the host's memory, float32."""
        weights = self.transformer.weights() if self.trained else {}
        found = {}
        for name in self.trained:
            values = whole(weights[name]).reshape(-1)
            chosen = values[:: max(1, values.numel() // NUM_EACH)]
            found[name] = chosen.to("cpu", torch.float32, copy=True)  # not the weights themselves, which will change
        return found

    def squares(self) -> dict[Component, Squares]:
        """Return the sums of each component that is trained."""
        found: dict[Component, Squares] = {}
        weights = self.transformer.weights() if any(isinstance(each, DoraLinear) for _, each in self.layers) else {}
        updates = [update_square(layer, weights.get(f"{name}.weight")) for name, layer in self.layers]
        for (name, _), square in zip(self.layers, torch.stack(updates).tolist() if updates else (), strict=True):
            found.setdefault(component_of(name), Squares()).update += square
        if self.base is None:
            self.base = base_squares(self.transformer, self.layers)
        for component, square in self.base.items():
            found[component].base += square
        parameters = dict(self.transformer.named_parameters())
        for name, now in self.samples().items():
            sums = found.setdefault(component_of(name), Squares())
            first, number = self.first[name], parameters[name].numel()
            sums.update += float((now.double() - first.double()).square().mean()) * number
            sums.base += float(first.double().square().mean()) * number
            sums.num_moved += float((now != first).double().mean()) * number
            sums.num_trained += number
        return found

    def metrics(self) -> dict[str, float]:
        """Return the numbers to log."""
        values = {}
        for component, sums in self.squares().items():
            values[f"update_norm/{component}"] = math.sqrt(sums.update)
            if sums.base > 0:
                values[f"update_norm_relative/{component}"] = math.sqrt(sums.update / sums.base)
            if sums.num_trained:
                values[f"share_moved_in_run/{component}"] = sums.num_moved / sums.num_trained
        return values


def update_square(layer: AdaptedLinear, weight: Tensor | None) -> Float[Tensor, ""]:
    """Return the squared norm of a linear's update, on its device.

    Args:
        layer: with its update.
        weight: the base's, which DoRA needs.
    """
    if isinstance(layer, DoraLinear):
        assert weight is not None
        return dora_square(layer, weight)
    if isinstance(layer, LoraLinear):
        return layer.scale**2 * product_square(exact(layer.lora_B), exact(layer.lora_A))
    assert isinstance(layer, FactorLinear)
    factors = [exact(factor) for factor in layer.factors]
    if layer.kind == "loha":
        return loha_delta(factors, layer.scale).square().sum()
    first, *second = factors
    of_second = second[0].square().sum() if len(second) == 1 else product_square(*second)
    return layer.scale**2 * first.square().sum() * of_second


def exact(values: Tensor) -> Tensor:
    """Return trained values, whole, in the dtype that sums are made in."""
    dtype = torch.float32 if values.device.type == "mps" else torch.float64  # which Metal has not
    return whole(values).detach().to(dtype)


def product_square(left: Float[Tensor, "m r"], right: Float[Tensor, "r n"]) -> Float[Tensor, ""]:
    """Return the squared norm of a product without making it."""
    return ((right @ right.t()) * (left.t() @ left)).sum().clamp_min(0)


def dora_square(layer: DoraLinear, weight: Tensor) -> Float[Tensor, ""]:
    """Return the squared norm of what a DoRA adds to the base's weight."""
    base = weight.detach().to(layer.lora_A.device, torch.float32)
    added = (layer.lora_B.detach().float() * layer.scale) @ layer.lora_A.detach().float()
    gain = layer.lora_magnitude.detach() / (base + added).norm(dim=1).clamp_min(SHORTEST)
    return (base * (gain - 1)[:, None] + added * gain[:, None]).square().sum().to(exact(gain).dtype)


def base_squares(transformer: MiniTrainDIT, layers: list[tuple[str, AdaptedLinear]]) -> dict[Component, float]:
    """Return the sums of squares of the base weights of linears with an update, by component."""
    weights: Mapping[str, Tensor] = transformer.weights() if layers else {}
    found: dict[Component, float] = {}
    for name, layer in layers:
        if quantized := quantized_weights([layer]):
            key = f"{name}.weight"
            square = quantized_square(quantized[0], weights[f"{key}.values"], weights[f"{key}.scale"])
        else:
            square = float(torch.linalg.vector_norm(whole(weights[f"{name}.weight"]), dtype=torch.float32)) ** 2
        component = component_of(name)
        found[component] = found.get(component, 0.0) + square
    return found


def quantized_square(weight: QuantizedWeight, values: Tensor, scale: Float[Tensor, "out 1"]) -> float:
    """Return the sum of squares of a weight of a byte a value; its rotation leaves it as it is.

    Args:
        weight: that tells how it is kept.
        values: of it, where they are.
        scale: of its rows.
    """
    exact = values if weight.quantization == "int8" else values.view(torch.float8_e4m3fn)
    return float((torch.linalg.vector_norm(exact.float(), dim=1, keepdim=True) * scale).square().sum())
