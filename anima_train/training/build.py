"""Everything before the first step that needs no training: the scan, the plan, the groups, and reports of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from anima_train.checkpoint.disk_space import (
    DiskPlan,
    FileSizes,
    first_requirements,
    first_state_bytes,
    picture_bytes,
    weights_bytes,
)
from anima_train.checkpoint.training_state import trained_parameters
from anima_train.checkpoint.weights import weights_to_save
from anima_train.config.load import LoadedConfig
from anima_train.core.device import DTYPES
from anima_train.core.errors import ConfigError
from anima_train.core.files import DiskRequirement
from anima_train.data.plan import Plan, Timetable, times_seen
from anima_train.data.samples import Sample
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.llm_adapter import LLMAdapter, LLMAdapterShape
from anima_train.model.loading import ModelFiles, load_transformer
from anima_train.optim.groups import GroupRow, LearningRates, group_table, optimizer_groups
from anima_train.run.intervals import Interval


def make_plan(loaded: LoadedConfig, samples: Sequence[Sample], num_processes: int) -> Plan:
    """The plan of the run's batches."""
    config = loaded.config
    return Plan(samples, config.seed, config.batch_sizes(), config.gradient_accumulation_steps * num_processes)


def make_timetable(loaded: LoadedConfig, plan: Plan) -> Timetable:
    """The timetable of the run."""
    return Timetable.of(plan, loaded.config.epochs, loaded.config.max_steps)


def trainable_transformer(loaded: LoadedConfig, files: ModelFiles) -> MiniTrainDIT:
    """The transformer with what is trained attached, on the meta device: names, shapes and dtypes, no memory."""
    rates = loaded.config.learning_rates()
    with torch.device("meta"):
        transformer = MiniTrainDIT(TransformerShape.of(files.transformer_header.entries))
        if rates.by_component["llm_adapter"] != 0:
            transformer.llm_adapter = LLMAdapter(LLMAdapterShape.of(files.adapter_header.entries))
    transformer.to(DTYPES[loaded.config.model.transformer_dtype or loaded.config.model.dtype])
    loaded.config.adapter.attach(transformer, rates, loaded.config.seed)
    return transformer


def load_trained(
    loaded: LoadedConfig, files: ModelFiles, device: torch.device
) -> tuple[MiniTrainDIT, list[dict[str, Any]]]:
    """The transformer on a device with what is trained attached, ready for steps, and its parameter groups.

    Raises:
        ConfigError: nothing is trained.
    """
    config = loaded.config
    rates = config.learning_rates()
    weights_dtype = DTYPES[config.model.transformer_dtype or config.model.dtype]
    transformer = load_transformer(files, rates.by_component["llm_adapter"] != 0, weights_dtype, device)
    config.adapter.attach(transformer, rates, config.seed)
    transformer.checkpoint_blocks = config.activation_checkpointing
    transformer.train()
    groups = optimizer_groups(transformer.named_parameters(), rates, config.optimizer.weight_decay)
    if not groups:
        raise ConfigError("nothing is trained: every component that this model has is frozen")
    return transformer, groups


def group_rows(transformer: MiniTrainDIT, rates: LearningRates) -> list[GroupRow]:
    """The table of what is trained, a frozen LLM adapter that is not in memory included."""
    parameters = list(transformer.named_parameters())
    trained = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    return group_table(trained, [*(name for name, _ in parameters), "llm_adapter."], rates)


def file_sizes(loaded: LoadedConfig, files: ModelFiles) -> FileSizes:
    """Return the bytes on disk of the files that a run writes, at most."""
    config = loaded.config
    transformer = trainable_transformer(loaded, files)
    dtype = None if config.save_dtype is None else DTYPES[config.save_dtype]
    num_trackers = config.monitoring.tensorboard + config.monitoring.enable_wandb
    prompts = () if config.sampling is None else config.sampling.prompts
    return FileSizes(
        weights_bytes(weights_to_save(config.adapter, transformer, files, dtype)),
        first_state_bytes(trained_parameters(transformer), config.optimizer, config.ema is not None),
        sum(map(picture_bytes, prompts)) * (1 + num_trackers),
    )


def first_files(loaded: LoadedConfig, files: ModelFiles) -> list[DiskRequirement]:
    """Return what a run has to have room for before it begins, at the least."""
    config = loaded.config
    saves_states = bool(
        config.checkpoint_every_n_epochs or config.checkpoint_every_n_steps or config.checkpoint_every_n_minutes
    )
    return first_requirements(run_path(loaded), file_sizes(loaded, files), saves_states)


def disk_plan(
    loaded: LoadedConfig, sizes: FileSizes, plan: Plan, timetable: Timetable, start: int = 0, num_states: int = 0
) -> DiskPlan:
    """Return what a run will write after its first `start` steps, of which `num_states` training states are there."""
    config, end = loaded.config, timetable.num_steps
    passed = (
        range(start, end),
        range(timetable.place(start)[0], timetable.place(end)[0]),
        range(*(sum(times_seen(plan, timetable, step)) for step in (start, end))),
    )
    saves = Interval(config.save_every_n_epochs, config.save_every_n_steps, config.save_every_n_examples)
    states = Interval(config.checkpoint_every_n_epochs, config.checkpoint_every_n_steps)
    # The newest states and the best are kept, and one more is there while it is written.
    num_kept = max(1, config.keep_last + 2 - num_states)
    by_time = config.checkpoint_every_n_minutes is not None
    sampling = config.sampling
    previews = 0
    if sampling is not None:
        previews = Interval(sampling.every_n_epochs, sampling.every_n_steps).count(*passed)
        previews += sampling.before_first_step and start == 0
    return DiskPlan(
        run_path(loaded),
        sizes,
        num_weights=saves.count(*passed) + 1,
        num_states=num_kept if by_time else min(num_kept, states.count(*passed)),
        num_previews=previews,
    )


def run_path(loaded: LoadedConfig) -> Path:
    """The run's folder."""
    return Path(loaded.config.output_dir) / loaded.run_name
