"""Everything before the first step that needs no training: the scan, the plan, the groups, and reports of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from anima_train.checkpoint.disk_space import Writings, file_sizes, first_needs, writings
from anima_train.config.load import LoadedConfig
from anima_train.core.device import DTYPES
from anima_train.core.errors import ConfigError
from anima_train.core.files import Need
from anima_train.data.plan import EpochSchedule, Plan
from anima_train.data.samples import Sample
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.llm_adapter import LLMAdapter, LLMAdapterShape
from anima_train.model.loading import ModelFiles, load_transformer
from anima_train.optim.groups import GroupRow, LearningRates, group_table, optimizer_groups


def make_plan(loaded: LoadedConfig, samples: Sequence[Sample], num_processes: int) -> Plan:
    """The plan of the run's batches."""
    config = loaded.config
    return Plan(samples, config.seed, config.batch_sizes(), config.gradient_accumulation_steps * num_processes)


def make_timetable(loaded: LoadedConfig, plan: Plan) -> EpochSchedule:
    """The timetable of the run."""
    return EpochSchedule.of(plan, loaded.config.epochs, loaded.config.max_steps)


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


def first_files(loaded: LoadedConfig, files: ModelFiles) -> list[Need]:
    """What a run has to have room for before it begins, at the least."""
    sizes = file_sizes(loaded.config, trainable_transformer(loaded, files), files)
    return first_needs(run_path(loaded), loaded.config, sizes)


def planned_writings(
    loaded: LoadedConfig, files: ModelFiles, plan: Plan, timetable: EpochSchedule, transformer: MiniTrainDIT,
    start: int = 0, num_states: int = 0,
) -> Writings:  # fmt: skip
    """What a run will write after its first `start` steps, of which `num_states` training states are there."""
    images_per_epoch = float(sum(sample.repeats for sample in plan.samples))
    sizes = file_sizes(loaded.config, transformer, files)
    return writings(run_path(loaded), loaded.config, sizes, timetable, images_per_epoch, start, num_states)


def run_path(loaded: LoadedConfig) -> Path:
    """The run's folder."""
    return Path(loaded.config.output_dir) / loaded.run_name
