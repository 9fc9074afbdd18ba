"""The model's files that a configuration names or implies."""

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch

from anima_train.config.config import Config
from anima_train.config.model_part import ModelPart
from anima_train.core.device import DTYPES
from anima_train.core.errors import ConfigError, ModelFileError, UserError
from anima_train.model import hub
from anima_train.model.cosmos import CosmosFiles
from anima_train.model.file_kinds import SLOT_KEYS
from anima_train.model.loading import ModelFiles, ModelSpec, header_problems
from anima_train.model.text import find_tokenizer_folder
from anima_train.model.text_quantized import check_library
from anima_train.model.tiny import tiny_cosmos_paths, tiny_paths, write_tiny, write_tiny_cosmos


@dataclass(frozen=True)
class Family:
    """The files that the models of one `type` consist of."""

    files: type[ModelFiles]
    tiny_paths: Callable[[Path], ModelFiles]
    write_tiny: Callable[[Path], ModelFiles]
    tokenizers: dict[str, tuple[str, ...]]  # by their keys, names of folders near the text encoder
    is_downloaded: bool  # True: the official files are fetched where no others are given


FAMILIES = {
    "anima": Family(
        ModelFiles,
        tiny_paths,
        write_tiny,
        {"tokenizer_path": ("tokenizer",), "t5_tokenizer_path": ("t5_tokenizer",)},
        is_downloaded=True,
    ),
    "cosmos_predict2": Family(
        CosmosFiles,
        tiny_cosmos_paths,
        write_tiny_cosmos,
        {"t5_tokenizer_path": ("t5_tokenizer", "tokenizer")},  # the latter in NVIDIA's own folder
        is_downloaded=False,
    ),
}


def find_model_files(config: Config | ModelPart) -> ModelFiles:
    """Return every model file the configuration names or implies; missing official ones are downloaded.

    Raises:
        ModelFileError: every file that is missing and cannot be downloaded, with those that are wrong, at once.
    """
    model = config.model
    family = FAMILIES[model.type]
    if model.tiny_path is not None:
        folder = Path(model.tiny_path)
        files = family.tiny_paths(folder)
        if not all(path.exists() for path in astuple(files) if path is not None):
            files = family.write_tiny(folder)
        other = model.transformer_path  # for pictures alone: a configuration has only one of the two
        llm_adapter = model.llm_adapter_path
        return replace(
            files,
            transformer=files.transformer if other is None else Path(other),
            llm_adapter=None if llm_adapter is None else hub.resolve("transformer_path", llm_adapter, config.offline),
        )

    failures: list[UserError] = []
    found: dict[str, Path] = {}

    def resolve(slot: str, path: str | None) -> None:
        # Where the Hub could not be reached for one file, only the cache is asked for the others: each try takes long.
        is_cut_off = any(isinstance(failure, hub.Absent) for failure in failures)
        try:
            found[slot] = hub.resolve(slot, path, config.offline or is_cut_off)
        except UserError as error:
            failures.append(error)

    given = model.model_dump()
    slots = {slot: SLOT_KEYS[slot].removeprefix("model.") for slot in family.files.SLOTS}
    if not family.is_downloaded and (absent := [key for key in slots.values() if given[key] is None]):
        raise ConfigError(
            f'model: {", ".join(absent)} missing, and required with type = "{model.type}"; or tiny_path, to try it'
        )
    for key in slots.values():
        resolve(key, given[key])
    *_, text_key = slots.values()
    for key, names in family.tokenizers.items():
        path = given[key]
        if path is None and text_key in found:
            near = (find_tokenizer_folder(name, found[text_key]) for name in names)
            path = next((str(folder) for folder in near if folder is not None), None)
        resolve(key, path)
    if model.llm_adapter_path is not None:
        resolve("llm_adapter_path", model.llm_adapter_path)
    if failures:
        # The files that are here are looked at now, or what is wrong with them would come out after the next start.
        slots["llm_adapter"] = "llm_adapter_path"
        here = {slot: found[key] for slot, key in slots.items() if key in found}
        wrong = header_problems(here, model.llm_adapter_path is not None)
        raise ModelFileError([*wrong, *hub.together(failures)])
    transformer, vae, text_encoder = (found[key] for key in slots.values())
    tokenizer = found[next(iter(family.tokenizers))]  # the text encoder's
    return family.files(
        transformer, vae, text_encoder, tokenizer, found["t5_tokenizer_path"], found.get("llm_adapter_path")
    )


def build_model_spec(config: Config | ModelPart, device: torch.device) -> ModelSpec:
    """Find the model's files, check their headers, and say how the configuration uses them.

    Raises:
        ConfigError: the library that quantises the text encoder is missing, or captions may be longer than it reads.
        ModelFileError: every file that is missing or wrong, at once.
    """
    check_library(config.model.text_quantization)
    files = find_model_files(config)
    files.check_headers()
    model = config.model
    if model.max_caption_tokens > (most := files.max_tokens):
        raise ConfigError(
            f"model.max_caption_tokens: found {model.max_caption_tokens:,}, but the text encoder in {files.llm} reads "
            f"{most:,} tokens; set {most:,} or less"
        )
    trains = isinstance(config, Config) and config.learning_rates().by_component["llm_adapter"] != 0
    return ModelSpec(
        files,
        dtype=DTYPES[model.dtype],
        weights_dtype=DTYPES[model.weights_dtype],
        trains_llm_adapter=trains,
        device=device,
        text_device=device if model.text_encoder_device == "training" else torch.device("cpu"),
        quantization=model.quantization,
        text_quantization=model.text_quantization,
        max_tokens=model.max_caption_tokens,
    )
