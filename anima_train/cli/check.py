"""`anima check`."""

from anima_train.cli.train import ConfigPath, Overrides
from anima_train.config.load import load_config
from anima_train.training.model import find_model_files
from anima_train.training.setup import report, scan_all


def check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check a config, its model files and its images, and report what a run would do."""
    loaded = load_config(config, overrides or [])
    files = find_model_files(loaded)
    files.check_headers()
    print(report(loaded, files, scan_all(loaded, write=True), num_processes=1))
