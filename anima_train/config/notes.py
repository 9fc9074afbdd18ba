"""Settings that are right but change nothing in this run: noted, not refused, as shared recipes carry them."""

from collections.abc import Iterator

from anima_train.config.config import EVAL_INTERVALS, STATE_INTERVALS, Config


def without_effect(config: Config) -> Iterator[tuple[str, str]]:
    """(key, why it has no effect) for the keys of the main file."""
    if not config.eval_datasets:
        for key in (*EVAL_INTERVALS, "eval_before_first_step", "eval_micro_batch_size_per_gpu"):
            if key in config.model_fields_set:
                yield key, "there are no eval_datasets"
    if "keep_last" in config.model_fields_set and not any(getattr(config, key) for key in STATE_INTERVALS):
        yield "keep_last", "no training state is saved without checkpoint_every_n_..."
    monitoring = config.monitoring
    if not monitoring.enable_wandb:
        for key in ("wandb_api_key", "wandb_tracker_name", "wandb_run_name"):
            if getattr(monitoring, key):
                yield f"monitoring.{key}", "enable_wandb is false"
    if config.x_axis_examples and not (monitoring.tensorboard or monitoring.enable_wandb):
        yield "x_axis_examples", "there are neither TensorBoard nor W&B curves"
