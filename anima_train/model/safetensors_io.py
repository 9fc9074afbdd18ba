"""Safetensors files: headers checked, tensors read and written without a second copy. Nothing here ever unpickles."""

import contextlib
import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn

from anima_train.core.divided import whole
from anima_train.core.errors import ModelFileError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
PLACEHOLDER = "#" * 64  # in metadata: of the hash of the content, which is known once it is written
MAX_NAME_LENGTH = 500
PICKLE = re.compile(rb"PK\x03\x04|\x80[\x01-\x05]|c[\w.]+\n[\w.]+\n|\(d")  # torch's zip; binary; text of protocol 0
MAX_DIMS = 16
MAX_ELEMENTS = 2**60  # more, and torch cannot count the bytes of a shape
DTYPES = {  # all that the format names and torch has
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Entry:
    """The place of one tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte offset in the file
    end: int

    def read(self, stream: BufferedReader, what: str) -> Tensor:
        """Read the tensor from its file, which is open; `what` is its name in messages."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        stream.seek(self.start)
        if stream.readinto(byte_view(tensor)) < self.end - self.start:
            raise ModelFileError(f"{what}: the file ends in the middle of it; download it again")
        return tensor


@dataclass(frozen=True)
class TensorFile:
    """The header of a safetensors file: names, shapes and places, no tensor data."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    def stripped(self, prefix: str) -> "TensorFile":
        """Return the file with only the keys that begin with `prefix`, which is taken away."""
        kept = {key.removeprefix(prefix): entry for key, entry in self.entries.items() if key.startswith(prefix)}
        return TensorFile(self.path, kept, self.metadata)

    def without(self, unwanted: Callable[[str], object]) -> "TensorFile":
        """Return the file without the keys for which this is true."""
        kept = {key: entry for key, entry in self.entries.items() if not unwanted(key)}
        return TensorFile(self.path, kept, self.metadata)

    @property
    def num_values(self) -> int:
        """The number of elements of all tensors."""
        return sum(math.prod(entry.shape) for entry in self.entries.values())


def open_header(path: Path) -> TensorFile:
    """Read and check a safetensors header; the tensor data is not touched.

    Raises:
        ModelFileError: missing, empty, truncated, or another kind of file, with the diagnosis.
    """
    with opened(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        start = stream.read(512)
        length = struct.unpack("<Q", start[:8])[0] if len(start) > 8 else 0
        if start[8:9] != b"{" or length > MAX_HEADER_BYTES:
            raise ModelFileError(f"{path}: {foreign_content(start)}")
        stream.seek(8)
        text = stream.read(length)
    if len(text) < length:
        raise ModelFileError(
            f"{path}: truncated: its header alone needs {8 + length:,} bytes, the file has {size:,}; download it again"
        )
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=table_of)
    except (ValueError, RecursionError) as error:
        raise damaged(path, str(error)) from error
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(path, "its metadata is not a table of texts")
    entries = {name: parse_entry(path, name, fields, 8 + length) for name, fields in header.items()}

    position = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise damaged(path, f"tensor {name} starts at byte {entry.start:,}, expected {position:,}")
        position = entry.end
    if position > size:
        raise ModelFileError(f"{path}: truncated: it needs {position:,} bytes, and has {size:,}; download it again")
    if position < size:
        raise damaged(path, f"it describes {position:,} bytes, and the file has {size:,}")
    return TensorFile(path, entries, metadata)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """Open a file for reading.

    Raises:
        ModelFileError: it is missing, or no plain file, or reading fails.
    """
    try:
        if not path.is_file():
            found = "this is a folder" if path.is_dir() else "there is no such file"
            raise ModelFileError(f"{path}: {found}; expected a .safetensors file")
        with open(path, "rb") as stream:
            yield stream
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror or error})") from error


def damaged(path: Path, reason: str) -> ModelFileError:
    """Return the error for a header that no writer of this format makes."""
    return ModelFileError(f"{path}: its safetensors header is damaged ({reason}); download it again")


def foreign_content(start: bytes) -> str:
    """Return the nature of a file that is no safetensors file, from its first bytes."""
    text = start.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    if not start:
        return "the file is empty; download it again"
    if text.startswith(b"version https://git-lfs"):
        return "this is a git-lfs pointer, not the file itself; run `git lfs pull`, or download the file directly"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<!--")):
        return "this is an HTML page, not a model file (a failed download); download it again"
    if PICKLE.match(start):
        return "this is a pickle (.ckpt, .pt), which can run code when opened and is never loaded; use .safetensors"
    if start.startswith(b"GGUF"):
        return "this is a GGUF file (quantised for inference); training needs the .safetensors file in bf16"
    return "this is not a safetensors file, or only its first bytes; download it again"


def table_of(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """Return a JSON object as a dict; raise ValueError if a name comes twice, where json would take the last."""
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name comes twice")
    return table


def parse_entry(path: Path, name: str, fields: object, data_start: int) -> Entry:
    """Return one header entry, with every type checked, and its offsets against its shape."""
    if len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise damaged(path, f"unreadable tensor name {name[:60]!a}")
    if not isinstance(fields, dict):
        raise damaged(path, f"tensor {name} has no description")
    kind, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(kind, str) or not is_counts(shape) or not is_counts(offsets) or len(offsets) != 2:
        raise damaged(path, f"the description of tensor {name} is not valid")
    if kind not in DTYPES:
        raise ModelFileError(
            f"{path}: tensor {name} is of type {kind[:20]!a}, which cannot be read; if the file is quantised, use "
            "the original in bf16 or fp32"
        )
    if len(shape) > MAX_DIMS or math.prod(max(side, 1) for side in shape) > MAX_ELEMENTS:
        raise damaged(path, f"the shape of tensor {name} is impossible")
    start, end = offsets
    dtype = DTYPES[kind]
    if end - start != math.prod(shape) * dtype.itemsize:
        raise damaged(path, f"the offsets of tensor {name} do not fit its shape")
    return Entry(dtype, tuple(shape), data_start + start, data_start + end)


def is_counts(value: object) -> TypeGuard[list[int]]:
    """Return True if a JSON value is a list of integers of at least 0."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def read_tensors(file: TensorFile, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, CPU tensor) in file order, one at a time, so that nothing is held twice.

    Read with ordinary reads, not a memory map: pages of a map count as memory of this process on top of the tensors,
    and a file replaced under a map kills it.

    Raises:
        ModelFileError: the file ends early, or a tensor holds NaN or infinity.
    """
    wanted = file.entries if names is None else {name: file.entries[name] for name in names}
    with opened(file.path) as stream:
        for name, entry in sorted(wanted.items(), key=lambda item: item[1].start):
            tensor = read_entry(stream, entry, f"{file.path}: tensor {name}")
            check_finite(tensor, f"{file.path}: tensor {name}")
            yield name, tensor


def read_entry(stream: BufferedReader, entry: Entry, what: str) -> Tensor:
    """Read one tensor from an open file."""
    return entry.read(stream, what)


def byte_view(tensor: Tensor) -> memoryview:
    """Return a contiguous CPU tensor's memory, writable, as bytes."""
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
    """Return the SHA-256 over names, shapes, dtypes and bytes of these tensors, whatever else the file holds."""
    digest = hashlib.sha256()
    with opened(file.path) as stream:
        for name, entry in sorted(file.entries.items()):
            digest.update(repr((name, str(entry.dtype), entry.shape)).encode())
            digest.update(byte_view(read_entry(stream, entry, f"{file.path}: tensor {name}")))
    return digest.hexdigest()


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str],
    look: Callable[[str, Tensor], object] | None = None, make: Callable[[str], Tensor] | None = None,
) -> None:  # fmt: skip
    """Write a safetensors file, one tensor after the other; the same content gives the same bytes.

    Unlike the safetensors library's own function this holds one tensor at a time in memory, not all of them, and a
    full disk is an OSError. Not atomic by itself: `path` is a temporary one.

    Args:
        path: of the file.
        tensors: by name; with `make`, on the meta device. While one is written of which each process holds a part, the
            others `take_part`.
        metadata: of the file. `PLACEHOLDER` in it becomes the SHA-256 of all bytes behind the header.
        look: called with each name and its tensor on the host before that is written; it may raise.
        make: returns the tensor of a name when it is to be written, on the host.
    """
    header, ordered = header_bytes(tensors, metadata)
    content = hashlib.sha256() if any(PLACEHOLDER in value for value in metadata.values()) else None
    with open(path, "wb") as stream:
        stream.write(header)
        for name, tensor in ordered:
            found = (whole(tensor).detach().cpu() if make is None else make(name)).contiguous()
            assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype), name
            if look is not None:
                look(name, found)
            stream.write(byte_view(found))
            if content is not None:
                content.update(byte_view(found))
        if content is not None:
            stream.seek(0)
            stream.write(header.replace(PLACEHOLDER.encode(), content.hexdigest().encode()))


def take_part(tensors: Mapping[str, Tensor]) -> None:
    """Give the parts that this process holds of tensors that another one writes, one tensor after the other."""
    for _, tensor in in_order(tensors):
        whole(tensor)


def file_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Return the size of the file that `write_tensors` makes of these; tensors on the meta device will do."""
    values = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return len(header_bytes(tensors, metadata)[0]) + values


def header_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[tuple[str, Tensor]]]:
    """Return the first bytes of a file, and the tensors in the order in which they follow."""
    ordered = in_order(tensors)
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name, tensor in ordered:
        end = position + tensor.numel() * tensor.element_size()
        offsets = [position, end]
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, ordered


def in_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Return tensors in the order in which a file has them.

    Wide types come first, as in files of the format's own writer: every tensor is then aligned to its type.
    """
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))


def first_five(names: Sequence[str]) -> str:
    """Return the first five names, with `...` if there are more."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def count_blocks(names: Iterable[str], part: str) -> int:
    """Return the number of blocks in a list of modules: one more than the highest number in keys `part.N.`"""
    return 1 + max(int(match[1]) for name in names if (match := re.match(rf"{part}\.(\d+)\.", name)))


def match_keys(found: Mapping[str, Entry | Tensor], wanted: Mapping[str, Tensor], what: str) -> None:
    """Check that a file's keys and shapes are exactly the module's.

    Raises:
        ModelFileError: how many are missing, unexpected or of another shape, and the first five of each.
    """
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    shapes = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and tuple(found[name].shape) != tuple(tensor.shape)
    ]
    problems = [
        f"{what}: {len(names)} {kind}: {first_five(names)}"
        for kind, names in (("keys missing", missing), ("keys unexpected", unexpected), ("shapes differ", shapes))
        if names
    ]
    if problems:
        raise ModelFileError(problems)


def load_into(
    module: nn.Module, file: TensorFile, what: str, dtype: torch.dtype, device: torch.device,
    replace: Callable[[str, Tensor], bool] = lambda name, tensor: False,
    on_host: Callable[[str], bool] = lambda name: False,
) -> None:  # fmt: skip
    """Give a module on the meta device the file's tensors, converted one by one, and check that none is left over.

    Args:
        module: built under `torch.device("meta")`; its parameters are replaced.
        file: the header, with prefixes already stripped.
        what: the config key and path, for messages.
        dtype: of the parameters afterwards.
        device: of the parameters afterwards.
        replace: gets each name and the tensor as it is in the file; True if it has put something else into the module.
        on_host: True for the name of a tensor that stays in the host's memory.
    """
    wanted = module.state_dict()
    match_keys(file.entries, wanted, what)
    for name, tensor in read_tensors(file):
        if replace(name, tensor):
            continue
        owner, _, attribute = name.rpartition(".")
        place = tensor.device if on_host(name) else device
        parameter = nn.Parameter(tensor.to(device=place, dtype=dtype), requires_grad=False)
        setattr(module.get_submodule(owner), attribute, parameter)
