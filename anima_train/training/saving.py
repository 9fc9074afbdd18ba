"""The saving of a run: its weights and training states, written behind the steps."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from anima_train.checkpoint.async_writer import AsyncWriter, Groups
from anima_train.checkpoint.manifest import StateManifest
from anima_train.checkpoint.metadata import at_level, data_metadata, thumbnail, weights_metadata
from anima_train.checkpoint.samples import sample_records
from anima_train.checkpoint.training_state import START, save_state, start_name, state_tensors, take_part_in
from anima_train.checkpoint.weights import save_weights, warn_of_unused, weights_to_save
from anima_train.config.resolved import plain
from anima_train.config.saved_settings import settings_metadata
from anima_train.core.device import DTYPES
from anima_train.data.plan import EpochSchedule, Plan
from anima_train.model.safetensors_io import open_header, read_tensors
from anima_train.training.build import begins_with_lora
from anima_train.training.context import RunContext
from anima_train.training.prepare import Prepared
from anima_train.training.setup import TrainState

logger = logging.getLogger(__name__)


@dataclass
class Saver:
    """The writer of weights and training states: the main process, or all of a divided model together."""

    context: RunContext
    state: TrainState
    data: Prepared
    plan: Plan
    schedule: EpochSchedule
    manifest: Mapping[str, Any]
    scores: dict[int, float] = field(default_factory=dict)  # see `evaluation.results.score`, after a step

    def __post_init__(self) -> None:
        self.writer = self.context.stack.enter_context(AsyncWriter())  # closed with the run

    @property
    def writes(self) -> bool:
        """True on processes that take part in saving: the main one, and all if the model is divided among them."""
        return self.context.is_main or self.state.shards is not None

    def write(self, groups: Groups, job: Callable[[Groups], object]) -> None:
        """Have the main process write tensors, behind the steps; of a divided model at once, all processes together."""
        if self.state.shards is None:
            self.writer.write(groups, job)
        elif self.context.is_main:
            job(groups)
        else:
            take_part_in(groups)

    @cached_property
    def sample_records(self) -> bytes:
        """The facts about the dataset that each state keeps."""
        return sample_records(self.data.train.samples, self.data.unusable)

    @cached_property
    def data_metadata(self) -> dict[str, str]:
        """The metadata that come from the data: they may take long; made once, where weights are written."""
        return data_metadata(self.plan.samples, self.context.config.metadata.tag_frequencies)

    def save_weights(self, step: int | None, path: Path | None = None) -> Path:
        """Have the adapter or the model written; None: after the last step. Return its path."""
        path = self.context.folder.weights_path(step) if path is None else path
        done = self.state.step if step is None else step
        epoch = self.schedule.locate(max(0, done - 1))[0] + 1
        config = self.context.config
        base, num_blocks = self.manifest["model_files"].get("transformer", {}), len(self.state.transformer.blocks)
        settings = settings_metadata(config) | self.data.spec.files.metadata(is_adapter=config.adapter.leaves_base)
        metadata = weights_metadata(self.context.folder.name, done, epoch, config.adapter, num_blocks, settings, base)

        def write(groups: Groups) -> None:
            self.context.folder.check()  # or it would be made again, without what it held
            picture = thumbnail(self.context.folder.path / "samples", done) if config.metadata.thumbnail else {}
            told = at_level(metadata | self.data_metadata | picture, config.metadata.level)
            save_weights(path, groups["weights"], told)
            warn_of_unused(path, done)
            if config.adapter.is_without_effect(read_tensors(open_header(path))):
                has_masks = any(sample.has_mask for sample in self.plan.samples)
                asked = (
                    "do the masks leave anything to train (white is)?" if has_masks else "is the learning rate too low?"
                )
                parts = " and ".join(part.strip(".").removesuffix(".weight") for part in config.adapter.zero_factors)
                text = "%s changes nothing: every %s in it is zero; %s"
                logger.warning(text, path.name, parts, asked, extra={"step": done})
            if step is not None:
                logger.info("step %d: saved %s", step, path)

        with self.state.averaged():
            dtype = None if config.save_dtype is None else DTYPES[config.save_dtype]
            tensors = weights_to_save(config.adapter, self.state.transformer, self.data.spec.files, dtype)
            self.write({"weights": tensors}, write)
        return path

    def save_state(self, step: int, pending: Sequence[str] = ()) -> None:
        """Have the training state after a step written."""
        state, folder = self.state, self.context.folder
        keep_last = self.context.config.keep_last
        facts = StateManifest(
            step=step,
            optimizer=type(state.optimizer).__name__,
            pending=list(pending),
            score=self.scores.get(step),
            run=dict(self.manifest),
            config=plain(self.context.loaded.config),
            records=self.record_digests(step, pending),
        )
        groups = state_tensors(state.transformer, state.optimizer, state.ema, state.shards)
        if begins_with_lora(self.context.config.adapter) and state.moved.first is not None:
            groups = {**groups, START: {start_name(state.shards): state.moved.first}}

        def write(groups: Groups) -> None:
            folder.check()
            folder.sync()  # what was logged before the state
            save_state(folder.checkpoints, facts, groups, keep_last, self.sample_records)

        self.write(groups, write)

    def record_digests(self, step: int, pending: Sequence[str]) -> dict[str, str]:
        """Return the hashes of what was logged until a step; empty on processes that log nothing."""
        if not self.context.is_main:
            return {}
        folder = self.context.folder
        return folder.digests(step, pending) if pending or step < self.state.step else folder.digests_now()
