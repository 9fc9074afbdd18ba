"""The settings that are right but change nothing in this run: noted, not refused, as shared recipes carry them."""

from collections.abc import Iterator

from anima_train.config.config import EVAL_INTERVALS, STATE_INTERVALS, Config
from anima_train.data.settings import DatasetSettings
from anima_train.model.block_swap import MAX_BUFFERS


def without_effect(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (key, why it has no effect) for the keys of the main file."""
    if not config.eval_datasets:
        for key in (*EVAL_INTERVALS, "eval_before_first_step", "eval_micro_batch_size_per_gpu"):
            if key in config.model_fields_set:
                yield key, "there are no eval_datasets"
    if "keep_last" in config.model_fields_set and not any(getattr(config, key) for key in STATE_INTERVALS):
        yield "keep_last", "no training state is saved without checkpoint_every_n_..."
    if 0 < config.blocks_to_swap <= MAX_BUFFERS:
        yield "blocks_to_swap", f"the weights of {MAX_BUFFERS} swapped blocks are always on the device"
    if config.normalize_masked_loss and not any(map(has_masks, datasets_of(config))):
        yield "normalize_masked_loss", "no dataset has masks (mask_path, mask_column or alpha_as_mask)"
    monitoring = config.monitoring
    if not monitoring.enable_wandb:
        for key in ("wandb_api_key", "wandb_tracker_name", "wandb_run_name"):
            if getattr(monitoring, key):
                yield f"monitoring.{key}", "enable_wandb is false"
    if config.x_axis_examples and not (monitoring.tensorboard or monitoring.enable_wandb):
        yield "x_axis_examples", "there are neither TensorBoard nor W&B curves"


def datasets_of(config: Config) -> Iterator[DatasetSettings]:
    """Yield the training set and the evaluation sets, as tables."""
    for dataset in (config.dataset, *(entry.config for entry in config.eval_datasets)):
        if not isinstance(dataset, str):
            yield dataset


def has_masks(dataset: DatasetSettings) -> bool:
    """Return True if any of its images may have a mask."""
    return any(
        directory.mask_path or directory.mask_column or dataset.options(index).alpha_as_mask
        for index, directory in enumerate(dataset.directory)
    )
