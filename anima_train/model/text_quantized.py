"""The weights of a text encoder, given to its model in float32, or with linears of a byte, or half a byte, a value."""

import importlib.util
import logging
import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from anima_train.core.errors import ConfigError
from anima_train.model.quantized import QuantizedLinear, QuantizedWeight
from anima_train.model.safetensors_io import Entry, TensorFile, read_tensors

logger = logging.getLogger(__name__)

TextQuantization = Literal["nf4", "float8"]
AnyModel = TypeVar("AnyModel", bound=nn.Module)
LINEAR_BYTES = {"nf4": 0.5 + 4 / 64 / 4, "float8": 1.0}  # a value; of nf4 with its scales, in 8 bits themselves
EMBEDDING = "embed_tokens.weight"
LINEAR = re.compile(  # of Qwen3, and of T5
    r"layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight|encoder\.block\.\d+\.layer\.\d\.\w+\.(q|k|v|o|wi|wo)\.weight"
)


class StoredEmbedding(nn.Embedding):
    """An embedding that keeps the dtype of its file, and gives float32: the same values in half of the memory."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).float()


class TextQuantizer:
    """The exchange of a text encoder's modules, one by one as their weights are read, and the error that it makes.

    Args:
        model: on the meta device.
        quantization: of the linears of its layers.
        device: of the weights afterwards.
    """

    def __init__(self, model: nn.Module, quantization: TextQuantization, device: torch.device) -> None:
        self.model, self.quantization, self.device = model, quantization, device
        self.squares = torch.zeros(2, device=device)  # of the error, and of the weights

    def replace(self, name: str, tensor: Tensor) -> bool:
        """Put what keeps a weight into the model; return False if it is to stay as it is."""
        path = name.removesuffix(".weight")
        if name == EMBEDDING:
            stored = tensor if tensor.dtype == torch.bfloat16 else tensor.float()
            rows, width = stored.shape
            embedding = StoredEmbedding(rows, width, _weight=stored.to(self.device), _freeze=True)
            self.model.set_submodule(path, embedding)
            return True
        if LINEAR.fullmatch(name) is None or getattr(self.model.get_submodule(path), "bias", None) is not None:
            return False
        weight = tensor.to(self.device, torch.float32)
        linear, rounded = nf4(weight) if self.quantization == "nf4" else float8(weight)
        self.squares += torch.stack([(rounded - weight).square().sum(), weight.square().sum()])
        self.model.set_submodule(path, linear)
        return True

    def tell(self) -> None:
        """Tell how far the weights have moved."""
        moved = float((self.squares[0] / self.squares[1]).sqrt())
        logger.info(
            "the text encoder is in %s: its weights are off by %.1f %%; docs/performance.md has what that does to "
            "the conditions", self.quantization, 100 * moved,
        )  # fmt: skip


def with_weights(
    model: AnyModel, files: Iterable[TensorFile], tied: Mapping[str, str], device: torch.device,
    quantization: TextQuantization | None,
) -> AnyModel:  # fmt: skip
    """Return a model on the meta device with the weights of its files, in float32 or quantised, frozen.

    Args:
        model: a text encoder.
        files: headers of the weights.
        tied: names of weights that no file has, each with that which it shares.
        device: of the weights afterwards.
        quantization: of the linears' weights.
    """
    quantizer = None if quantization is None else TextQuantizer(model, quantization, device)
    # Weight by weight: `.to(float32)` on a model loaded in bfloat16 would keep a rounded `inv_freq`.
    state = {
        name: tensor.to(device=device, dtype=torch.float32)
        for file in files
        for name, tensor in read_tensors(file)
        if quantizer is None or not quantizer.replace(name, tensor)
    }
    state |= {name: state[source] for name, source in tied.items()}
    model.load_state_dict(state, assign=True, strict=quantizer is None)
    if quantizer is not None:
        quantizer.tell()
    return model.to(device).eval().requires_grad_(False)


def float8(weight: Tensor) -> tuple[nn.Module, Tensor]:
    """Return a linear of 8 bits a value, and its weight as it computes with it."""
    quantized = QuantizedWeight(weight, "float8", torch.float32)
    return QuantizedLinear(quantized), quantized.dequantized(torch.float32)


def nf4(weight: Tensor) -> tuple[nn.Module, Tensor]:
    """Return a linear of 4 bits a value, and its weight as it computes with it."""
    from bitsandbytes.functional import dequantize_4bit  # optional, and takes long to import
    from bitsandbytes.nn import Linear4bit, Params4bit

    linear = Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.float32, quant_type="nf4")
    linear.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")
    linear = linear.to(weight.device)  # which is when it is quantised
    return linear, dequantize_4bit(linear.weight.data, linear.weight.quant_state)


def stored_bytes(name: str, entry: Entry, quantization: TextQuantization | None) -> float:
    """Return the bytes in memory of one of the text encoder's tensors, given by its name and place in the file."""
    num_values = math.prod(entry.shape)
    if quantization is None:
        return num_values * torch.float32.itemsize
    if name == EMBEDDING and entry.dtype == torch.bfloat16:
        return num_values * torch.bfloat16.itemsize
    return num_values * (LINEAR_BYTES[quantization] if LINEAR.fullmatch(name) else torch.float32.itemsize)


def check_library(quantization: TextQuantization | None) -> None:
    """Require the library that quantises.

    Raises:
        ConfigError: it is missing.
    """
    if quantization == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            'model.text_encoder_nf4: needs bitsandbytes; install it with pip install "anima-train[bitsandbytes]", or '
            "set text_encoder_fp8 = true instead, which needs nothing"
        )
