"""Frozen weights of a byte a value: the blocks' linears of a LoRA run, and the text encoder's.

"int8": a scale for each row of the weight and, at the time, for each row of the input (a token); the product is one of
integers where the device is fast at it. Rows are rotated first, in groups, by a Hadamard matrix (QuaRot,
arXiv:2404.00456): x W^T = (x H) (W H)^T, and no channel of x H is far larger than the others. "float8": e4m3 and a
scale for each row, in the input's dtype again for each product.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor, nn

from anima_train.model.attention import has_tensor_cores

Quantization = Literal["int8", "float8"]

ROTATED = 64  # values of a row that are rotated together, at most; a power of 4, so that 1 / sqrt(n) is exact
CHUNK_ROWS = 1024  # of a weight that are quantised at once
# Of a transformer's names: what is quantised. Not the embedders, the norms, the modulations and the final layer, which
# are small, nor the LLM adapter.
QUANTIZED = re.compile(r"blocks\.\d+\.(self_attn|cross_attn|mlp)\.\w+")
# They read the text, which has few rows: for those, products of integers gain nothing, and cannot be of less than 17.
READS_TEXT = re.compile(r".*\.cross_attn\.[kv]_proj")


class QuantizedWeight(nn.Module):
    """A frozen weight (out, in) of a byte a value.

    Args:
        weight: on the device that it is to be on; float.
        quantization: of the values.
        dtype: of the inputs.
        has_integer_products: False if inputs stay as they are.
    """

    def __init__(
        self, weight: Tensor, quantization: Quantization, dtype: torch.dtype, has_integer_products: bool = True
    ) -> None:
        super().__init__()
        self.shape, self.quantization = weight.shape, quantization
        self.has_integer_products = has_integer_products and quantization == "int8"
        size = rotation_size(weight.shape[1]) if quantization == "int8" else 1
        exact = hadamard(size, weight.device)
        rounded = round_rows if quantization == "int8" else float8_rows
        parts = [rounded(rotate(rows.float(), exact)) for rows in weight.split(CHUNK_ROWS)]
        values, scales = zip(*parts, strict=True)
        # The values' bytes as int8 whatever they are: nothing that converts floats or sends tensors knows float8.
        self.values = nn.Parameter(torch.cat(values).view(torch.int8), requires_grad=False)  # (out, in)
        self.scale = nn.Parameter(torch.cat(scales), requires_grad=False)  # (out, 1), float32
        self.rotation = nn.Parameter(exact.to(dtype), requires_grad=False)

    @property
    def device(self) -> torch.device:
        """The device of the values."""
        return self.values.device

    def dequantized(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """Return the weight of rotated inputs."""
        values = self.values if self.quantization == "int8" else self.values.view(torch.float8_e4m3fn)
        return values.to(dtype).mul_(self.scale)  # each value is exact in bfloat16: one rounding

    def multiplies_integers(self, num_rows: int) -> bool:
        """Return True if inputs of so many rows are quantised, too."""
        if not self.has_integer_products:
            return False
        if self.device.type == "cuda":  # the limits are torch's; fast since Ampere
            fits = num_rows > 16 and self.shape[0] % 8 == self.shape[1] % 8 == 0
            return fits and torch.version.hip is None and has_tensor_cores(self.device)
        return self.device.type == "cpu"


class QuantizedLinear(nn.Linear):
    """A frozen linear without bias whose weight has a byte a value."""

    def __init__(self, weight: QuantizedWeight) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight: QuantizedWeight = weight  # type: ignore[assignment]
        self.bias = None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        (out,) = QuantizedProducts.apply(x.flatten(0, -2), [self.weight])
        return out.unflatten(0, x.shape[:-1])


class QuantizedProducts(torch.autograd.Function):
    """`quantized_outputs` with its gradient. Nothing is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weights: Sequence[QuantizedWeight]) -> tuple[Tensor, ...]:
        ctx.weights = weights
        return tuple(quantized_outputs(tokens, weights))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        return (quantized_gradient(gradients, ctx.weights) if ctx.needs_input_grad[0] else None), None


def quantized_outputs(tokens: Float[Tensor, "N D"], weights: Sequence[QuantizedWeight]) -> list[Tensor]:
    """Return the products of one input with several weights, which share its rotation and its rounding."""
    first = weights[0]
    if not first.multiplies_integers(len(tokens)):
        rotated = rotate(tokens, first.rotation)
        return [F.linear(rotated, weight.dequantized(tokens.dtype)) for weight in weights]
    values, scale = rotated_integers(tokens, first.rotation)
    return [multiply(values, scale, weight.values.t(), weight.scale.t(), tokens.dtype) for weight in weights]


def quantized_gradient(gradients: Sequence[Tensor], weights: Sequence[QuantizedWeight]) -> Float[Tensor, "N D"]:
    """Return the gradient of the input of `quantized_outputs`.

    The rounding of the forward pass counts as none: its derivative is zero almost everywhere.
    """
    first, dtype = weights[0], gradients[0].dtype
    if first.multiplies_integers(len(gradients[0])):
        parts = [integer_gradient(gradient, weight) for gradient, weight in zip(gradients, weights, strict=True)]
        rotated = sum(parts[1:], start=parts[0])
    else:
        rotated = gradients[0] @ first.dequantized(dtype)
        for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
            rotated = rotated.addmm_(gradient, weight.dequantized(dtype))
    return rotate(rotated, first.rotation)  # H is symmetric: its own inverse


def integer_gradient(gradient: Tensor, weight: QuantizedWeight) -> Float[Tensor, "N D"]:
    """Return `gradient @ weight` by a product of integers."""
    values, scale = round_rows(torch.mul(gradient, weight.scale.t()))  # the scales are in the sum, so they come first
    rows: Tensor = weight.values
    if rows.is_cuda:  # whose products of integers are fast if both factors have the summed dimension last
        rows = rows.t().contiguous().t()
    return multiply(values, scale, rows, None, gradient.dtype)


# What has a number of kernels in eager blocks is one operation there, so that selective checkpointing keeps the result
# of a product, and neither the integers nor what is rotated. A compiler sees what is in it, and fuses that.


@torch.library.custom_op("anima_train::rotate_and_round", mutates_args=())
def rotate_and_round(x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate x, and return its rows as int8 values and a scale."""
    return round_rows(rotate(x, rotation))


@rotate_and_round.register_fake
def _(x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.int8), x.new_empty((len(x), 1), dtype=torch.float32)


def rotated_integers(x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same, for a compiler, too."""
    return round_rows(rotate(x, rotation)) if torch.compiler.is_compiling() else rotate_and_round(x, rotation)


@torch.library.custom_op("anima_train::integer_product", mutates_args=())
def integer_product(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return `values @ weight`, both int8, times the scales of rows and columns, in as few passes as torch has."""
    product = torch._int_mm(values, weight)
    out = torch.mul(product, scale, out=torch.empty_like(product, dtype=dtype))
    return out if weight_scale is None else out.mul_(weight_scale)


@integer_product.register_fake
def _(values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return values.new_empty((values.shape[0], weight.shape[1]), dtype=dtype)


def multiply(values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the same, for a compiler, too."""
    if not torch.compiler.is_compiling():
        return integer_product(values, scale, weight, weight_scale, dtype)
    product = torch._int_mm(values, weight) * scale
    return (product if weight_scale is None else product * weight_scale).to(dtype)


def round_rows(x: Float[Tensor, "N D"]) -> tuple[Int8[Tensor, "N D"], Float[Tensor, "N 1"]]:
    """Return int8 values and the scale of each row, float32, whose product x is about; what is not finite stays so."""
    scale = row_scales(x, 127)
    return torch.div(x, scale).round_().to(torch.int8), scale


def row_scales(x: Float[Tensor, "N D"], largest: int) -> Float[Tensor, "N 1"]:
    """Return the factors that make the largest value of each row `largest`, float32."""
    norms = torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True, dtype=torch.float32)
    return (norms / largest).clamp_min(torch.finfo(torch.float32).tiny)


def float8_rows(x: Float[Tensor, "N D"]) -> tuple[Tensor, Float[Tensor, "N 1"]]:
    """Return e4m3 values and the scale of each row, float32, whose product x is about."""
    scale = row_scales(x, 448)  # the largest of e4m3
    return torch.div(x, scale).to(torch.float8_e4m3fn), scale


def rotation_size(width: int) -> int:
    """Return how many values of a row of this width are rotated together: the largest power of 4 that divides it."""
    size = 1
    while size < ROTATED and width % (4 * size) == 0:
        size *= 4
    return size


def hadamard(size: int, device: torch.device) -> Float[Tensor, "n n"]:
    """Return the orthogonal, symmetric matrix of plus and minus 1 / sqrt(size); size is a power of 2."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix / math.sqrt(size)


def rotate(x: Float[Tensor, "N D"], rotation: Float[Tensor, "n n"]) -> Float[Tensor, "N D"]:
    """Rotate each group of n values of each row."""
    if rotation.shape[0] == 1:
        return x
    return rotated_rows(x, rotation) if torch.compiler.is_compiling() else rotate_rows(x, rotation)


def rotated_rows(x: Tensor, rotation: Tensor) -> Tensor:
    """Return the same; a compiler sees the operations."""
    return (x.unflatten(-1, (-1, rotation.shape[0])) @ rotation).flatten(-2)


@torch.library.custom_op("anima_train::rotate_rows", mutates_args=())
def rotate_rows(x: Tensor, rotation: Tensor) -> Tensor:
    """Return the same, as an operation of its own: selective checkpointing does not keep it as it keeps products."""
    return rotated_rows(x, rotation)


@rotate_rows.register_fake
def _(x: Tensor, rotation: Tensor) -> Tensor:
    return torch.empty_like(x)


def quantize_linear(
    transformer: nn.Module, name: str, weight: Tensor, quantization: Quantization, dtype: torch.dtype
) -> bool:
    """Put a quantised linear into a transformer; return False if the weight of this name is not to be quantised.

    Args:
        transformer: with plain linears.
        name: of the weight.
        weight: on the device that it is to be on.
        quantization: of its values.
        dtype: that the transformer computes in.
    """
    module = name.removesuffix(".weight")
    if QUANTIZED.fullmatch(module) is None or not isinstance(transformer.get_submodule(module), nn.Linear):
        return False
    has_integer_products = READS_TEXT.fullmatch(module) is None
    quantized = QuantizedWeight(weight, quantization, dtype, has_integer_products)
    transformer.set_submodule(module, QuantizedLinear(quantized))
    return True


def quantize_blocks(transformer: nn.Module, quantization: Quantization) -> None:
    """Quantise the linears of a transformer's blocks that is in memory already, one by one."""
    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    for name in names:
        weight = transformer.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        quantize_linear(transformer, f"{name}.weight", weight.detach(), quantization, weight.dtype)
