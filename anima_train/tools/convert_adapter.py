"""Adapter files under the keys of another program. Tensors stay as they are; for diffusers alpha goes into them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from anima_train.adapters.names import LORA_PREFIX, diffusers_name, kohya_name
from anima_train.adapters.parts import read_adapter
from anima_train.adapters.updates import NEVER_ROUNDED, Parts, is_for_one_base, kind_of, scale_of
from anima_train.core.errors import ConfigError
from anima_train.tools.outputs import adapter_architecture, adapter_depth, metadata_of, save_streamed

Keys = Literal["comfyui", "kohya", "diffusers"]
HALVES = {  # the names of `down` and `up`
    "comfyui": {"down": "lora_A.weight", "up": "lora_B.weight"},
    "kohya": {"down": "lora_down.weight", "up": "lora_up.weight"},
    "diffusers": {"down": "lora_A.weight", "up": "lora_B.weight"},
}


def convert_adapter(path: Path, out: Path, keys: Keys, dtype: torch.dtype | None = None) -> int:
    """Write an adapter under other keys, and return how many weights it changes.

    Args:
        path: an adapter in anybody's keys.
        out: the file to write.
        keys: whose they shall be. diffusers takes plain LoRAs alone.
        dtype: of all tensors but alpha and DoRA's scale; None: of each as it is.

    Raises:
        ConfigError: diffusers cannot take it.
        ModelFileError: it cannot be read, or holds what is not known.
    """
    adapter = read_adapter(path)
    tensors: dict[str, Tensor] = {}
    for name, parts in adapter.changes.items():
        kind = kind_of(parts)
        if keys == "diffusers" and kind != "LoRA":
            remedy = "--to lora --base BASE" if is_for_one_base(parts) else "--to lora"
            raise ConfigError(
                f"{path}: {name} is a {kind}, and diffusers takes plain LoRAs alone; make one with {remedy}"
            )
        for part, tensor in converted(parts, keys):
            tensors[key_of(name, part, keys)] = tensor if part in NEVER_ROUNDED or dtype is None else tensor.to(dtype)
    folded = ("ss_network_alpha",) if keys == "diffusers" else ()
    others = {name: text for name, text in adapter.metadata.items() if name not in folded}
    made = adapter_architecture(adapter_depth(adapter.changes, adapter.metadata), adapter.metadata)
    metadata = metadata_of(made, out, {"convert": path.name, "to": keys}, others)
    save_streamed(out, tensors, metadata, tensors.__getitem__)
    return len(adapter.changes)


def converted(parts: Parts, keys: Keys) -> Iterator[tuple[str, Tensor]]:
    """Yield the parts as a program wants them: diffusers refuses alpha, which is multiplied into `up`."""
    for part, tensor in parts.items():
        if keys != "diffusers" or "alpha" not in parts:
            yield part, tensor
        elif part == "up":
            yield part, (tensor.float() * scale_of(parts, len(parts["down"]))).to(tensor.dtype)
        elif part != "alpha":
            yield part, tensor


def key_of(name: str, part: str, keys: Keys) -> str:
    """Return the key of a part of the change of a parameter."""
    module, _, kind = name.rpartition(".")
    stem = {"comfyui": LORA_PREFIX + module, "kohya": kohya_name(module), "diffusers": diffusers_name(module)}[keys]
    if part == "diff" and kind == "bias":
        part = "diff_b"
    return f"{stem}.{HALVES[keys].get(part, part)}"
