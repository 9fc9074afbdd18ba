"""A run before anything of it is loaded: its processes, its folder, and the place where it begins."""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from accelerate import Accelerator

from anima_train.checkpoint.resume import ResumePoint, find_resume_point
from anima_train.config.config import Config
from anima_train.config.ladder import Rung
from anima_train.config.launch import launch_settings
from anima_train.config.loaded import LoadedConfig
from anima_train.config.resolved import plain
from anima_train.core.determinism import PRICE
from anima_train.core.device import DTYPES, describe_device
from anima_train.core.errors import ConfigError
from anima_train.distributed.collectives import broadcast_from_main, process_group
from anima_train.distributed.consistency import check_same_config
from anima_train.distributed.environment import read_environment
from anima_train.distributed.launcher import world_size
from anima_train.distributed.signals import SignalHandler
from anima_train.run.accelerator import make_accelerator
from anima_train.run.folder import RunFolder
from anima_train.run.log import WarningsHandler, lists_kept, logged_to, terminal
from anima_train.run.trackers import check_trackers
from anima_train.training.memory import MemoryContext

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunContext:
    """The things that the parts of a run share; nothing in it changes with the steps.

    What has to be closed at the run's end, in the reverse order, goes on `stack`.
    """

    loaded: LoadedConfig
    accelerator: Accelerator
    folder: RunFolder
    resume_point: ResumePoint
    signals: SignalHandler
    warnings: WarningsHandler
    stack: contextlib.ExitStack
    memory: MemoryContext
    divides: bool  # the transformer among the processes
    rung: Rung | None = None  # the settings that `memory` has chosen; None: not yet

    @cached_property
    def config(self) -> Config:
        """The configuration, with what `memory` has chosen."""
        return self.loaded.config if self.rung is None else self.rung.config

    @property
    def is_main(self) -> bool:
        """True on the process that writes files."""
        return bool(self.accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        """The device that trains."""
        return self.accelerator.device


@contextlib.contextmanager
def run_context(loaded: LoadedConfig, resume: bool, resume_path: Path | None) -> Iterator[RunContext]:
    """Have the processes agree, decide where the run begins, take its folder, and listen to signals.

    Args:
        loaded: the configuration.
        resume: go on with this run.
        resume_path: the state, or the run, to go on from.

    Raises:
        ConfigError: processes differ, there is nothing to resume, or the folder is in use.
    """
    config = loaded.config
    launch = read_environment(os.environ, launch_settings(config, world_size()))
    loaded = replace(loaded, notes=(*loaded.notes, *launch.notes))
    check_trackers(config.monitoring)
    accelerator = make_accelerator(config.model.uses_autocast)
    warnings = WarningsHandler()
    speaker = terminal(accelerator.is_main_process)
    handlers = logged_to(speaker, *([warnings] if accelerator.is_main_process else []))
    with handlers, contextlib.ExitStack() as stack:
        logger.info("%s", describe_device(accelerator.device, DTYPES[config.model.dtype]))
        if config.deterministic:
            logger.info("%s", PRICE)
        stack.enter_context(process_group(accelerator))
        loaded = check_same_config(loaded, accelerator, launch.shards)
        for warning in loaded.warnings:
            logger.warning("%s", warning)
        for note in loaded.notes:
            logger.info("note: %s", note)
        point = broadcast_from_main(
            accelerator, partial(find_resume_point, plain(config), loaded.run_name, resume, resume_path)
        )
        for note in point.notes:
            logger.info("%s", note)
        if point.saved is None and loaded.missing:
            raise ConfigError(loaded.missing)
        loaded = replace(loaded, run_name=point.run_name)
        folder = RunFolder(Path(config.output_dir), loaded.run_name)
        if accelerator.is_main_process:
            folder.open()
            stack.callback(folder.close)
            stack.enter_context(lists_kept(folder))
            speaker.where = folder.where_lists_are
            stack.enter_context(folder.watched())
        signals = stack.enter_context(SignalHandler(folder.path))
        yield RunContext(
            loaded, accelerator, folder, point, signals, warnings, stack, MemoryContext("loading the model"),
            launch.shards,
        )  # fmt: skip
