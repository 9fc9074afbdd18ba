"""The tables of the main file for evaluation sets, trackers and previews."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from anima_train.config.base_drawn import caption_problems
from anima_train.config.values import printable_name
from anima_train.core.settings import Settings, quoted
from anima_train.data.settings import DatasetSettings
from anima_train.model.variants import picture_defaults
from anima_train.objective.timesteps import TENTHS, Points
from anima_train.sampling.generate import PictureSettings, Request, with_shared
from anima_train.sampling.names import SCORE

Role = Literal["train", "validation", "retention"]
Captions = str | dict[str, list[str]]  # "shipped", a file, or captions by their kind
Pictures = dict[str, int | float | str]  # keys of a picture that differ from the defaults


class EvalDataset(Settings):
    """A dataset the loss is measured on, never trained."""

    name: Annotated[str, Field(min_length=1), AfterValidator(printable_name)]
    """The name of its curves."""
    config: str | DatasetSettings | None = None
    """A dataset TOML, or an inline table with the same keys. `kind` in its directories tells what their images have in
    common, and the numbers are logged for each kind, too."""
    role: Role = "validation"
    """The purpose: "validation" measures what is learned, on images of the same subject that are not trained;
    "retention" what is forgotten, on images that have nothing to do with it; "train" what is memorized, on some of the
    training images. Logged together as evaluation/learning, forgetting and memorization, with their errors. The best
    training state is chosen by the validation sets."""
    captions: Captions | None = Field(default=None, min_length=1)
    """Instead of config, captions alone, for role = "retention": the base model draws a picture for each, once, and
    what is forgotten is measured on these. "shipped": 30 captions of manners, characters, text and composition that
    come with this program; or a TOML file of your own, with a list of captions for each kind: manner = ["...", "..."];
    or its table. The pictures lie in `base_drawn` of cache_dir, or else of output_dir."""
    pictures: Pictures = Field(default={})
    """The way these pictures are drawn, where it differs from what [sampling] does by default, with its keys:
    {width = 768, height = 768, steps = 20}."""
    quantiles: list[Annotated[float, Field(gt=0, lt=1)]] = Field(default=list(TENTHS), min_length=1)
    """The noise levels, as quantiles of the distribution of t that is trained, before its shift."""
    sigmas: list[Annotated[float, Field(gt=0, le=1)]] = Field(default=[])
    """The noise levels themselves, t in (0, 1]; replaces quantiles, and does not depend on what is trained."""
    repeats: int = Field(default=1, ge=1)
    """Noises at each level, fixed ones for each image: more of them make the numbers of few images more certain."""

    drift: bool | None = None
    """Measure how far the predicted velocity is from the base model's, on the same noise: almost all of what is
    forgotten, from far fewer images than the loss needs. An adapter has its base beside it, for a second pass; with
    init_from_existing, too, the base is the model without any LoRA. A full fine-tune keeps the base's velocities, as
    they are before the first step, in the run's folder: 0.25 MiB at 512 pixels for each image, level and repeat.
    Absent: for "train" and "retention"."""

    @property
    def measures_drift(self) -> bool:
        """True if drift is measured on it, where the base model is at hand."""
        return self.role in ("train", "retention") if self.drift is None else self.drift

    @field_validator("captions")
    @classmethod
    def one_source(cls, value: Captions | None, earlier: ValidationInfo) -> Captions | None:
        """Require one of config and captions, the purpose that captions serve, and such as can be drawn from."""
        if "config" in earlier.data and (value is None) == (earlier.data["config"] is None):
            raise ValueError("missing, as config is; set one of them" if value is None else "excludes config; keep one")
        if value is not None and earlier.data.get("role", "retention") != "retention":
            raise ValueError('is for what is to be kept: add role = "retention"')
        if isinstance(value, dict) and (problems := caption_problems(value)):
            raise ValueError("\n".join(problems))
        return value

    @field_validator("pictures")
    @classmethod
    def are_of_captions(cls, value: Pictures, earlier: ValidationInfo) -> Pictures:
        """Refuse the settings of pictures where none is drawn."""
        if value and earlier.data.get("captions", "") is None:
            raise ValueError("has no effect without captions, from which they would be drawn")
        return value

    @field_validator("sigmas")
    @classmethod
    def one_kind_of_levels(cls, value: list[float], earlier: ValidationInfo) -> list[float]:
        """Refuse both kinds of levels."""
        if value and earlier.data.get("quantiles", list(TENTHS)) != list(TENTHS):
            raise ValueError("replaces quantiles, which would have no effect; keep one")
        return value

    @field_validator("quantiles", "sigmas")
    @classmethod
    def differ_as_logged(cls, value: list[float]) -> list[float]:
        """Refuse levels that have the same name in the metrics."""
        if len({f"{level:.2f}" for level in value}) < len(value):
            raise ValueError("has levels that are equal in two decimals; keep one of each")
        return value

    def points(self) -> Points:
        """Return the noise levels and their noises."""
        return Points(tuple(self.quantiles), tuple(self.sigmas), self.repeats)


class PreservationSettings(Settings):
    """Keep what the base model does with other captions: on a share of the samples the target of the loss is the base's
    own velocity, from the same weights without the adapter. It needs no pictures. Such a sample takes a second pass
    without gradients, about a third of a step, and teaches nothing new; both are told. The loss is logged apart, as
    loss/preservation."""

    on: Literal["retention", "training_latents", "class_caption", "empty_caption"] = "retention"
    """The samples. "retention": pictures that the base model draws from captions, once, are added: on a toy a share of
    0.2 left 0.7 of what was forgotten without it, 0.5 0.4. "training_latents": the training images with such captions
    instead of their own (0.8, nothing is drawn); "class_caption": with one caption of your own (0.9 at equal loss, 1 at
    equal pictures); "empty_caption": with the empty one, as other trainers have it (the same)."""
    share: float = Field(default=0.2, gt=0, le=0.9)
    """Share of the samples. Drawn pictures are added to each epoch until they are this share of all; otherwise it is a
    share of the times that each training image is seen."""
    weight: float = Field(default=1.0, gt=0)
    """Factor on the loss of these samples."""
    captions: Captions = Field(default="shipped", min_length=1)
    """The captions, for "retention" and "training_latents". "shipped": 36 that come with this program, none of which is
    among the 30 that eval_datasets measure on; or a TOML file of your own, or its table: {manner = ["...", "..."]}."""
    pictures: Pictures = Field(default={})
    """The way the pictures of "retention" are drawn, as pictures of eval_datasets; without width and height they are
    squares of the dataset's largest resolution. They lie in `base_drawn` of cache_dir, or else of output_dir, for later
    runs, too."""
    class_caption: str | None = Field(default=None, pattern=r"\S")
    """The caption of "class_caption", such as "1girl"."""

    @field_validator("captions")
    @classmethod
    def are_used(cls, value: Captions, earlier: ValidationInfo) -> Captions:
        """Refuse captions where others are used, and those that cannot be drawn from."""
        if value != "shipped" and earlier.data.get("on") in ("class_caption", "empty_caption"):
            raise ValueError(f"has no effect with on = {quoted(earlier.data['on'])}; remove one of them")
        if isinstance(value, dict) and (problems := caption_problems(value)):
            raise ValueError("\n".join(problems))
        return value

    @field_validator("pictures")
    @classmethod
    def are_drawn(cls, value: Pictures, earlier: ValidationInfo) -> Pictures:
        """Refuse the settings of pictures where none is drawn."""
        if value and earlier.data.get("on", "retention") != "retention":
            raise ValueError(f"has no effect with on = {quoted(earlier.data['on'])}, where nothing is drawn")
        return value

    @field_validator("class_caption")
    @classmethod
    def is_the_one(cls, value: str | None, earlier: ValidationInfo) -> str | None:
        """Require the caption where it is used, and refuse it elsewhere."""
        if "on" in earlier.data and (value is None) == (earlier.data["on"] == "class_caption"):
            raise ValueError(
                'missing, with on = "class_caption"; write one such as "1girl"' if value is None
                else 'has no effect without on = "class_caption"'
            )  # fmt: skip
        return value


class EarlyStopping(Settings):
    """An end before the last step, where evaluations, or the scores of previews, no longer get better."""

    metric: str = Field(min_length=1)
    """The number that has to get better, as keep_best names it."""
    patience: int = Field(default=5, ge=1)
    """Evaluations in a row (for "score": drawings of the previews) that may bring no better one."""
    min_change: float = Field(default=0.0, ge=0)
    """By how much a better one has to be better."""


def metric_fault(metric: str, sets: Sequence[EvalDataset]) -> str | None:
    """Return why a number cannot decide with these sets; None if it can, with an adapter and with a judge."""
    names = {f"{each.name}/{number}" for each in sets for number in ("loss", "difference_from_base")}
    drifts = [each for each in sets if each.measures_drift]
    names |= {f"{each.name}/{number}" for each in drifts for number in ("drift", "drift_relative")}
    roles = {each.role for each in sets}
    if len(roles) > 1:
        names |= {"evaluation/learning", "evaluation/learning_at_highest_t"} if "validation" in roles else set()
        names |= {"evaluation/forgetting", "evaluation/forgetting_relative"} if "retention" in roles else set()
        names |= {"evaluation/drift_relative"} if "retention" in {each.role for each in drifts} else set()
        names |= {"evaluation/memorization"} if {"validation", "train"} <= roles else set()
    if metric in {SCORE, *names}:
        return None
    if not names:
        text = "but there are no eval_datasets that would log it"
        return f"found {quoted(metric)}, {text}; {quoted(SCORE)}, that of the previews, needs none"
    text = f"which cannot decide; expected one of {', '.join(sorted(names))}"
    return f"found {quoted(metric)}, {text}, or {quoted(SCORE)}, that of the previews"


def score_fault(sampling: "Sampling | None") -> str | None:
    """Return why trained weights have no score of their previews, and what to do; None if they have."""
    if sampling is None or sampling.judge is None:
        return 'needs a judge in [sampling], that scores the previews, such as judge = "clip:PATH"'
    if sampling.every_n_steps is None and sampling.every_n_epochs is None:
        return "needs every_n_steps or every_n_epochs in [sampling]; without, only the base is drawn and scored"
    return None


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


class Metadata(Settings):
    """The metadata of saved files, as ModelSpec 1.0.1 and kohya's scripts have them: title, date, hashes, sizes, how it
    was trained. No path is in them, and of captions trigger_word alone."""

    level: Literal["full", "minimal", "none"] = "full"
    """"minimal" leaves out how it was trained (`ss_...`) and keeps what programs need to know the file, and the texts
    here; "none" writes nothing."""
    author: str = ""
    """You, as the file shall name you."""
    description: str = ""
    """A text about the file."""
    usage_hint: str = ""
    """A short text for those who use it, such as "strength 0.8"."""
    tags: list[str] = Field(default=[])
    """Words by which it can be found, such as "style"."""
    license: str | None = None
    """The licence, by default those of the base model, which what is made of it has to follow. Empty: not named."""
    thumbnail: bool = False
    """Put the first of the last previews into the file, 256 pixels large; needs [sampling]."""
    tag_frequencies: bool = False
    """Write into saved files how many images have each tag, as `ss_tag_frequency`, which managers of LoRA files show.
    Off: whoever gets the file learns nothing about the captions."""


def with_license(value: Metadata, earlier: ValidationInfo) -> Metadata:
    """Return [metadata] with the licence of its model's family, where none is set."""
    model = earlier.data.get("model")
    return value if model is None or value.license is not None else value.model_copy(update={"license": model.license})


LicensedMetadata = Annotated[Metadata, AfterValidator(with_license)]


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
    judge: str | None = Field(default=None, min_length=1)
    """The judge that scores each of them when they are drawn: "clip:PATH", a folder or a name on the Hub with a CLIP,
    or one of an installed package, as anima compare has them. It is loaded for that time, like the VAE; its numbers are
    logged, and stand beside learning and forgetting; keep_best and early_stopping take their mean as "score". Absent:
    none."""
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
        return [with_shared(shared, table) if isinstance(table, dict) else table for table in tables]

    @property
    def shared(self) -> dict[str, Any]:
        """The keys of a picture that are set for all prompts."""
        return {key: getattr(self, key) for key in PictureSettings.model_fields if key in self.model_fields_set}

    @field_validator("prompts")
    @classmethod
    def are_drawn(cls, value: list[Request], earlier: ValidationInfo) -> list[Request]:
        """Require a time at which the pictures are drawn."""
        if not any(earlier.data.get(key, True) for key in ("every_n_steps", "every_n_epochs", "before_first_step")):
            raise ValueError("are never drawn; set every_n_steps or every_n_epochs")
        return value


def with_variant_keys(value: Any, earlier: ValidationInfo) -> Any:
    """Return [sampling] with what its model's variant is drawn with, where nothing else is set."""
    model = earlier.data.get("model")
    return picture_defaults(model.transformer_path) | value if model is not None and isinstance(value, dict) else value


VariantSampling = Annotated[Sampling, BeforeValidator(with_variant_keys, json_schema_input_type=Sampling)]
