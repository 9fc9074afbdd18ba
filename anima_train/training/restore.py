"""The beginning of a run's records: its manifest, and the state that it goes on from, if there is one."""

import json
import logging
from pathlib import Path
from typing import Any

from anima_train.adapters.choice import AnyAdapter
from anima_train.adapters.initial import lora_file
from anima_train.adapters.lora import Lora
from anima_train.checkpoint.leftovers import remove_leftovers
from anima_train.checkpoint.manifest import SavedState
from anima_train.checkpoint.resume import check_same_content, damaged_records, retire_states
from anima_train.checkpoint.training_state import load_state, read_start, saved_states, start_name
from anima_train.config.resolved import config_toml
from anima_train.core.files import sha256_file, write_text
from anima_train.core.format import listed
from anima_train.data.plan import EpochSchedule, Plan, times_seen
from anima_train.distributed.collectives import broadcast_from_main
from anima_train.optim.groups import group_rows
from anima_train.run.folder import RunFolder
from anima_train.run.manifest import manifest
from anima_train.training.anomalies import replay
from anima_train.training.build import begins_with_lora, disk_plan, file_sizes
from anima_train.training.context import RunContext
from anima_train.training.prepare import Prepared
from anima_train.training.setup import TrainState

logger = logging.getLogger(__name__)


def restore(
    run: RunContext, state: TrainState, data: Prepared, plan: Plan, schedule: EpochSchedule, attention: str
) -> dict[str, Any]:
    """Load the state that the run goes on from, and put the run's records in order; return its manifest.

    Args:
        run: the run.
        state: with the weights and the optimizer at their start.
        data: that it trains on.
        plan: of its batches.
        schedule: of its epochs.
        attention: the kernel that it uses.

    Raises:
        ModelFileError: the state is of other files, images or parameters than those of this run.
    """
    config, saved = run.config, run.resume_point.saved
    rows = group_rows(state.transformer, config.learning_rates())
    spec = data.spec

    def checked() -> dict[str, Any]:
        facts = manifest(
            run.folder.name, spec.files, data.train, rows, config.seed, schedule.num_steps,
            run.accelerator.num_processes, config.gradient_accumulation_steps, attention,
        ) | {
            "memory": {} if run.rung is None else dict(run.rung.settings),
            "began_with": began_with(config.adapter, saved),
        }  # fmt: skip
        if saved is not None:
            check_same_content(saved, facts, config.adapter, spec.files)
        return facts

    facts = broadcast_from_main(run.accelerator, checked)
    if saved is not None:
        load_state(saved, state.transformer, state.optimizer, state.ema, state.shards)
        if begins_with_lora(config.adapter):  # the main process alone logs the share, and has kept its own sample
            state.moved.begin_at(read_start(saved, start_name(state.shards)) if run.is_main else None)
        state.step = saved.manifest.step
    state.samples_seen = sum(times_seen(plan, schedule, state.step))
    if run.is_main:
        if removed := remove_leftovers(run.folder):
            logger.info("note: removed what an earlier start has left: %s", ", ".join(listed(removed)))
        for path in retire_states(run.folder.checkpoints, state.step):
            logger.info("note: %s is of a step that is made again; it is not read any more", path)
        start_records(run, data, facts)
        num_states = len(saved_states(run.folder.checkpoints))
        sizes = file_sizes(config, spec, data.train.samples)
        kept = run.loaded.base_velocity_bytes({each.name: each.data.samples for each in data.evals})
        planned = disk_plan(config, run.folder.path, sizes, plan, schedule, state.step, num_states, kept)
        if warning := planned.warning(config.keep_last):
            logger.warning("%s", warning)
    state.skipped, state.spikes = broadcast_from_main(
        run.accelerator, lambda: replay(run.folder.metrics_path, state.step)
    )
    return facts


def began_with(adapter: AnyAdapter, saved: SavedState | None) -> dict[str, Any]:
    """Return the facts about the LoRA that a run has begun with; empty if there was none."""
    if saved is not None:
        found: dict[str, Any] = saved.manifest.run.get("began_with", {})
        return found
    if not isinstance(adapter, Lora) or adapter.init_from_existing is None:
        return {}
    path = lora_file(Path(adapter.init_from_existing))
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def start_records(run: RunContext, data: Prepared, facts: dict[str, Any]) -> None:
    """Keep what was logged of steps that are not made again, and write the configuration, the manifest and warnings."""
    point, folder = run.resume_point, run.folder
    step, pending, damaged = 0, list[str](), list[str]()
    if point.saved is not None and point.source is not None:
        step, pending = point.saved.manifest.step, point.saved.manifest.pending
        damaged = damaged_records(point.saved, RunFolder(point.source.parent, point.source.name))
        for name in damaged:
            logger.warning(
                "%s: is missing, or was changed after step %d was saved; the training is the same, but curves drawn "
                "from this file are not",
                point.source / name,
                step,
            )
    folder.start_records(point.source, step, pending, keeps_base=folder.base_path.name not in damaged)
    write_text(folder.config_path, config_toml(run.loaded.config))
    write_text(folder.manifest_path, json.dumps(facts, indent=1))
    for warning in (*run.loaded.notes, *data.warnings):  # on the terminal they are already, in other words
        run.warnings.keep(0, warning)
    run.warnings.open(folder)
