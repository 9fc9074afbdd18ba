"""The resolved configuration, every default in it, as runs keep it."""

import tomllib
from typing import Any

import tomli_w

from anima_train.config.config import Config


def config_toml(config: Config) -> str:
    """Return the resolved configuration, with every default and without secrets, as TOML that can be run again."""
    return tomli_w.dumps(config.model_dump(exclude_none=True, exclude={"monitoring": {"wandb_api_key"}}))


def plain(config: Config) -> dict[str, Any]:
    """Return the resolved configuration as `config_toml` does, in the types that TOML and JSON have."""
    return tomllib.loads(config_toml(config))
