"""TensorBoard and W&B, fed by a thread of their own; metrics.jsonl, which the loop writes itself, is the truth."""

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from anima_train.config.sections import Monitoring
from anima_train.core.background import BackgroundThread
from anima_train.core.errors import ConfigError
from anima_train.core.format import count

MAX_WAITING = 10_000  # records; what a stalled tracker does not take is dropped, with a count
NAME = "anima-train"  # of TensorBoard's folder in that of the run, and of the W&B project unless it is set
PATIENCE = 60.0  # seconds that the end of a run waits for a tracker

Action = Callable[[GeneralTracker], object]

logger = logging.getLogger(__name__)


def check_trackers(monitoring: Monitoring) -> None:
    """Require what the trackers need.

    Raises:
        ConfigError: W&B is on but not installed.
    """
    if monitoring.enable_wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError('monitoring.enable_wandb: needs W&B: pip install "anima-train[wandb]"')


def open_trackers(is_main: bool, monitoring: Monitoring, folder: Path, offline: bool) -> list[GeneralTracker]:
    """Open what `make_trackers` returns on the main process, of which `is_main` is True; nothing on the others."""
    trackers = make_trackers(monitoring, folder, offline) if is_main else []
    for tracker in trackers:
        tracker.start()
    return trackers


def make_trackers(monitoring: Monitoring, folder: Path, offline: bool) -> list[GeneralTracker]:
    """Return the trackers that are on.

    Args:
        monitoring: their settings.
        folder: of the run, which is called as it.
        offline: True if W&B only writes files, for `wandb sync` to send later.
    """
    trackers: list[GeneralTracker] = []
    if monitoring.tensorboard:
        trackers.append(TensorBoardTracker(NAME, folder))
    if monitoring.enable_wandb:
        options = wandb_options(monitoring, folder, offline)
        trackers.append(WandBTracker(monitoring.wandb_tracker_name or NAME, **options))
    return trackers


def wandb_options(monitoring: Monitoring, folder: Path, offline: bool) -> dict[str, Any]:
    """Return how W&B is opened: with numbers and pictures, and nothing of this machine or of what was typed on it."""
    if offline:
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # sends to another address than the rest
    import wandb

    if monitoring.wandb_api_key:
        os.environ["WANDB_API_KEY"] = monitoring.wandb_api_key  # the one way to hand it over that stores it nowhere
    return {
        "name": monitoring.wandb_run_name or folder.name,
        "dir": str(folder),
        "mode": "offline" if offline else None,
        "settings": wandb.Settings(
            # User, host, paths, and the command line with its --set monitoring.wandb_api_key.
            x_disable_meta=True,
            x_disable_machine_info=True,
            host="anima-train",
            disable_git=True,
            disable_code=True,
            save_code=False,
            console="off",  # what is printed holds paths
        ),
    }


class Trackers(BackgroundThread):
    """Numbers on their way to the trackers: neither a stall nor a failure there reaches the training.

    Args:
        opens: makes the trackers; called in the thread, as it may wait for a network.
    """

    def __init__(self, opens: Callable[[], list[GeneralTracker]]) -> None:
        super().__init__("trackers", MAX_WAITING)
        self.opened: list[GeneralTracker] = []
        self.num_dropped = 0
        self.submit(partial(self.open, opens))

    def open(self, opens: Callable[[], list[GeneralTracker]]) -> None:
        """Open the trackers, in the thread."""
        try:
            self.opened = opens()
        except BaseException as error:  # noqa: BLE001  # whatever a tracker's library raises, it is a warning
            logger.warning("the trackers could not be opened (%s); metrics.jsonl has all numbers", error)

    def log(self, values: Mapping[str, float], x: int) -> None:
        """Hand over numbers at once; they are sent later."""
        copied = dict(values)
        self.hand_over(lambda tracker: tracker.log(copied, x))

    def show(self, pictures: Mapping[str, np.ndarray], x: int) -> None:
        """Hand over pictures, (h, w, 3) uint8 each, by their names."""
        batches = {name: picture[None] for name, picture in pictures.items()}
        # TensorBoard must be told that channels are last, as all others expect.
        options = {"tensorboard": {"dataformats": "NHWC"}}
        self.hand_over(lambda tracker: tracker.log_images(batches, x, **options.get(tracker.name, {})))

    def hand_over(self, action: Action) -> None:
        """Have something done with each tracker, if there is room."""
        self.num_dropped += not self.submit(partial(self.ask_all, action), timeout=0)

    def ask_all(self, action: Action) -> None:
        """Do something with each tracker, in the thread; one that fails is told of once and not asked again."""
        for tracker in list(self.opened):
            try:
                action(tracker)
            except BaseException as error:  # noqa: BLE001  # the same
                text = "%s has failed (%s) and gets no more numbers; metrics.jsonl has them all"
                logger.warning(text, tracker.name, error)
                self.opened.remove(tracker)

    def close(self, patience: float | None = PATIENCE) -> bool:
        """Wait until all is sent, but not for ever; return False if it was not."""
        if self.num_dropped:
            logger.warning("%s not sent to the trackers; metrics.jsonl has them", count(self.num_dropped, "record"))
        finishes = partial(self.ask_all, lambda tracker: tracker.finish())
        is_done = self.submit(finishes, timeout=patience) and super().close(patience)
        if not is_done:
            logger.warning("a tracker has not taken all numbers; metrics.jsonl has them")
        return is_done
