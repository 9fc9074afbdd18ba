"""The tables of the main file for evaluation sets, trackers and previews."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from anima_train.config.values import printable_name
from anima_train.core.settings import Settings
from anima_train.data.settings import DatasetSettings
from anima_train.sampling.generate import PictureSettings, Request


class EvalDataset(Settings):
    """A dataset the loss is measured on, never trained."""

    name: Annotated[str, Field(min_length=1), AfterValidator(printable_name)]
    """The name of its curves."""
    config: str | DatasetSettings
    """A dataset TOML, or an inline table with the same keys."""


class Monitoring(Settings):
    """The trackers that get the numbers beside metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard files into the run folder."""
    enable_wandb: bool = False
    """Send the numbers to Weights & Biases."""
    wandb_api_key: str = Field(default="", repr=False)
    """Better left to the environment (WANDB_API_KEY); never written anywhere."""
    wandb_tracker_name: str = ""
    """The W&B project. Empty: anima-train."""
    wandb_run_name: str = ""
    """The W&B run. Empty: run_name."""


def as_request(value: Any) -> Any:
    """Return a text as a table with nothing but that prompt."""
    return {"prompt": value} if isinstance(value, str) else value


Prompt = Annotated[Request, BeforeValidator(as_request, json_schema_input_type=str | Request)]


class Sampling(PictureSettings):
    """Pictures drawn while training, into the run's `samples` and the trackers. The keys of a picture hold for all
    prompts that do not have their own."""

    every_n_steps: int | None = Field(default=None, ge=1)
    """Draw them after every n steps."""
    every_n_epochs: int | None = Field(default=None, ge=1)
    """Draw them after every n epochs."""
    before_first_step: bool = True
    """Draw them with the base model, too."""
    prompts: list[Prompt] = Field(min_length=1)
    """The pictures to draw: texts, as in ComfyUI ("1girl, (smile:1.2)"), or tables {prompt = "...", seed = 1, ...}."""

    @field_validator("prompts", mode="before")
    @classmethod
    def with_shared_keys(cls, value: Any, earlier: ValidationInfo) -> Any:
        """Return each prompt as a table, with the keys that hold for all."""
        if not isinstance(value, list):
            return value
        shared = {key: earlier.data[key] for key in PictureSettings.model_fields if key in earlier.data}
        tables = map(as_request, value)
        return [{**shared, **table} if isinstance(table, dict) else table for table in tables]

    @field_validator("prompts")
    @classmethod
    def are_drawn(cls, value: list[Request], earlier: ValidationInfo) -> list[Request]:
        """Require a time at which the pictures are drawn."""
        if not any(earlier.data.get(key, True) for key in ("every_n_steps", "every_n_epochs", "before_first_step")):
            raise ValueError("are never drawn; set every_n_steps or every_n_epochs")
        return value
