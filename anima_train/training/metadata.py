"""What a saved file says about itself: ModelSpec 1.0.1, and the `ss_*` keys that LoRA managers read.

No path, no caption and no secret is in it.
"""

from datetime import UTC, datetime

from anima_train import __version__
from anima_train.config.config import Config


def weights_metadata(config: Config, title: str, step: int, epoch: int, num_samples: int) -> dict[str, str]:
    """The safetensors metadata of the weights after `step` steps, in the `epoch`-th epoch."""
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "anima-train",
        "modelspec.title": title,
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.prediction_type": "rectified_flow",
        "anima_train.version": __version__,
        "ss_base_model_version": "anima",
        "ss_output_name": title,
        "ss_steps": str(step),
        "ss_epoch": str(epoch),
        "ss_seed": str(config.seed),
        "ss_learning_rate": str(config.optimizer.lr),
        "ss_optimizer": config.optimizer.type,
        "ss_lr_scheduler": config.lr_scheduler.type,
        "ss_num_train_images": str(num_samples),
        **config.adapter.metadata(),
    }
