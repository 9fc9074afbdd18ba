"""The resolved configuration, every default in it, as runs keep it."""

import tomllib
from typing import Any

import tomli_w

from anima_train.config.config import Config
from anima_train.config.ladder import LADDER_KEYS, is_free


def config_toml(config: Config) -> str:
    """Return the resolved configuration, with every default and without secrets, as TOML that can be run again.

    What `memory` may choose is left out where it is not written: it stays free to be chosen.
    """
    left_out: dict[str, Any] = {"monitoring": {"wandb_api_key": True}}
    for key in LADDER_KEYS:
        if is_free(config, key):
            table, _, name = key.rpartition(".")
            (left_out.setdefault(table, {}) if table else left_out)[name] = True
    return tomli_w.dumps(config.model_dump(exclude_none=True, exclude=left_out))


def plain(config: Config) -> dict[str, Any]:
    """Return the resolved configuration as `config_toml` does, in the types that TOML and JSON have."""
    return tomllib.loads(config_toml(config))
