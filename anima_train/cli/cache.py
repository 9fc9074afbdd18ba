"""`anima cache`."""

from pathlib import Path

from anima_train.cli.train import ConfigPath, Overrides
from anima_train.config.load import load_config
from anima_train.training.train import make_accelerator, prepare_data


def cache(config: ConfigPath, overrides: Overrides = None) -> None:
    """Fill the cache of latents and text without training."""
    loaded = load_config(config, overrides or [])
    accelerator = make_accelerator(loaded.config, Path(loaded.config.output_dir) / loaded.run_name)
    prepare_data(loaded, accelerator)
    accelerator.end_training()
