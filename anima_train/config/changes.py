"""The changes of a configuration that a resumed run allows, and those that it refuses."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic.fields import FieldInfo

from anima_train.config.config import Config
from anima_train.config.model_settings import FAMILIES
from anima_train.core.format import printable
from anima_train.core.settings import Location, Settings, is_settings, item_types, key_path, type_name
from anima_train.data.settings import DatasetSettings, DirectoryOptions
from anima_train.optim.groups import COMPONENTS, Component

# Every key of `Config` is in one of these, by itself or with all of its table (`name.*`); what is more exact counts.
# The name of a table by itself is for one that is added or removed. Indices of lists are left out.
MAY_CHANGE = frozenset(
    (
        # Where things are. The run is found in output_dir and run_name, wherever they lead; what is in the files and
        # folders is compared by its hash, see `checkpoint.resume.check_same_content`.
        *("output_dir", "run_name", "cache_dir", "model.transformer_path", "model.vae_path", "model.llm_path"),
        "model.t5_path",
        *("model.llm_adapter_path", "model.tokenizer_path", "model.t5_tokenizer_path", "model.tiny_path"),
        *("dataset.directory.path", "dataset.directory.mask_path", "dataset.directory.hf_dataset"),
        *("dataset.directory.hf_subset", "dataset.directory.hf_split", "dataset.directory.hf_revision"),
        *("dataset.directory.image_column", "dataset.directory.caption_column", "dataset.directory.natural_column"),
        "dataset.directory.mask_column",
        # How long, and how fast: read anew for every step, and nothing of the state depends on it. A learning rate that
        # becomes 0, or was 0, is another matter, see `find_frozen_or_thawed`.
        *("epochs", "max_steps", "lr_scheduler.*", "warmup_steps", "force_constant_lr", "gradient_clipping"),
        *(
            "optimizer.lr",
            "adapter.lr_pattern",
            "adapter.b_lr_ratio",
            "optimizer.weight_decay",
            "optimizer.eps",
            "ema.decay",
        ),
        *("optimizer.clip_threshold", "optimizer.decay_rate", "optimizer.scale_parameter", "optimizer.d_coef"),
        *(f"model.{component}_lr" for component in COMPONENTS if component != "base"),
        # Times the number of processes it has to stay the same, see `checkpoint.resume.check_same_content`.
        "gradient_accumulation_steps",
        # Memory and speed: the same is computed, up to rounding.
        *("activation_checkpointing", "checkpointed_blocks", "blocks_to_swap", "memory", "max_memory_gib", "compile"),
        *("eval_micro_batch_size_per_gpu", "offline", "caching_batch_size"),
        *("optimizer.gradient_release", "optimizer.moments_device"),
        *("num_workers", "model.cache_text_embeddings", "model.text_encoder_device", "attention", "deterministic"),
        "sharding",
        # What is looked at and what is kept on the way: the training does not see it.
        *("eval_datasets", "eval_datasets.*", "eval_every_n_epochs", "eval_every_n_steps", "eval_every_n_examples"),
        *("keep_best", "forgetting_budget", "at_budget", "early_stopping", "early_stopping.*"),
        "strengths_after_training",
        *("eval_before_first_step", "sampling", "sampling.*", "monitoring.*", "metadata.*", "x_axis_examples"),
        *("save_every_n_epochs", "save_every_n_steps", "save_every_n_examples", "save_every_n_minutes", "save_dtype"),
        *("checkpoint_every_n_epochs", "checkpoint_every_n_steps", "checkpoint_every_n_minutes", "keep_last"),
        # When to stop because of images or captions that are missing or damaged; those that are left are compared.
        *("dataset.max_bad_fraction", "dataset.directory.missing_caption"),
    )
)
SEEN = "decides what each step sees"
LOSS = "decides what is minimised and measured: the loss of this run would mean two things"
DTYPE = "decides what every step computes in"
MOMENTS = "the optimizer's state is made with it"
MAY_NOT_CHANGE = {
    # All of the dataset but what is named above: a new key of it decides, until somebody thinks otherwise.
    **dict.fromkeys(("dataset.*", "dataset.directory", "seed", "micro_batch_size_per_gpu", "uncond_fraction"), SEEN),
    **dict.fromkeys(("model.timestep_sample_method", "model.sigmoid_scale", "model.shift", "model.flux_shift"), LOSS),
    **dict.fromkeys(("huber_delta", "smooth_l1_beta", "pseudo_huber_c", "normalize_masked_loss"), LOSS),
    "model.multiscale_loss_weight": LOSS,
    "model.type": "decides what is trained",
    **dict.fromkeys(("model.text_encoder_nf4", "model.text_encoder_fp8"), "decides how captions are encoded"),
    "model.max_caption_tokens": "decides how much of each caption is trained",
    "adapter.*": "decides what is trained, and how it counts",
    "adapter.init_from_existing": "the run has begun; leave it as it was, the file is not read any more",
    **dict.fromkeys(("model.dtype", "model.transformer_dtype"), DTYPE),
    **dict.fromkeys(("optimizer.type", "optimizer.betas", "optimizer.moments_dtype", "optimizer.rounding"), MOMENTS),
    **dict.fromkeys(("optimizer.momentum", "optimizer.d0"), MOMENTS),
    **dict.fromkeys(("preservation", "preservation.*"), SEEN),
    "ema": "the average has to follow the weights from the first step on",
}
BY_NAME = ("lr_pattern", "rank_pattern", "alpha_pattern")  # tables whose keys are expressions: one value each
FOLLOWS = (("adapter", "alpha", "rank"), ("model", "transformer_dtype", "dtype"))  # table, key, which it is if absent
IN_PART = {  # of those that may change: what may not
    "gradient_accumulation_steps": "At --resume it stays the same times the number of processes.",
    **dict.fromkeys(
        ("optimizer.lr", *(f"model.{component}_lr" for component in COMPONENTS if component != "base")),
        "At --resume neither from 0 nor to 0.",
    ),
}
FROZEN = "0 freezes a component: its weights are not in the state"
UNKNOWN = "not a key of this version"


@dataclass
class Changes:
    """The keys that are different: a line for each, such as `optimizer.lr: 0.001 -> 0.0005`."""

    allowed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # with the reason


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """Compare two resolved configurations, as `config_toml` writes them, parsed.

    A key that one of them lacks, as in one that an older version wrote, counts as its default. How a dataset's keys are
    spread over its tables makes no difference.
    """
    before, now = fill_defaults(before, Config), fill_defaults(now, Config)
    for table, key, other in FOLLOWS:
        if key in before[table] or key in now[table]:
            for side in (before[table], now[table]):
                if other in side:
                    side.setdefault(key, side[other])
    for side in (before, now):
        if (family := FAMILIES.get(side["model"].get("type"))) is not None:  # as `sections.with_license` fills it
            side["metadata"].setdefault("license", family.license)
    forget_where_it_was(before["adapter"], now["adapter"])
    changes, known = Changes(), set(key_names(Config))
    frozen = set(find_frozen_or_thawed(before, now))
    for location, old, new in find_differences(before, now):
        name = ".".join(part for part in location if isinstance(part, str))
        line = f"{key_path(location)}: {show_value(location, old)} -> {show_value(location, new)}"
        if name not in known:
            changes.allowed.append(f"{line} ({UNKNOWN})")
        elif reason := FROZEN if name in frozen else why_not(name):
            changes.refused.append(f"{line} ({reason})")
        else:
            changes.allowed.append(line)
    return changes


def forget_where_it_was(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Leave out the LoRA that a run began with where the same one cannot be found any more: it is not read again."""
    old, new = (side.get("init_from_existing") for side in (before, now))
    if old and new and not os.path.exists(new) and os.path.basename(old) == os.path.basename(new):
        del before["init_from_existing"], now["init_from_existing"]


def refusal(changes: Changes, where: str) -> list[str]:
    """Return the problems of a `ConfigError`: what may not change, what may, and the remedy.

    Args:
        changes: some of them refused.
        where: the configuration of the run, to begin the message with.
    """
    return [
        *(f"{where}: cannot resume: {line}" for line in changes.refused),
        *(f"may change: {line}" for line in changes.allowed),
        "set back what may not change, or start another run with another run_name",
    ]


def why_not(name: str) -> str | None:
    """Return why a key, named without the indices of lists, may not change; None if it may.

    Raises:
        KeyError: nobody has decided yet.
    """
    parts = name.split(".")
    for entry in (name, *(".".join(parts[:length]) + ".*" for length in range(len(parts) - 1, 0, -1))):
        if entry in MAY_CHANGE or entry in MAY_NOT_CHANGE:
            return MAY_NOT_CHANGE.get(entry)
    raise KeyError(name)


def at_resume(name: str) -> str:
    """Return the sentence of the reference about a key, or about a table that may be absent, when a run is resumed.

    Empty for what may change, and for a table that is always there.
    """
    try:
        return "Fixed at --resume." if why_not(name) is not None else IN_PART.get(name, "")
    except KeyError:
        return ""


def key_names(table: type[Settings], prefix: str = "") -> Iterator[str]:
    """Yield every key of a settings class and of the tables in it: `seed`, `dataset.directory.path`."""
    for key, setting in table.model_fields.items():
        yield prefix + key
        for inner in filter(is_settings, item_types(setting.annotation)):
            yield from key_names(inner, f"{prefix}{key}.")


def fill_defaults(data: Mapping[str, Any], table: type[Settings]) -> dict[str, Any]:
    """Return a copy of a table with the defaults of the keys it lacks, and so for the tables in it.

    A dataset's options are moved into its directories, where they hold.
    """
    filled = spread_options(data) if table is DatasetSettings else dict(data)
    for key, setting in table.model_fields.items():
        if key not in filled and not setting.is_required():
            default = setting.get_default(call_default_factory=True)
            filled[key] = default.model_dump(exclude_none=True) if isinstance(default, Settings) else default
        value = filled.get(key)
        if isinstance(value, dict):
            filled[key] = fill_table(value, setting)
        elif isinstance(value, list):
            filled[key] = [fill_table(item, setting) if isinstance(item, dict) else item for item in value]
    return {key: value for key, value in filled.items() if value is not None}


def spread_options(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a dataset's table with its options in each directory that does not set them itself."""
    shared = {key: value for key, value in dataset.items() if key in DirectoryOptions.model_fields}
    rest = {key: value for key, value in dataset.items() if key not in shared}
    return rest | {"directory": [shared | directory for directory in dataset["directory"]]}


def fill_table(data: Mapping[str, Any], setting: FieldInfo) -> dict[str, Any]:
    """Return a table that is the value of a key, or in its list, with its defaults; one of no known type as it is."""
    choices = list(filter(is_settings, item_types(setting.annotation)))
    chosen = choices if len(choices) == 1 else [choice for choice in choices if type_name(choice) == data.get("type")]
    return fill_defaults(data, chosen[0]) if chosen else dict(data)


def find_differences(before: Any, now: Any, location: Location = ()) -> Iterator[tuple[Location, Any, Any]]:
    """Yield (location, value before, value now) for every key that is different; None stands for an absent value.

    Of tables of another type, only the keys that both have: the others come and go with the type.
    """
    if isinstance(before, dict) and isinstance(now, dict) and not is_ordered(location):
        same_type = before.get("type") == now.get("type")
        for key in dict.fromkeys((*now, *before)):
            if same_type or (key in before and key in now):
                yield from find_differences(before.get(key), now.get(key), (*location, key))
    elif is_tables(before) and is_tables(now):
        for index in range(max(len(before), len(now))):
            old, new = (tables[index] if index < len(tables) else None for tables in (before, now))
            yield from find_differences(old, new, (*location, index))
    elif before != now or (is_ordered(location) and list(before) != list(now)):
        yield location, before, now


def is_ordered(location: Location) -> bool:
    """Return True if a key is a table in which the first expression that matches counts."""
    return bool(location) and location[-1] in BY_NAME


def is_tables(value: object) -> bool:
    """Return True if this is a list of tables."""
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def find_frozen_or_thawed(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield the learning rates by which a component gets updates that it did not get before, or the reverse."""
    # What belongs to no component has no linear for a LoRA.
    components: Iterable[Component] = COMPONENTS if now["adapter"]["type"] == "full" else COMPONENTS[:-1]
    for component in components:
        key = f"{component}_lr"
        rate_before, rate_now = (side["model"].get(key, side["optimizer"]["lr"]) for side in (before, now))
        if (rate_before == 0) != (rate_now == 0):
            yield "optimizer.lr" if before["model"].get(key) == now["model"].get(key) else f"model.{key}"


def show_value(location: Location, value: object) -> str:
    """Return a value as TOML has it; of a secret only that it is there."""
    if value is None:
        return "absent"
    if str(location[-1]).endswith("api_key"):
        return "(not shown)"
    return (
        "a table"
        if isinstance(value, dict) and not is_ordered(location)
        else printable(json.dumps(value, ensure_ascii=False, default=str))
    )
