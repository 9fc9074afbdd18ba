"""Safetensors files: checked headers, what a file holds, and tensors read without a second copy.

The only place, beside `adapters/names.py`, that knows a key prefix. Nothing here ever unpickles.
"""

import hashlib
import json
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor, nn

from anima_train.core.errors import ModelFileError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

TRANSFORMER_PREFIXES = ("net.", "model.diffusion_model.", "diffusion_model.", "")
ADAPTER_PREFIX = "llm_adapter."
DERIVED = re.compile(r"(^|\.)pos_embedder\.|\.inv_freq$")  # buffers some files carry; recomputed here


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte offset in the file
    end: int


@dataclass(frozen=True)
class TensorFile:
    """The header of a safetensors file: names, shapes and places, no tensor data."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    def stripped(self, prefix: str) -> "TensorFile":
        """The same file with only the keys under `prefix`, and without it."""
        kept = {key.removeprefix(prefix): entry for key, entry in self.entries.items() if key.startswith(prefix)}
        return TensorFile(self.path, kept, self.metadata)


def open_header(path: Path) -> TensorFile:
    """Read and check a safetensors header; the tensor data is not touched.

    Raises:
        ModelFileError: missing, empty, truncated, or another kind of file, with the diagnosis.
    """
    if not path.is_file():
        raise ModelFileError(f"{path}: there is no such file")
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(512)
        if problem := foreign_content(start):
            raise ModelFileError(f"{path}: {problem}")
        if size < 8 or (length := struct.unpack("<Q", start[:8])[0]) > min(size - 8, MAX_HEADER_BYTES) or length < 2:
            raise ModelFileError(f"{path}: not a complete safetensors file ({size:,} bytes); download it again")
        file.seek(8)
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ModelFileError(f"{path}: its safetensors header is damaged ({error}); download it again") from error
    if not isinstance(header, dict):
        raise ModelFileError(f"{path}: its safetensors header is damaged (not a table); download it again")
    metadata = header.pop("__metadata__", {}) or {}
    entries = {name: parse_entry(path, name, fields, 8 + length) for name, fields in header.items()}
    if entries and (end := max(entry.end for entry in entries.values())) != size:
        raise ModelFileError(
            f"{path}: truncated or damaged: its header needs {end:,} bytes, the file has {size:,}; download it again"
        )
    return TensorFile(path, entries, {str(key): str(value) for key, value in metadata.items()})


def foreign_content(start: bytes) -> str | None:
    """What a file that is no safetensors file is, from its first bytes."""
    text = start.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    if not start:
        return "the file is empty; download it again"
    if text.startswith(b"version https://git-lfs"):
        return "this is a git-lfs pointer, not the file itself; run `git lfs pull`, or download the file directly"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "this is an HTML page, not a model file (a failed download); download it again"
    if start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[8:9] != b"{"):
        return "this is a pickle (.ckpt, .pt), which can run code when opened and is never loaded; use .safetensors"
    if start.startswith(b"GGUF"):
        return "this is a GGUF file (quantised for inference); training needs the .safetensors file in bf16"
    return None


def parse_entry(path: Path, name: str, fields: object, data_start: int) -> Entry:
    """One header entry, with its offsets checked against its shape."""
    try:
        kind, shape, (start, end) = fields["dtype"], fields["shape"], fields["data_offsets"]  # type: ignore[index]
        dtype = DTYPES[kind]
        elements = 1
        for side in shape:
            elements *= side
        valid = 0 <= start <= end and end - start == elements * dtype.itemsize and all(side >= 0 for side in shape)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"{path}: tensor {name}: unreadable header entry ({error}); download it again") from error
    if not valid:
        raise ModelFileError(f"{path}: tensor {name}: its offsets do not fit its shape; download it again")
    return Entry(dtype, tuple(shape), data_start + start, data_start + end)


def read_tensors(file: TensorFile, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, CPU tensor) in file order, one at a time, so that nothing is held twice.

    Read with ordinary reads, not a memory map: pages of a map count as memory of this process on top of the tensors,
    and a file replaced under a map kills it.

    Raises:
        ModelFileError: the file ends early, or a tensor holds NaN or infinity.
    """
    wanted = file.entries if names is None else {name: file.entries[name] for name in names}
    with open(file.path, "rb", buffering=0) as stream:
        for name, entry in sorted(wanted.items(), key=lambda item: item[1].start):
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
            stream.seek(entry.start)
            fill(stream, tensor, f"{file.path}: tensor {name}")
            check_finite(tensor, f"{file.path}: tensor {name}")
            yield name, tensor


def fill(stream: FileIO, tensor: Tensor, what: str) -> None:
    """Read exactly the tensor's bytes from a raw file into it."""
    view = byte_view(tensor)
    position = 0
    while position < len(view):
        read = stream.readinto(view[position:])
        if not read:
            raise ModelFileError(f"{what}: the file ends in the middle of it; download it again")
        position += read


def byte_view(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's memory, writable, as bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise if a floating-point tensor holds NaN or infinity; a sum is enough to see it, and cheap."""
    if tensor.dtype not in FLOATS or bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
        return
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ModelFileError(
            f"{what}: {bad:,} of its {tensor.numel():,} values are NaN or infinite; the file is broken"
        )


def fingerprint(file: TensorFile) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of the given tensors, whatever else the file holds."""
    digest = hashlib.sha256()
    for name, entry in sorted(file.entries.items()):
        digest.update(repr((name, str(entry.dtype), entry.shape)).encode())
        with open(file.path, "rb") as stream:
            stream.seek(entry.start)
            remaining = entry.end - entry.start
            while remaining:
                chunk = stream.read(min(remaining, 1 << 20))
                if not chunk:
                    raise ModelFileError(f"{file.path}: tensor {name}: the file ends in the middle of it")
                digest.update(chunk)
                remaining -= len(chunk)
    return digest.hexdigest()


# What a file holds ---------------------------------------------------------------------------------------------------

SLOTS = {
    "transformer": "an Anima transformer",
    "cosmos": "a Cosmos-Predict2 transformer (no LLM adapter)",
    "llm_adapter": "an Anima LLM adapter",
    "text_encoder": "a Qwen3 text encoder",
    "vae": "the Qwen-Image VAE in Wan names",
}
SIGNS: tuple[tuple[str, str], ...] = (
    (r"(lora_(A|B|down|up|unet)|\.lokr_|\.hada_)", "a LoRA"),
    (r"^conditioner\.embedders\.", "a Stable Diffusion XL checkpoint"),
    (r"^cond_stage_model\.", "a Stable Diffusion 1 or 2 checkpoint"),
    (r"double_blocks\.\d+\.img_attn", "a Flux transformer"),
    (r"^(transformer\.)?transformer_blocks\.\d+\.attn1\.to_q", "a transformer in diffusers names"),
    (r"(^|\.)encoder\.block\.\d+\.layer\.0\.SelfAttention", "a T5 text encoder"),
    (r"^(encoder|decoder)\.(conv_in|mid_block)\.", "a VAE in diffusers names"),
    (r"^(first_stage_model\.|encoder\.down\.\d+\.block)", "an SD or Flux VAE"),
    (r"layers\.\d+\.self_attn\.q_proj\.bias", "a Qwen2 text encoder"),
    (r"layers\.\d+\.self_attn\.q_proj", "a language model that is not Qwen3"),
)


def identify(file: TensorFile) -> str:
    """A key of `SLOTS` for files this trainer uses, or a description such as "a LoRA"."""
    names = file.entries
    for pattern, description in SIGNS[:1]:
        if any(re.search(pattern, name) for name in names):
            return description
    prefix = transformer_prefix(file)
    if prefix is not None:
        has_adapter = any(name.startswith(prefix + ADAPTER_PREFIX) for name in names)
        return "transformer" if has_adapter else "cosmos"
    if any(re.search(r"(^|\.)blocks\.0\.norm_cross_attn\.weight$", name) for name in names):
        return "llm_adapter"
    if any(re.search(r"(^|\.)layers\.0\.self_attn\.q_norm\.weight$", name) for name in names):
        return "text_encoder"
    if "encoder.downsamples.0.residual.0.gamma" in names:
        return "vae"
    for pattern, description in SIGNS[1:]:
        if any(re.search(pattern, name) for name in names):
            return description
    return "a file of unknown kind" + (f" (its first key is {min(names)})" if names else " (it holds no tensors)")


def transformer_prefix(file: TensorFile) -> str | None:
    """The prefix under which the file holds a `MiniTrainDIT`, or None."""
    for prefix in TRANSFORMER_PREFIXES:
        if f"{prefix}x_embedder.proj.1.weight" in file.entries:
            return prefix
    return None


def adapter_prefix(file: TensorFile) -> str | None:
    """The prefix under which the file holds an LLM adapter, or None."""
    suffix = "blocks.0.norm_cross_attn.weight"
    for name in file.entries:
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return None


def expect(file: TensorFile, slot: str, key: str, accepted: tuple[str, ...]) -> None:
    """Check that the file given for config key `key` holds one of the accepted kinds, in a dtype to train from.

    Raises:
        ModelFileError: "slot X expects Y; this looks like Z".
    """
    kind = identify(file)
    if kind not in accepted:
        looks = SLOTS.get(kind, kind)
        raise ModelFileError(f"{key}: expects {SLOTS[slot]}; {file.path} looks like {looks}")
    kinds = Counter(entry.dtype for entry in file.entries.values())
    if quantised := {dtype: number for dtype, number in kinds.items() if dtype not in FLOATS}:
        listing = ", ".join(f"{number} {str(dtype).removeprefix('torch.')}" for dtype, number in quantised.items())
        raise ModelFileError(
            f"{key}: {file.path} is quantised ({listing} tensors); training needs the original in bf16 or fp32"
        )


def match_keys(found: Mapping[str, Entry], wanted: Mapping[str, Tensor], what: str) -> None:
    """Check that a file's keys and shapes are exactly the module's.

    Raises:
        ModelFileError: how many are missing, unexpected or of another shape, and the first five of each.
    """
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    shapes = [
        f"{name} {found[name].shape} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tuple(tensor.shape)
    ]
    problems = [
        f"{what}: {len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for kind, names in (("keys missing", missing), ("keys unexpected", unexpected), ("shapes differ", shapes))
        if names
    ]
    if problems:
        raise ModelFileError(problems)


def load_into(module: nn.Module, file: TensorFile, what: str, dtype: torch.dtype, device: torch.device) -> None:
    """Give a module on the meta device the file's tensors, converted one by one, and check that none is left over.

    Args:
        module: built under `torch.device("meta")`; its parameters are replaced.
        file: the header, with prefixes already stripped.
        what: the config key and path, for messages.
        dtype: of the parameters afterwards.
        device: of the parameters afterwards.
    """
    wanted = module.state_dict()
    match_keys(file.entries, wanted, what)
    for name, tensor in read_tensors(file):
        owner, _, attribute = name.rpartition(".")
        parameter = nn.Parameter(tensor.to(device=device, dtype=dtype), requires_grad=False)
        setattr(module.get_submodule(owner), attribute, parameter)
