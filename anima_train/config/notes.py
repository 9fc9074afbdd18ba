"""The settings that are right but change nothing in this run: noted, not refused, as shared recipes carry them."""

from collections.abc import Iterator

from anima_train.adapters.full import Full
from anima_train.config.combinations import EVAL_INTERVALS, STATE_INTERVALS
from anima_train.config.config import Config
from anima_train.model.block_swap import MAX_BUFFERS
from anima_train.model.variants import picture_defaults
from anima_train.optim.groups import COMPONENTS
from anima_train.optim.optimizers import SCHEDULE_FREE


def without_effect(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (key, why it has no effect) for the keys of the main file."""
    if not config.eval_datasets:
        for key in (*EVAL_INTERVALS, "eval_before_first_step", "eval_micro_batch_size_per_gpu"):
            if key in config.model_fields_set:
                yield key, "there are no eval_datasets"
    if "keep_last" in config.model_fields_set and not any(getattr(config, key) for key in STATE_INTERVALS):
        yield "keep_last", "no training state is saved without checkpoint_every_n_..."
    own_rates = {f"{component}_lr": getattr(config.model, f"{component}_lr") for component in COMPONENTS[:-1]}
    if config.adapter.leaves_base and None not in own_rates.values():
        yield "optimizer.lr", "every component has a learning rate of its own in [model]"
    elif config.force_constant_lr is not None and config.optimizer.lr:
        yield "optimizer.lr", "force_constant_lr takes its place"
    for key, rate in own_rates.items():
        if config.force_constant_lr is not None and rate:
            yield f"model.{key}", "force_constant_lr takes its place"
    if "rank" in config.adapter.model_fields_set and getattr(config.adapter, "full_matrix", False):
        yield "adapter.rank", "full_matrix is true"
    if "alpha_rank_scale" in config.adapter.model_fields_set and not config.adapter.masks_ranks:
        yield "adapter.alpha_rank_scale", "there is no min_rank to fall to"
    rates = config.learning_rates().by_component
    if config.adapter.masks_ranks and not any(rates[part] for part in ("self_attn", "cross_attn", "mlp", "mod")):
        yield "adapter.min_rank", "only the LLM adapter trains, and what is added to it acts whole"
    for key in ("lr_pattern", "b_lr_ratio") if config.force_constant_lr is not None else ():
        if key in config.adapter.model_fields_set:
            yield f"adapter.{key}", "force_constant_lr takes its place"
    has_matrices = config.adapter.leaves_base and not getattr(config.adapter, "use_dora", False)
    for key in ("betas", "eps") if has_matrices and config.optimizer.type == "muon" else ():
        if key in config.optimizer.model_fields_set:
            yield f"optimizer.{key}", "an adapter has matrices alone, for which muon has momentum"
    if 0 < config.blocks_to_swap <= MAX_BUFFERS:
        yield "blocks_to_swap", f"the weights of {MAX_BUFFERS} swapped blocks are always on the device"
    monitoring = config.monitoring
    if not monitoring.enable_wandb:
        for key in ("wandb_api_key", "wandb_tracker_name", "wandb_run_name"):
            if getattr(monitoring, key):
                yield f"monitoring.{key}", "enable_wandb is false"
    if config.sampling is not None:
        of_variant = picture_defaults(config.model.transformer_path)
        for key, value in config.sampling.shared.items():
            if value != of_variant.get(key) and all(
                getattr(prompt, key) != value for prompt in config.sampling.prompts
            ):
                yield f"sampling.{key}", "every prompt has its own"
    texts = {key: value for key, value in config.metadata.model_dump().items() if value and key != "license"}
    level = texts.pop("level")
    for key in texts if level == "none" else texts.keys() & {"tag_frequencies"} if level == "minimal" else ():
        yield f"metadata.{key}", f'level is "{level}"'
    if config.x_axis_examples and not (monitoring.tensorboard or monitoring.enable_wandb):
        yield "x_axis_examples", "there are neither TensorBoard nor W&B curves"


def rate_warnings(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (key, what is wrong) for learning rates that are unusual for what is trained and for the optimizer."""
    rates = config.learning_rates().by_component
    components = [component for component in COMPONENTS if isinstance(config.adapter, Full) or component != "base"]
    highest = max(components, key=lambda component: rates[component])
    rate, own = rates[highest], getattr(config.model, f"{highest}_lr", None)
    key = "optimizer.lr" if own is None else f"model.{highest}_lr"
    if config.force_constant_lr is not None:
        key = "force_constant_lr"
    if config.optimizer.type == "prodigy":
        if rate < 0.1:
            yield key, f"{rate:g} is a factor on the rate that prodigy finds, and makes it that much smaller; write 1"
        return
    is_full = isinstance(config.adapter, Full)
    what, usual, high = ("a full fine-tune", "1e-6 to 2e-5", 2e-5) if is_full else ("an adapter", "2e-5 to 1e-3", 1e-3)
    if config.optimizer.type in SCHEDULE_FREE:
        high *= 10
    if rate >= 0.1:
        text = f'{rate:g} is for type = "prodigy", which finds the rate; {config.optimizer.type} wants {usual}'
        yield key, text
    elif rate > high:
        more = ", or add [adapter] for a LoRA" if is_full else ""
        yield key, f"{rate:g} is much for {what}, which may forget all or end in NaN; write {usual}{more}"


def optimizer_advice(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (key, what it does in this run that one may not expect) for an optimizer with the rest of the run."""
    optimizer, model, adapter = config.optimizer, config.model, config.adapter
    trains_all = isinstance(adapter, Full)
    dtype = model.transformer_dtype or model.dtype if isinstance(adapter, Full) else adapter.dtype
    if optimizer.type == "adamw" and dtype == "bfloat16":
        yield (
            "optimizer.type",
            "adamw rounds bfloat16 weights after each update, and loses updates below a 512th of a weight: at 1e-6 "
            '2 % of the weights ever move; "adamw_optimi" loses none',
        )
    if not trains_all and (optimizer.type == "adamw8bit" or getattr(optimizer, "moments_dtype", "") == "8bit"):
        yield "optimizer.type", "8-bit moments save an adapter little, and its many small tensors make each step longer"
    if not trains_all and optimizer.releases_gradients:
        yield (
            "optimizer.gradient_release",
            "it saves an adapter little, and its many small tensors are updated one by one, which takes long",
        )
    if optimizer.type in SCHEDULE_FREE and config.lr_scheduler.type != "constant":
        yield "lr_scheduler", f"{optimizer.type} needs none: its average takes the place of a falling learning rate"
    if optimizer.type == "prodigy":
        if config.gradient_clipping:
            yield "gradient_clipping", "it disturbs the rate that prodigy finds; its authors say 0"
        if any(rate not in (0, optimizer.lr) for rate in config.learning_rates().by_component.values()):
            yield (
                "model",
                "with prodigy a component's learning rate is a factor on the one that is found, such as 1 or 0.5",
            )
    if "rounding" in optimizer.model_fields_set and dtype == "float32":
        yield "optimizer.rounding", "it has no effect on float32 weights"
