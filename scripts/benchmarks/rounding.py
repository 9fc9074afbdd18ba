"""`rounding`: the error of a prediction and of a LoRA's gradients, by the type of the base weights, against float64.

Random weights with what trained models have and random ones do not: rows of different sizes, and channels that are far
larger than the others, which inputs of linears get from the residual stream.
"""

import argparse
import contextlib
import copy
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anima_train.adapters.lora import Lora
from anima_train.core.text_batch import fold_rows
from anima_train.model import quantized
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.quantized import QuantizedWeight, quantize_blocks
from anima_train.optim.groups import COMPONENTS, LearningRates

SHAPES = {
    "tiny": TransformerShape(2, 64, 32, 16, 64, 16),
    "one block of real width": TransformerShape(1, 2048, 128, 16, 1024, 256),
}
CASES = ("bfloat16", "int8", "int8, not rotated", "int8, gradient in bfloat16", "int8 weights alone", "float8")
OUTLIERS = 30.0  # times the size of other channels
SIDE = 256  # pixels of the image
SEEDS = range(2)
RATES = LearningRates(dict.fromkeys(COMPONENTS, 1e-4))
Errors = tuple[float, float]


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a line for each model and case: relative errors, the mean over seeds."""
    for name, shape in SHAPES.items():
        for outliers in (1.0, OUTLIERS):
            found: dict[str, list[Errors]] = {case: [] for case in options.cases or CASES}
            for seed in SEEDS:
                model = random_model(shape, outliers, seed)
                exact = results(copy.deepcopy(model).double(), torch.float64, seed)
                for case, errors in found.items():
                    mine = rounded_results(copy.deepcopy(model), case, seed)
                    errors.append(tuple(map(relative_error, mine, exact)))  # type: ignore[arg-type]
            for case, errors in found.items():
                prediction, gradient = (100 * statistics.mean(column) for column in zip(*errors, strict=True))
                yield {
                    "model": name, "outliers": outliers > 1, "case": case,
                    "prediction_percent": round(prediction, 2), "gradient_percent": round(gradient, 2),
                }  # fmt: skip


def random_model(shape: TransformerShape, outliers: float, seed: int) -> MiniTrainDIT:
    """Return a model with a LoRA that has learned something, in values that bfloat16 has, as float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    model = MiniTrainDIT(shape)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            rows = (0.5 * normal(len(parameter), 1)).exp()
            parameter.data = normal(*parameter.shape) * rows / math.sqrt(parameter.shape[1])
    channels = torch.randperm(shape.width, generator=generator)[: max(2, shape.width // 256)]
    embedder = model.get_submodule("x_embedder.proj.1")
    assert isinstance(embedder, nn.Linear)
    embedder.weight.data[channels] *= outliers
    for parameter in model.parameters():
        parameter.data = parameter.bfloat16().float()
    Lora(rank=16).attach(model, RATES, seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data = 0.02 * normal(*parameter.shape)
    return model


def rounded_results(model: MiniTrainDIT, case: str, seed: int) -> tuple[Tensor, Tensor]:
    """Return the results of a case, all else in bfloat16."""
    kind, _, how = case.partition(",")
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            parameter.data = parameter.bfloat16()
    with contextlib.ExitStack() as stack:
        if how == " not rotated":
            stack.enter_context(patch.object(quantized, "ROTATED", 1))
        if kind != "bfloat16":
            quantize_bases(model, "float8" if kind == "float8" else "int8")
        if kind == "int8 weights alone":
            for module in model.modules():
                if isinstance(module, QuantizedWeight):
                    module.has_integer_products = False
        backward = contextlib.nullcontext
        if how == " gradient in bfloat16":
            backward = lambda: patch.object(QuantizedWeight, "multiplies_integers", lambda *_: False)  # noqa: E731
        return results(model, torch.bfloat16, seed, backward)


def quantize_bases(model: MiniTrainDIT, kind: quantized.Quantization) -> None:
    """Quantise what is below the LoRA of a model."""
    plain = copy.deepcopy(model)
    adapted = {name: module for name, module in plain.named_modules() if hasattr(module, "lora_A")}
    for name, module in adapted.items():
        linear = nn.Linear(module.in_features, module.out_features, bias=False)
        linear.weight = module.weight
        plain.set_submodule(name, linear)
    quantize_blocks(plain, kind)
    for name in adapted:
        base = plain.get_submodule(name)
        if isinstance(base.weight, QuantizedWeight):
            target = model.get_submodule(name)
            del target.weight
            target.weight = base.weight


def results(
    model: MiniTrainDIT, dtype: torch.dtype, seed: int,
    backward: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the velocity, and the gradients of a loss on it in one row."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x, target = (torch.randn(1, 16, 1, SIDE // 8, SIDE // 8, generator=generator) for _ in range(2))
    text = torch.randn(1, 64, model.shape.context_width, generator=generator)
    velocity = model(x.to(dtype), torch.full((1, 1), 0.5), fold_rows(text.to(dtype)))
    loss = F.mse_loss(velocity, target.to(velocity.dtype))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with backward():
        gradients = torch.autograd.grad(loss, trained)
    return velocity.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference over that of the exact values."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())
