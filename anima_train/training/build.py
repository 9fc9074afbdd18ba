"""The plan, the model and the files of a run, made from its configuration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from anima_train.checkpoint.disk_space import Writings, file_sizes, first_needs, writings
from anima_train.config.config import Config
from anima_train.config.load import LoadedConfig
from anima_train.core.errors import ConfigError
from anima_train.core.files import DiskRequirement
from anima_train.data.plan import EpochSchedule, Plan
from anima_train.data.samples import Sample
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.llm_adapter import LLMAdapter, LLMAdapterShape
from anima_train.model.loading import ModelFiles, ModelSpec, load_transformer
from anima_train.optim.groups import optimizer_groups


def plan_run(config: Config, samples: Sequence[Sample], num_processes: int) -> tuple[Plan, EpochSchedule]:
    """Return the plan of the run's batches, and its schedule of epochs.

    Raises:
        ConfigError: the run would have no step.
    """
    plan = Plan(samples, config.seed, config.batch_sizes(), config.gradient_accumulation_steps * num_processes)
    return plan, EpochSchedule.of(plan, config.epochs, config.max_steps)


def trainable_transformer(config: Config, spec: ModelSpec) -> MiniTrainDIT:
    """Return the transformer with what is trained attached, on the meta device: names, shapes, dtypes, no memory."""
    with torch.device("meta"):
        transformer = MiniTrainDIT(TransformerShape.of(spec.files.transformer_header.entries))
        if spec.trains_llm_adapter:
            transformer.llm_adapter = LLMAdapter(LLMAdapterShape.of(spec.files.llm_adapter_header.entries))
    transformer.to(spec.weights_dtype)
    config.adapter.attach(transformer, config.learning_rates(), config.seed)
    return transformer


def load_trained(config: Config, spec: ModelSpec) -> tuple[MiniTrainDIT, list[dict[str, Any]]]:
    """Return the transformer on its device with what is trained attached, ready for steps, and its parameter groups.

    Raises:
        ConfigError: nothing is trained.
    """
    rates = config.learning_rates()
    transformer = load_transformer(spec.files, spec.trains_llm_adapter, spec.weights_dtype, spec.device)
    config.adapter.attach(transformer, rates, config.seed)
    transformer.checkpoint_blocks = config.activation_checkpointing
    transformer.train()
    groups = optimizer_groups(transformer.named_parameters(), rates, config.optimizer.weight_decay)
    if not groups:
        raise ConfigError("nothing is trained: every component that this model has is frozen")
    return transformer, groups


def first_files(loaded: LoadedConfig, spec: ModelSpec) -> list[DiskRequirement]:
    """Return what a run has to have room for before it begins, at the least."""
    sizes = file_sizes(loaded.config, trainable_transformer(loaded.config, spec), spec.files)
    return first_needs(Path(loaded.config.output_dir) / loaded.run_name, loaded.config, sizes)


def planned_writings(
    loaded: LoadedConfig, files: ModelFiles, plan: Plan, schedule: EpochSchedule, transformer: MiniTrainDIT,
    start: int = 0, num_states: int = 0,
) -> Writings:  # fmt: skip
    """What a run will write after its first `start` steps, of which `num_states` training states are there."""
    images_per_epoch = float(sum(sample.repeats for sample in plan.samples))
    sizes = file_sizes(loaded.config, transformer, files)
    return writings(run_path(loaded), loaded.config, sizes, schedule, images_per_epoch, start, num_states)


def run_path(loaded: LoadedConfig) -> Path:
    """Return the run's folder."""
    return Path(loaded.config.output_dir) / loaded.run_name
