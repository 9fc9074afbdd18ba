"""TensorBoard and W&B, fed by a thread of their own; metrics.jsonl, which the loop writes itself, is the truth."""

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from anima_train.config.config import Monitoring
from anima_train.core.errors import ConfigError
from anima_train.core.format import count

logger = logging.getLogger(__name__)

MAX_WAITING = 10_000  # records; what a stalled tracker does not take is dropped, with a count
PATIENCE = 60.0  # seconds that the end of a run waits for a tracker

Record = tuple[dict[str, Any], int, bool]  # values, where on the x axis, whether they are pictures


def tracker_names(monitoring: Monitoring) -> list[str]:
    """Accelerate's names of the trackers that are on.

    Raises:
        ConfigError: W&B is on but not installed.
    """
    names = []
    if monitoring.tensorboard:
        names.append("tensorboard")
    if monitoring.enable_wandb:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise ConfigError('monitoring.enable_wandb: needs W&B: pip install "anima-train[wandb]"') from None
        names.append("wandb")
    return names


def open_trackers(
    accelerator: Accelerator, monitoring: Monitoring, run_name: str, offline: bool
) -> list[GeneralTracker]:
    """Open what the accelerator was made to log with; none on other processes than the main one.

    Args:
        accelerator: knows the trackers.
        monitoring: their settings.
        run_name: what they call the run.
        offline: whether W&B only writes files, for `wandb sync` to send later.
    """
    if not accelerator.is_main_process:
        return []
    accelerator.init_trackers(
        monitoring.wandb_tracker_name or "anima-train",
        init_kwargs={"wandb": wandb_options(accelerator, monitoring, run_name, offline)}
        if monitoring.enable_wandb
        else {},
    )
    return list(accelerator.trackers)


def wandb_options(accelerator: Accelerator, monitoring: Monitoring, run_name: str, offline: bool) -> dict[str, Any]:
    """How W&B is opened: it gets numbers and pictures, and nothing about this machine or what was typed on it."""
    if offline:
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # sends to another address than the rest
    import wandb

    if monitoring.wandb_api_key:
        os.environ["WANDB_API_KEY"] = monitoring.wandb_api_key  # the one way to hand it over that stores it nowhere
    return {
        "name": monitoring.wandb_run_name or run_name,
        "dir": accelerator.project_dir,
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


def send(tracker: GeneralTracker, values: dict[str, Any], x: int, are_pictures: bool) -> None:
    """Give a tracker one record."""
    if are_pictures:
        # TensorBoard must be told that channels are last, as all others expect.
        options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images(values, x, **options)
    else:
        tracker.log(values, x)


class Trackers:
    """Numbers on their way to the trackers: neither a stall nor a failure there reaches the training.

    On leaving, it waits until all is sent, unless the way out is a second Ctrl-C.

    Args:
        opens: makes the trackers; called in the thread, as it may wait for a network.
        warn: gets a line for each failure.
    """

    def __init__(
        self,
        opens: Callable[[], list[GeneralTracker]],
        warn: Callable[[str], None] = lambda line: logger.warning("%s", line.removeprefix("warning: ")),
    ) -> None:
        self.opens = opens
        self.warn = warn
        self.waiting: queue.Queue[Record | None] = queue.Queue(MAX_WAITING)
        self.num_dropped = 0
        self.thread = threading.Thread(target=self.work, name="trackers", daemon=True)
        self.thread.start()

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, Exception):
            self.close()

    def log(self, values: Mapping[str, float], x: int) -> None:
        """Hand over numbers at once; they are sent later."""
        self.put(dict(values), x, False)

    def show(self, pictures: Mapping[str, np.ndarray], x: int) -> None:
        """Hand over pictures, (h, w, 3) uint8 each, by their names."""
        self.put({name: picture[None] for name, picture in pictures.items()}, x, True)

    def put(self, values: dict[str, Any], x: int, are_pictures: bool) -> None:
        """Hand over a record, if there is room."""
        try:
            self.waiting.put_nowait((values, x, are_pictures))
        except queue.Full:
            self.num_dropped += 1

    def work(self) -> None:
        """Send what is handed over, until the end."""
        try:
            trackers = self.opens()
        except Exception as error:  # noqa: BLE001  # whatever a tracker's library raises, it is a warning
            self.warn(f"warning: the trackers could not be opened ({error}); metrics.jsonl has all numbers")
            return
        while (record := self.waiting.get()) is not None:
            for tracker in list(trackers):
                if not self.succeeds(tracker, partial(send, tracker, *record)):
                    trackers.remove(tracker)
        for tracker in trackers:
            self.succeeds(tracker, tracker.finish)

    def succeeds(self, tracker: GeneralTracker, action: Callable[[], object]) -> bool:
        """Whether a tracker does what it is asked; a failure is told once, as the tracker is not asked again."""
        try:
            action()
        except Exception as error:  # noqa: BLE001  # the same
            self.warn(
                f"warning: {tracker.name} has failed ({error}) and gets no more numbers; metrics.jsonl has them all"
            )
            return False
        return True

    def close(self, patience: float = PATIENCE) -> None:
        """Wait until all is sent, but not for ever."""
        if self.num_dropped:
            self.warn(f"warning: {count(self.num_dropped, 'record')} not sent to the trackers; metrics.jsonl has them")
        with contextlib.suppress(queue.Full):
            self.waiting.put(None, timeout=patience)
        self.thread.join(patience)
        if self.thread.is_alive():
            self.warn("warning: a tracker has not taken all numbers; metrics.jsonl has them")
