"""The loading of TOML files and --set into a `Config`, with every mistake in one report."""

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from anima_train.adapters.choice import AnyAdapter
from anima_train.adapters.lora import Lora
from anima_train.config.base_drawn import SHIPPED, SHIPPED_CAPTIONS, BaseDrawn, read_captions
from anima_train.config.compat import DATASET, FOREIGN, MAIN, Keys, translate
from anima_train.config.config import Config
from anima_train.config.loaded import Dataset, LoadedConfig
from anima_train.config.model_settings import FAMILIES, MODEL_PATHS, AnyModel, unknown_family
from anima_train.config.notes import optimizer_advice, rate_warnings, without_effect
from anima_train.config.other_files import is_kohya, lifted, whole_file_fault
from anima_train.config.paths import Place, expected_kind, find_path, path_fault
from anima_train.config.preserved import load_preserved, measured_too
from anima_train.config.read import Table, apply_override, name_by_time, read_toml, replace_tables
from anima_train.config.sections import EvalDataset, Sampling
from anima_train.core.errors import ConfigError
from anima_train.core.settings import Settings, quoted, validation_problems
from anima_train.data.cache import CACHE_FOLDER, Cache
from anima_train.data.settings import DatasetSettings, Directory
from anima_train.model.hub import is_reference, parse_reference
from anima_train.model.variants import picture_defaults
from anima_train.sampling.generate import PictureSettings
from anima_train.sampling.judges import installed_judges, judge_fault

AnySettings = TypeVar("AnySettings", bound=Settings)

MAX_NAME = 255  # bytes of the name of a file or a folder
HUB_DATASET = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?<!\.parquet)(?<!\.tar)")
# What to say about unknown keys: those of other trainers, and those that stand in the other file.
MAIN_HINTS = dict.fromkeys(DatasetSettings.model_fields, "it belongs in the dataset") | FOREIGN
DATASET_HINTS = dict.fromkeys(Config.model_fields, "it belongs in the main file") | FOREIGN
DATASET_HINTS |= dict.fromkeys(
    DatasetSettings.model_fields.keys() - Directory.model_fields.keys(), "it belongs outside of [[directory]]"
)


class Loader:
    """The reader of a configuration and of the datasets it names, which collects problems and notes on the way."""

    def __init__(self, path: Path) -> None:
        self.main = Place(path.name, path.parent)
        self.overridden: list[str] = []  # key paths of what --set made
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.missing: list[str] = []  # problems that are none where a run is resumed
        self.named: set[str] = set()  # keys with a problem; the first one found says the most

    def read(self, path: Path, overrides: Sequence[str]) -> Table:
        """Return the main file's table with what --set changes; later ones win."""
        data = read_toml(path)
        for text in overrides:
            try:
                self.overridden.append(apply_override(data, text))
            except ConfigError as error:
                self.problems.extend(error.problems)
        if (fault := whole_file_fault(data, is_main=True)) is not None:
            raise ConfigError(f"{path}: {fault}")
        if is_kohya(data, Config.model_fields):
            self.problems.append(
                f"{path.name}: is a configuration of kohya's sd-scripts, whose keys have other names here: each of "
                "them is below; or begin with configs/style_lora.toml"
            )
            data = lifted(data, Config.model_fields)
        return self.of_ours(data)

    def of_ours(self, data: Table) -> Table:
        """Return the main table with only the keys that our models have in [model]; another model is filed, once."""
        model = data.get("model")
        kind = model.get("type") if isinstance(model, dict) else None
        if not isinstance(model, dict) or not isinstance(kind, str) or kind in FAMILIES:
            return data
        text, name = unknown_family(kind)
        self.add_problem(self.main, "model.type", text)
        own = {key: value for key, value in model.items() if key in FAMILIES[name].model_fields}
        return data | {"model": own | {"type": name}}

    def key_name(self, place: Place, key: str) -> str:
        """Return a key as messages name it: with its file, or with --set."""
        path = (place.prefix + key).strip(".")
        if not path:
            return place.file
        is_set = any(re.match(rf"{re.escape(made)}($|[.\[])", path) for made in self.overridden)
        return f"--set {path}" if is_set and place.file == self.main.file else f"{place.file}: {path}"

    def add_problem(self, place: Place, key: str, text: str) -> None:
        """File what is wrong with a key; for a whole table the text has a line for each problem."""
        name = self.key_name(place, key)
        if name not in self.named:
            self.named.add(name)
            self.problems.extend(f"{name}: {line}" for line in text.splitlines())

    def add_note(self, place: Place, key: str, why: str) -> None:
        """File a key that changes nothing."""
        self.notes.append(f"{self.key_name(place, key)}: has no effect, as {why}")

    def translate(self, data: Table, keys: Keys, place: Place) -> Table:
        """Return a table without the keys of other trainers."""
        return translate(data, keys, partial(self.add_problem, place), partial(self.add_note, place))

    def validate(
        self, root: type[AnySettings], data: Table, place: Place, hints: Mapping[str, str]
    ) -> AnySettings | None:
        """Return the settings object, or None with its problems filed."""
        try:
            return root.model_validate(data)
        except ValidationError as error:
            for key, text in validation_problems(error, data, root, hints).items():
                self.add_problem(place, key, text)
            return None

    def find(self, place: Place, key: str, text: str, wanted: str) -> Path:
        """Return the place a path leads to; if it leads nowhere, that is filed."""
        if fault := path_fault(text, place.folder, wanted):
            self.add_problem(place, key, fault)
        return find_path(text, place.folder)

    def load_dataset(self, name: str, value: object, key: str, config: Config | None) -> Dataset | None:
        """Return a dataset, given as a path or a table, with its folders found; or None with its problems filed."""
        place = self.main.inside(key)
        if isinstance(value, str):
            if fault := path_fault(value, place.folder, "file"):
                self.add_problem(self.main, key, fault)
                return None
            path = find_path(value, place.folder)
            place = Place(value, path.parent)
            try:
                value = read_toml(path)
            except ConfigError as error:
                self.problems.extend(error.problems)
                return None
            if (fault := whole_file_fault(value, is_main=False)) is not None:
                self.problems.append(f"{place.file}: {fault}")
                return None
        if not isinstance(value, dict):
            return None  # the wrong type is reported with the config's own
        table = self.translate(value, DATASET, place)
        if isinstance(directories := table.get("directory"), list):
            table["directory"] = [
                self.translate(entry, DATASET, place.inside(f"directory[{index}]"))
                if isinstance(entry, dict)
                else entry
                for index, entry in enumerate(directories)
            ]
        settings = self.validate(DatasetSettings, table, place, DATASET_HINTS)
        return None if settings is None else self.find_folders(name, settings, place, config)

    def load_eval(self, index: int, entry: Table, config: Config | None) -> Dataset | None:
        """Return an evaluation set; or None with its problems filed."""
        key = f"eval_datasets[{index}]"
        if entry.get("captions") is None or config is None:
            return self.load_dataset(str(entry.get("name")), entry.get("config"), f"{key}.config", config)
        checked, place = config.eval_datasets[index], self.main.inside(key)
        captions = self.find_captions(place, checked.captions or SHIPPED, SHIPPED_CAPTIONS)
        return None if captions is None else self.load_drawn(checked.name, captions, checked.pictures, place, config)

    def find_captions(
        self, place: Place, given: str | Mapping[str, list[str]], shipped: Path
    ) -> Mapping[str, list[str]] | None:
        """Return captions by their kind: given as a table, as a file, or as those shipped; or None, with why filed."""
        if not isinstance(given, str):
            return given
        path = shipped if given == SHIPPED else self.find(place, "captions", given, "file")
        if not path.is_file():
            return None
        try:
            return read_captions(path, given)
        except ConfigError as error:
            self.problems.extend(error.problems)
            return None

    def load_drawn(
        self, name: str, captions: Mapping[str, list[str]], pictures: Mapping[str, Any], place: Place, config: Config,
        first_seed: int = 0,
    ) -> Dataset | None:  # fmt: skip
        """Return a set of pictures that the base model draws; or None with its problems filed.

        Args:
            name: of the set.
            captions: by their kind.
            pictures: the settings of the pictures that differ from the defaults.
            place: of the keys.
            config: the main file.
            first_seed: added to the seed.
        """
        of_variant = picture_defaults(config.model.transformer_path)
        settings = self.validate(PictureSettings, of_variant | dict(pictures), place.inside("pictures"), {})
        if settings is None:
            return None
        settings = settings.model_copy(update={"seed": (settings.seed + first_seed) % 2**64})
        base = config.model.model_dump(include=MODEL_PATHS | {"tiny_path"}, mode="json")
        drawn = BaseDrawn(captions, settings, Path(config.cache_dir or config.output_dir), base)
        return self.find_folders(name, drawn.dataset(), self.main, config, drawn)

    def find_folders(
        self, name: str, settings: DatasetSettings, place: Place, config: Config | None, drawn: BaseDrawn | None = None
    ) -> Dataset:
        """Return a dataset with its folders found; those that are missing are filed, if they are not made later."""
        cache_dir = None if config is None else config.cache_dir
        output_dir = Path() if config is None else Path(config.output_dir)
        directories: list[Directory] = []
        folders: list[Path] = []
        masks: list[Path | None] = []
        caches: list[Cache] = []
        for index, directory in enumerate(settings.directory):
            here = place.inside(f"directory[{index}]")
            found = {}
            if directory.hf_dataset is not None:
                found["hf_dataset"] = self.find_table(here, directory.hf_dataset)
            for key, text in (("path", directory.path), ("mask_path", directory.mask_path)):
                if text is not None:
                    found[key] = Path(text) if drawn else self.find(here, key, text, expected_kind(text))
            folder = found["path" if directory.hf_dataset is None else "hf_dataset"]
            folders.append(folder)
            masks.append(found.get("mask_path"))
            directories.append(directory.model_copy(update={key: str(path) for key, path in found.items()}))
            # What is on the Hub has no place of its own here.
            beside = folder if os.path.isdir(folder) else folder.parent if os.path.exists(folder) else output_dir
            beside = beside if drawn is None else drawn.folder
            caches.append(Cache(beside / CACHE_FOLDER if cache_dir is None else Path(cache_dir)))
            self.notes.extend(f"{place.file}: {place.prefix}{text}" for text in settings.without_effect(index))
        settings = settings.model_copy(update={"directory": directories})
        offline = config is not None and config.offline
        return Dataset(name, settings, tuple(folders), tuple(masks), tuple(caches), offline, drawn=drawn)

    def find_table(self, place: Place, text: str) -> Path:
        """Return the path of a Hugging Face dataset, or its name on the Hub; if it can be neither, that is filed."""
        path = find_path(text, place.folder)
        if not os.path.exists(path) and not HUB_DATASET.fullmatch(text):
            self.add_problem(place, "hf_dataset", f"{quoted(text)} is neither here nor owner/name, as on the Hub")
        return path if os.path.exists(path) else Path(text)

    def find_model_files(self, model: AnyModel) -> AnyModel:
        """Return the model's settings with its files found; those that are missing are filed."""
        self.check_folder("model.tiny_path", model.tiny_path)
        place = self.main.inside("model")
        found = {}
        for key, text in model.model_dump(include=MODEL_PATHS).items():  # those that its family has
            if text is None:
                continue
            if is_reference(text):
                try:
                    parse_reference(text)
                except ConfigError as error:
                    self.add_problem(place, key, str(error))
            else:
                found[key] = str(self.find(place, key, text, "file or folder"))
        return model.model_copy(update=found)

    def find_initial(self, adapter: AnyAdapter) -> AnyAdapter:
        """Return an adapter's settings with the LoRA that it begins with found, wherever the next start is made."""
        if not isinstance(adapter, Lora) or (text := adapter.init_from_existing) is None:
            return adapter
        if fault := path_fault(text, self.main.folder, "file or folder"):
            self.missing.append(f"{self.key_name(self.main, 'adapter.init_from_existing')}: {fault}")
            return adapter
        return adapter.model_copy(update={"init_from_existing": str(find_path(text, self.main.folder).absolute())})

    def find_judge(self, sampling: Sampling | None) -> Sampling | None:
        """Return the settings of previews with the judge's folder found; if there is no such judge, that is filed."""
        if sampling is None or sampling.judge is None:
            return sampling
        name, colon, text = sampling.judge.partition(":")
        if text and os.path.isdir(path := find_path(text, self.main.folder)):
            text = str(path.absolute())
        if (fault := judge_fault(name, text, installed_judges())) is not None:
            self.add_problem(self.main.inside("sampling"), "judge", fault)
        return sampling.model_copy(update={"judge": f"{name}{colon}{text}"})

    def note_unused(self, dataset: Dataset) -> None:
        """Note the keys of an evaluation set that only training heeds."""
        for key in dataset.settings.unused_in_evaluation():
            self.notes.append(
                f"evaluation set {dataset.name}: {key} has no effect, as each image is shown once, with its first "
                "caption as it is"
            )

    def check_folder(self, key: str, text: str | None) -> None:
        """File a folder that would be made if it were missing, but is something else, or cannot be."""
        if text is not None and any(len(os.fsencode(part)) > MAX_NAME for part in Path(text).parts):
            self.add_problem(self.main, key, f"a name in it has more than {MAX_NAME} bytes, which no disk takes")
            return
        if text is not None and os.path.exists(text):
            self.find(self.main, key, text, "folder")

    def check_library(self, optimizer: str, needed: tuple[str, str] | None) -> None:
        """File an optimizer's library that is not installed.

        Args:
            optimizer: its type.
            needed: the module and the package that has it, or None.
        """
        if needed is not None and importlib.util.find_spec(needed[0]) is None:
            text = f'{optimizer} needs {needed[1]}, which is not installed: pip install "anima-train[optimizers]"'
            self.add_problem(self.main, "optimizer.type", text)


def load_config(path: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a configuration with its datasets.

    Args:
        path: the main TOML.
        overrides: `key.path=value` from --set, later ones win.

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    loader = Loader(path)
    data = loader.translate(loader.read(path, overrides), MAIN, loader.main)

    # Datasets are checked on their own, so that their messages name their own file; until then the config has paths.
    entries = data.get("eval_datasets")
    listed = enumerate(entries) if isinstance(entries, list) else ()
    tables = {index: entry for index, entry in listed if isinstance(entry, dict)}
    config = loader.validate(Config, replace_tables(data), loader.main, MAIN_HINTS)
    if config is not None:  # before the sets whose pictures these files draw
        found_files = {"model": loader.find_model_files(config.model), "adapter": loader.find_initial(config.adapter)}
        config = config.model_copy(update=found_files | {"sampling": loader.find_judge(config.sampling)})
    train = loader.load_dataset("train", data.get("dataset"), "dataset", config)
    evals = [loader.load_eval(index, entry, config) for index, entry in tables.items()]
    for entry, dataset in zip(tables.values(), evals, strict=True):
        if dataset is not None and entry.get("config") != data.get("dataset"):  # else they are meant for training
            loader.note_unused(dataset)
    if config is not None:
        for key, text in (("output_dir", config.output_dir), ("cache_dir", config.cache_dir)):
            loader.check_folder(key, text)
        loader.check_library(config.optimizer.type, config.optimizer.needs_library)
    kept = None if config is None else load_preserved(loader, config, train)
    if loader.problems or config is None or train is None:
        raise ConfigError(loader.problems)

    pairs = zip(config.eval_datasets, evals, strict=True)
    found = tuple(replace(dataset, role=entry.role) for entry, dataset in pairs if dataset is not None)
    sets = zip(config.eval_datasets, found, strict=True)
    config = config.model_copy(
        update={
            "preservation": None if kept is None else kept.settings,
            "dataset": train.settings,
            "eval_datasets": [with_contents(entry, dataset) for entry, dataset in sets],
        }
    )
    for key, why in without_effect(config):
        loader.add_note(loader.main, key, why)
    loader.notes.extend(f"{loader.key_name(loader.main, key)}: {advice}" for key, advice in optimizer_advice(config))
    run_name, notes = config.run_name or name_by_time(path), tuple(dict.fromkeys(loader.notes))
    warnings = tuple(f"{loader.key_name(loader.main, key)}: {text}" for key, text in rate_warnings(config))
    shared = () if kept is None else measured_too(kept, found)
    warnings += tuple(f"{loader.key_name(loader.main, 'preservation.captions')}: {text}" for text in shared)
    return LoadedConfig(config, run_name, train, found, notes, tuple(loader.missing), warnings, kept)


def with_contents(entry: EvalDataset, dataset: Dataset) -> EvalDataset:
    """Return the settings of an evaluation set with what the files that they name say, wherever they are read next."""
    if dataset.drawn is None:
        return entry.model_copy(update={"config": dataset.settings})
    return entry if entry.captions == SHIPPED else entry.model_copy(update={"captions": dict(dataset.drawn.captions)})
