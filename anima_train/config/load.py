"""From TOML files and --set to a `Config`: every mistake in one report."""

import copy
import difflib
import json
import os
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from anima_train.config.compat import FOREIGN, IGNORED, IGNORED_DATASET, OFF, OFF_DATASET, translate
from anima_train.config.config import Config, find_path
from anima_train.core.errors import ConfigError
from anima_train.core.settings import Settings, validation_problems
from anima_train.data.cache import Cache
from anima_train.data.sources import CACHE_FOLDER, DatasetSettings
from anima_train.model.hub import is_reference

Table = dict[str, Any]


@dataclass(frozen=True)
class Dataset:
    """A dataset's settings with its folders found."""

    name: str  # "train", or the name of the evaluation set
    settings: DatasetSettings
    folders: tuple[Path, ...]
    masks: tuple[Path | None, ...]
    caches: tuple[Cache, ...]


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration that passed every check which needs no model and no image."""

    config: Config
    run_name: str
    train: Dataset
    evals: tuple[Dataset, ...]
    notes: tuple[str, ...]  # one for each key that has no meaning here
    base: Path  # folder of the config file: relative paths are also looked up there

    def model_path(self, key: str) -> str | None:
        """A path from [model]: found, an hf:// reference, or None."""
        text = getattr(self.config.model, key)
        if text is None or is_reference(text):
            return text
        return str(find_path(text, self.base))


def read_toml(path: Path) -> Table:
    """A TOML file, with or without a BOM.

    Raises:
        ConfigError: missing (with the nearest name there is), not UTF-8, or a syntax error with line and column.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: does not exist{near(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        hint = ""
        if "\\" in message or "hex value" in message or "escape" in message.lower():
            hint = r"; write Windows paths in single quotes: 'C:\models\anima.safetensors'"
        raise ConfigError(f"{path}: syntax error: {message}{hint}") from error


def near(path: Path) -> str:
    """`; did you mean "cats"?` with the sibling whose name is nearest, or the part of the path that is missing."""
    parent = path.parent
    if not parent.is_dir():
        return f" (there is no folder {parent}{near(parent)})" if parent != path else ""
    names = [name for name in os.listdir(parent) if not name.startswith(".")]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f'; did you mean "{parent / close[0]}"?' if close else ""


def apply_override(data: Table, text: str) -> None:
    """One `key.path=value`, the value in TOML.

    Raises:
        ConfigError: no `=`, a value that is no TOML, or a path through something that is no table.
    """
    key, equals, value = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise ConfigError(f"--set {text}: expected key.path=value")
    try:
        parsed = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError as error:
        quoted = json.dumps(value.strip(), ensure_ascii=False)
        raise ConfigError(
            f"--set {text}: the value is not TOML ({error}); text needs quotes: --set '{key}={quoted}'"
        ) from error
    table = data
    for part in parts[:-1]:
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {text}: {part} is not a table")
        table = inner
    table[parts[-1]] = parsed


class Loader:
    """Reads a configuration and the datasets it names, collecting problems on the way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[str] = []
        self.notes: list[str] = []

    def problem_in(self, where: str) -> Callable[[str], None]:
        """A function that files problems under a file's name."""
        return lambda text: self.problems.extend(f"{where}: {line}" for line in text.splitlines())

    def note_in(self, where: str) -> Callable[[str], None]:
        """A function that files notes under a file's name."""
        return lambda text: self.notes.append(f"{where}: {text}")

    def validate(self, root: type[Settings], data: Table, where: str) -> Any:
        """The settings object, or None with its problems filed."""
        try:
            return root.model_validate(data)
        except ValidationError as error:
            for problem in validation_problems(error, data, root, FOREIGN):
                self.problem_in(where)(problem)
            return None

    def dataset_table(self, value: str | Table, key: str) -> tuple[Table | None, str, Path]:
        """The table of a dataset that is given inline or as a file, the name for messages, and its folder."""
        where, base = f"{self.path.name}: {key}", self.path.parent
        if isinstance(value, str):
            path = find_path(value, base)
            where, base = path.name, path.parent
            try:
                value = read_toml(path)
            except ConfigError as error:
                self.problem_in(f"{self.path.name}: {key}")(str(error))
                return None, where, base
        table = translate(value, IGNORED_DATASET, OFF_DATASET, "", self.problem_in(where), self.note_in(where))
        directories = table.get("directory")
        if isinstance(directories, list):
            table["directory"] = [
                translate(
                    directory, IGNORED_DATASET, OFF_DATASET, "", self.problem_in(f"{where}: directory[{index}]"),
                    self.note_in(where),
                )
                if isinstance(directory, dict)
                else directory
                for index, directory in enumerate(directories)
            ]  # fmt: skip
        return table, where, base

    def dataset(self, name: str, value: Any, key: str, cache_dir: Path | None) -> Dataset | None:
        """A dataset with its folders found, or None with its problems filed."""
        if not isinstance(value, str | dict):
            return None  # the type error is reported with the config's own
        table, where, base = self.dataset_table(value, key)
        settings = None if table is None else self.validate(DatasetSettings, table, where)
        if settings is None:
            return None
        folders: list[Path] = []
        masks: list[Path | None] = []
        caches: list[Cache] = []
        for index, directory in enumerate(settings.directory):
            for which, text in (("path", directory.path), ("mask_path", directory.mask_path)):
                if text is None:
                    masks.append(None)
                    continue
                folder = find_path(text, base)
                if not folder.is_dir():
                    fault = "is not a folder" if folder.exists() else f"does not exist{near(folder)}"
                    self.problem_in(where)(f'directory[{index}].{which}: "{text}" {fault}')
                (folders if which == "path" else masks).append(folder)
            caches.append(Cache(cache_dir if cache_dir is not None else folders[-1] / CACHE_FOLDER))
        return Dataset(name, settings, tuple(folders), tuple(masks), tuple(caches))

    def check_paths(self, config: Config) -> None:
        """Model paths that name nothing."""
        for key in (
            "transformer_path", "vae_path", "llm_path", "llm_adapter_path", "tokenizer_path", "t5_tokenizer_path"
        ):  # fmt: skip
            text = getattr(config.model, key)
            if text is not None and not is_reference(text):
                path = find_path(text, self.path.parent)
                if not path.exists():
                    self.problem_in(self.path.name)(f'model.{key}: "{text}" does not exist{near(path)}')


def load_config(path: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a configuration with its datasets.

    Args:
        path: the main TOML.
        overrides: `key.path=value` from --set, later ones win.

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    loader = Loader(path)
    data = copy.deepcopy(read_toml(path))
    for text in overrides:
        try:
            apply_override(data, text)
        except ConfigError as error:
            loader.problems.append(str(error))
    where = path.name
    translated = translate(data, IGNORED, OFF, "", loader.problem_in(where), loader.note_in(where))
    # Datasets are checked on their own, so that their messages name their own file. The config then gets them
    # unread: as paths.
    dataset_value = translated.get("dataset")
    eval_values = translated.get("eval_datasets", [])
    shell = dict(translated)
    if isinstance(dataset_value, dict):
        shell["dataset"] = ""
    if isinstance(eval_values, list):
        shell["eval_datasets"] = [
            {**entry, "config": ""} if isinstance(entry, dict) and isinstance(entry.get("config"), dict) else entry
            for entry in eval_values
        ]
    config = loader.validate(Config, shell, where)
    cache_dir = Path(translated["cache_dir"]) if isinstance(translated.get("cache_dir"), str) else None
    train = loader.dataset("train", dataset_value, "dataset", cache_dir)
    evals = []
    for index, entry in enumerate(eval_values if isinstance(eval_values, list) else []):
        if isinstance(entry, dict) and isinstance(entry.get("name"), str):
            key = f"eval_datasets[{index}].config"
            evals.append(loader.dataset(entry["name"], entry.get("config"), key, cache_dir))
    if config is not None:
        loader.check_paths(config)
    if loader.problems or config is None or train is None or None in evals:
        raise ConfigError(loader.problems)
    whole = config.model_copy(
        update={
            "dataset": train.settings,
            "eval_datasets": [
                entry.model_copy(update={"config": dataset.settings})
                for entry, dataset in zip(config.eval_datasets, evals, strict=True)
                if dataset is not None
            ],
        }
    )
    run_name = config.run_name or f"{path.stem}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    found = tuple(dataset for dataset in evals if dataset is not None)
    return LoadedConfig(whole, run_name, train, found, tuple(loader.notes), path.parent)
