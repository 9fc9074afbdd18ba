"""Whole models in another layout: other prefixes, the parts of a bundle, one file of a folder of diffusers."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from anima_train.adapters.names import anima_modules, cosmos_key
from anima_train.adapters.parts import BLOCK_NUMBER, numbers
from anima_train.core.errors import ConfigError, ModelFileError
from anima_train.core.files import atomic_folder
from anima_train.core.format import count
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.file_kinds import BUNDLE_KEY, LLM_ADAPTER_PREFIX, open_model, open_slot
from anima_train.model.llm_adapter import LLMAdapter, LLMAdapterShape
from anima_train.model.safetensors_io import Entry, TensorFile, match_keys, open_header, read_tensors
from anima_train.tools.outputs import base_architecture, metadata_of, save_streamed

PARTS = {"transformer": "diffusion_model", "text_encoder": "text_encoder", "vae": "vae"}  # slot -> name of its file
FOLDERS = {"transformer": "", "text_conditioner": LLM_ADAPTER_PREFIX}  # of diffusers -> prefix in a whole transformer

Places = Mapping[str, tuple[TensorFile, str]]  # name in the model -> the file, and the name in it


def convert_checkpoint(path: Path, out: Path, prefix: str, dtype: torch.dtype | None = None) -> int:
    """Write a whole transformer, its LLM adapter inside, as one file; return the number of its tensors.

    Args:
        path: a checkpoint with any prefix, a bundle, a quantised file, or a folder of diffusers.
        out: the file to write.
        prefix: of its keys.
        dtype: of every tensor; None: of each as it is.

    Raises:
        ConfigError, ModelFileError, SpaceError: as `save_streamed`; or the source is of something else.
    """
    places = places_in_folder(path) if path.is_dir() else places_in_file(path)
    others = {} if path.is_dir() else open_header(path).metadata
    made = base_architecture({name: file.entries[key] for name, (file, key) in places.items()}, others)
    write(places, out, prefix, dtype, metadata_of(made, out, {"convert": path.name, "prefix": prefix}, others))
    return len(places)


def places_in_file(path: Path) -> Places:
    """Return the places of a transformer's tensors in a file."""
    file, prefix = open_model(path)
    return {name.removeprefix(prefix): (file, name) for name in file.entries}


def places_in_folder(folder: Path) -> Places:
    """Return the places of a transformer's and its LLM adapter's tensors in a folder of diffusers.

    Raises:
        ModelFileError: they are not there, or others are.
    """
    found: dict[str, tuple[TensorFile, str]] = {}
    for part, prefix in FOLDERS.items():
        files = [open_header(path) for path in sorted((folder / part).glob("*.safetensors"))]
        if not files:
            raise ModelFileError(f"{folder / part}: there are no weights; expected a folder that diffusers has saved")
        names = [name for file in files for name in file.entries]
        native = {cosmos_key(f"{module}.weight"): f"{module}.weight" for module in anima_modules(numbers_of(names), ())}
        for file in files:
            for name in file.entries:
                found[prefix + (name if prefix else native.get(name, name))] = (file, name)
    entries = {name: file.entries[key] for name, (file, key) in found.items()}
    expect_whole(folder, entries)
    return found


def numbers_of(names: list[str]) -> list[int]:
    """Return the numbers of the blocks of names in diffusers."""
    return numbers((f".{name}" for name in names), BLOCK_NUMBER)


def expect_whole(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Raise ModelFileError if these are not exactly the tensors of a transformer with an LLM adapter."""
    inside = {
        key.removeprefix(LLM_ADAPTER_PREFIX): entry
        for key, entry in entries.items()
        if key.startswith(LLM_ADAPTER_PREFIX)
    }
    outside = {key: entry for key, entry in entries.items() if not key.startswith(LLM_ADAPTER_PREFIX)}
    try:
        with torch.device("meta"):
            transformer = MiniTrainDIT(TransformerShape.of(outside)).state_dict()
            llm_adapter = LLMAdapter(LLMAdapterShape.of(inside)).state_dict()
    except (KeyError, ValueError) as error:
        raise ModelFileError(f"{folder}: lacks {error}, and is no Anima in the layout of diffusers") from error
    match_keys(outside, transformer, f"{folder / 'transformer'}")
    match_keys(inside, llm_adapter, f"{folder / 'text_conditioner'}")


def split_bundle(path: Path, folder: Path, dtype: torch.dtype | None = None) -> dict[str, int]:
    """Write the parts of a bundle as files of a folder, which appears when all are there.

    Return the number of tensors of each, by the file's name.

    Raises:
        ConfigError: it is no bundle, or the folder is there.
        ModelFileError, SpaceError: as `convert_checkpoint`.
    """
    if BUNDLE_KEY not in (whole := open_header(path)).entries or not any(
        name.startswith(("vae.", "text_encoders.")) for name in whole.entries
    ):
        raise ConfigError(
            f"{path} is no bundle, which has the VAE and the text encoder in it, too; there is nothing to part"
        )
    if folder.exists() or folder.is_symlink():
        raise ConfigError(f"{folder} already exists; give a folder that does not, or remove it")
    found = {}
    with atomic_folder(folder) as temporary:
        for slot, stem in PARTS.items():
            out = temporary / f"{stem}.safetensors"
            if slot == "transformer":
                found[out.name] = convert_checkpoint(path, out, "net.", dtype)
            elif len((part := open_slot(path, slot)).entries) < len(whole.entries):
                places = {name: (part, name) for name in part.entries}
                write(places, out, "", dtype, {"format": "pt"})
                found[out.name] = len(places)
    return found


def write(places: Places, out: Path, prefix: str, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
    """Write tensors one by one."""
    by_key = {prefix + name: place for name, place in places.items()}
    shapes = {
        key: torch.empty(file.entries[name].shape, dtype=dtype or file.entries[name].dtype, device="meta")
        for key, (file, name) in by_key.items()
    }

    def make(key: str) -> Tensor:
        file, name = by_key[key]
        ((_, tensor),) = read_tensors(file, [name])
        return tensor.to(shapes[key].dtype)

    save_streamed(out, shapes, metadata, make)


def described(found: Mapping[str, int]) -> str:
    """Return the files of a bundle's parts in words."""
    return ", ".join(f"{name} ({count(number, 'tensor')})" for name, number in found.items())
