"""The part of a configuration that saved files tell: settings, under the names of kohya's scripts, and texts."""

from anima_train.config.config import Config


def settings_metadata(config: Config) -> dict[str, str]:
    """Return the settings that managers of LoRA files show; no path, and nothing secret."""
    written = config.metadata
    texts = {
        "modelspec.license": written.license,
        "modelspec.author": written.author,
        "modelspec.description": written.description,
        "modelspec.usage_hint": written.usage_hint,
        "modelspec.tags": ", ".join(written.tags),
    }
    sizes = config.micro_batch_size_per_gpu
    settings = {
        "ss_seed": config.seed,
        "ss_learning_rate": config.optimizer.lr,
        "ss_optimizer": config.optimizer.type,
        "ss_lr_scheduler": config.lr_scheduler.type,
        "ss_lr_warmup_steps": config.warmup_steps,
        "ss_max_grad_norm": config.gradient_clipping,
        "ss_gradient_accumulation_steps": config.gradient_accumulation_steps,
        "ss_gradient_checkpointing": config.recompute != "nothing",
        "ss_batch_size_per_device": sizes if isinstance(sizes, int) else max(number for _, number in sizes),
        "ss_mixed_precision": "bf16" if config.model.dtype == "bfloat16" else "no",
        "ss_caption_dropout_rate": config.uncond_fraction,
        "ss_loss_type": config.loss().kind,
        **{f"ss_{part}_lr": rate for part, rate in config.learning_rates().by_component.items() if part != "base"},
    }
    ends = {"ss_max_train_steps": config.max_steps, "ss_num_epochs": config.epochs}
    settings |= {key: value for key, value in ends.items() if value is not None}
    return {key: text for key, text in texts.items() if text} | {key: str(value) for key, value in settings.items()}
