"""Adapter files of any kind on a model that draws: read against its weights, and added to them as ComfyUI does."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from anima_train.adapters.parts import Adapter, read_adapter
from anima_train.adapters.read import Updates, linear_shapes, read_lora
from anima_train.adapters.updates import change_shape
from anima_train.core.errors import ModelFileError
from anima_train.core.format import count
from anima_train.model.file_kinds import LLM_ADAPTER_PREFIX
from anima_train.model.loading import ModelFiles
from anima_train.model.safetensors_io import first_five, open_header

# Keys of what is more than a plain LoRA, and known; the last one is of the states of our DoRAs.
OTHERS = re.compile(
    r"\.(lokr_w[12](_[ab])?|hada_w[12]_[ab]|dora_scale|diff|diff_b|set_weight|[wb]_norm|lora_magnitude)$"
)


def read_any(path: Path, files: ModelFiles) -> Adapter:
    """Read an adapter of any kind that ComfyUI applies, or the weights of a plain LoRA's training state.

    Args:
        path: a safetensors file.
        files: of the model that it is for.

    Raises:
        ModelFileError: it is none, damaged, or of another model: how much does not fit, and the first.
    """
    if not any(OTHERS.search(name) for name in open_header(path).entries):
        return of_lora(path, read_lora(path, linear_shapes(files)))
    entries = {
        **files.transformer_header.entries,
        **{LLM_ADAPTER_PREFIX + name: entry for name, entry in files.llm_adapter_header.entries.items()},
    }
    adapter = read_adapter(path, entries)
    misshapen = []
    for name, parts in adapter.changes.items():
        found = change_shape({part: tuple(tensor.shape) for part, tensor in parts.items()})
        if found != tuple(entries[name].shape):
            misshapen.append(f"{name} {found} instead of {tuple(entries[name].shape)}")
    if misshapen:
        weights = count(len(misshapen), "weight")
        raise ModelFileError(f"{path}: changes {weights} of another shape than the model's: {first_five(misshapen)}")
    return adapter


def of_lora(path: Path, updates: Updates) -> Adapter:
    """Return a LoRA as an adapter of any kind."""
    changes = {
        f"{name}.weight": {"down": u.down, "up": u.up, "alpha": torch.tensor(u.scale * len(u.down))}
        for name, u in updates.items()
    }
    return Adapter(path, changes, {})


@torch.no_grad()
def merge(model: nn.Module, adapters: Iterable[tuple[Adapter, float]], prefix: str = "") -> None:
    """Change the weights of a model by adapters, one after the other, in float32, then in each weight's dtype.

    Args:
        model: the transformer, or a part of it. Changes of other parts are passed over.
        adapters: each with its strength.
        prefix: of the model's names in the whole transformer, such as `llm_adapter.`
    """
    adapters = list(adapters)
    for name, weight in model.named_parameters(prefix=prefix.removesuffix(".")):
        changing = [(adapter, strength) for adapter, strength in adapters if name in adapter.changes]
        if changing:
            merged = weight.float()
            for adapter, strength in changing:
                merged = adapter.updated(name, merged, strength)
            weight.copy_(merged)
