"""A project folder with a small correct config, to change key by key."""

import copy
from pathlib import Path

import pytest
import tomli_w

from anima_train.config.load import load_config
from anima_train.core.errors import ConfigError

MINIMAL = {
    "output_dir": "out",
    "epochs": 1,
    "dataset": {"directory": [{"path": "data"}]},
    "model": {"type": "anima"},
    "adapter": {"type": "lora"},
    "optimizer": {"type": "adamw", "lr": 1e-4},
}
ABSENT = object()


class Project:
    """The current folder, with images in `data` and a config to load."""

    absent = ABSENT

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name, text):
        """A file in the project."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def config(self, changes=None, name="main.toml", base=MINIMAL):
        """The minimal config with other values, by dotted key; `absent` removes one."""
        data = copy.deepcopy(base)
        for key, value in (changes or {}).items():
            *parents, last = key.split(".")
            table = data
            for parent in parents:
                table = table[int(parent)] if isinstance(table, list) else table.setdefault(parent, {})
            if value is ABSENT:
                del table[last]
            elif isinstance(table, list):
                table[int(last)] = value
            else:
                table[last] = value
        return self.write(name, tomli_w.dumps(data))

    def load(self, changes=None, overrides=()):
        """What the changed config loads to."""
        return load_config(self.config(changes), overrides)

    def problems(self, changes=None, overrides=()):
        """What is wrong with the changed config."""
        with pytest.raises(ConfigError) as caught:
            self.load(changes, overrides)
        return list(caught.value.problems)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project as the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    return Project(tmp_path)
