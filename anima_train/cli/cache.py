"""`anima cache`."""

import logging
import os
from typing import Annotated

import typer

from anima_train.cli.options import ConfigPath, Overrides, Quiet
from anima_train.cli.output import quiet
from anima_train.distributed.launcher import world_size

PRUNE = (
    "First remove from this configuration's cache folders whatever this configuration does not use. Other "
    "configurations that share its folders or cache_dir lose what they alone use, and make it again."
)
VERIFY = "Read every entry, and rebuild those that are damaged."


def cache(
    config: ConfigPath,
    overrides: Overrides = None,
    prune: Annotated[bool, typer.Option("--prune", help=PRUNE)] = False,
    verify: Annotated[bool, typer.Option("--verify", help=VERIFY)] = False,
    quietly: Quiet = False,
) -> None:
    """Fill the cache of latents and text without training. Several of these may fill one cache together."""
    from anima_train.config.load import load_config

    loaded = load_config(config, overrides or [])

    from anima_train.config.launch import launch_settings
    from anima_train.core.device import DTYPES, describe_device
    from anima_train.distributed.collectives import process_group
    from anima_train.distributed.consistency import check_same_config
    from anima_train.distributed.environment import read_environment
    from anima_train.run.accelerator import make_accelerator
    from anima_train.run.log import logged_to, terminal
    from anima_train.training.prepare import prepare_data

    read_environment(os.environ, launch_settings(loaded.config, world_size()))
    accelerator = make_accelerator(loaded.config.model.uses_autocast)
    with quiet(quietly), process_group(accelerator), logged_to(terminal(accelerator.is_main_process)):
        logging.getLogger(__name__).info("%s", describe_device(accelerator.device, DTYPES[loaded.config.model.dtype]))
        prepare_data(check_same_config(loaded, accelerator), accelerator, prune, verify)
