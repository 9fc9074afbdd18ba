"""Files of other kinds in the place of a configuration: recognised as a whole, so that one message says it."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from anima_train.config.compat import FOREIGN
from anima_train.core.format import count
from anima_train.core.settings import quoted

Table = Mapping[str, Any]

KOHYA = (  # any two of them
    *("network_module", "network_dim", "network_alpha", "pretrained_model_name_or_path", "train_data_dir", "unet_lr"),
    *("max_train_epochs", "max_train_steps", "lr_warmup_steps", "train_batch_size", "optimizer_type", "network_args"),
    *("mixed_precision", "save_precision", "output_name", "cache_latents", "gradient_checkpointing", "learning_rate"),
)
# A subset's keys of kohya's -> ours with the same meaning.
SUBSET_KEYS = {
    "image_dir": "path",
    "image_directory": "path",
    "conditioning_data_dir": "mask_path",
    "num_repeats": "num_repeats",
    "caption_prefix": "caption_prefix",
    "keep_tokens": "keep_first_n_tags",
    "keep_tokens_separator": "keep_tokens_separator",
    "shuffle_caption": "shuffle_tags",
    "caption_tag_dropout_rate": "tag_dropout",
    "enable_wildcard": "captions_per_line",
    "flip_aug": "horizontal_flip",
    "alpha_mask": "alpha_as_mask",
    "bucket_no_upscale": "no_upscale",
    "enable_bucket": "enable_ar_bucket",
}
TRANSLATED = {"general", "datasets", "subsets", "resolution", "is_reg", "caption_extension"}
DEFAULTS = {"enable_ar_bucket": True, "num_repeats": 1}
MAX_SHOWN = 4  # directories in the lines to paste
MAX_KEYS = 5  # without an equivalent that are named


def whole_file_fault(data: Table, is_main: bool) -> str | None:
    """Return what a file is instead of the main file, or of a dataset, and what to do; None where it is none of these.

    Args:
        data: its table.
        is_main: True for the main file.
    """
    is_theirs = isinstance(data.get("datasets"), list) or isinstance(data.get("general"), dict)
    if is_theirs and not is_kohya(data, ()):  # else its sections are those of a training
        lines = "\n".join(f"  {line}" for line in as_dataset(data))
        place = "in the file that `dataset` names write" if is_main else "write"
        others = sorted({*all_keys(data)} - SUBSET_KEYS.keys() - TRANSLATED)
        more = ", ..." if len(others) > MAX_KEYS else ""
        without = f" (without {', '.join(others[:MAX_KEYS])}{more})" if others else ""
        return f"is a dataset of kohya's sd-scripts; {place} instead{without}\n{lines}"
    if is_main and "directory" in data and not {"model", "optimizer", "output_dir"} & data.keys():
        return "is a dataset; the main file, such as configs/style_lora.toml, names it: dataset = 'FILE'"
    if not is_main and len({"model", "optimizer", "output_dir", "dataset"} & data.keys()) > 1:
        return "is a main file; a dataset has resolutions, [[directory]] and what docs/data.md says"
    if is_main and isinstance(data.get("prompt"), list) and "model" not in data:
        return "is a file of prompts; give it to anima sample CONFIG --prompts FILE"
    return None


def as_dataset(data: Table) -> Iterator[str]:
    """Yield the lines of our dataset for one of kohya's; what has no equivalent is left out."""
    general = data.get("general")
    general = general if isinstance(general, dict) else {}
    directories: list[dict[str, Any]] = []
    for dataset in tables_in(data.get("datasets")):
        for subset in tables_in(dataset.get("subsets")) or [{}]:
            merged = {**general, **dataset, **subset}
            found = {ours: merged[key] for key, ours in SUBSET_KEYS.items() if key in merged}
            directory = {key: value for key, value in found.items() if is_set(key, value)}
            if merged.get("is_reg"):
                directory["role"] = "regularization"
            directories.append({"path": "data", **directory, "resolutions": resolutions_of(merged.get("resolution"))})
    sizes = [directory["resolutions"] for directory in directories] or [resolutions_of(general.get("resolution"))]
    if all(each == sizes[0] for each in sizes):
        yield f"resolutions = {in_toml(sizes[0])}"
        for directory in directories:
            del directory["resolutions"]
    tables = [
        "{ " + ", ".join(f"{key} = {in_toml(value)}" for key, value in directory.items()) + " }"
        for directory in directories or [{"path": "data"}]
    ]
    left = len(tables) - MAX_SHOWN
    more = f"  # and {count(left, 'directory', 'directories')} more, to be added" if left > 0 else ""
    yield f"directory = [{', '.join(tables[:MAX_SHOWN])}]{more}"


def tables_in(value: object) -> list[dict[str, Any]]:
    """Return the tables in a list; none in what is no list."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def is_set(key: str, value: object) -> bool:
    """Return True for a value that is not what its key has anyway."""
    return value != DEFAULTS.get(key) if key in DEFAULTS else bool(value)


def resolutions_of(value: object) -> list[Any]:
    """Return our list of resolutions for kohya's number, pair of numbers, or text of one of these."""
    if isinstance(value, str):
        numbers = [int(part) for part in value.replace("x", ",").split(",") if part.strip().isdigit()]
        value = numbers if len(numbers) > 1 else numbers[0] if numbers else None
    if isinstance(value, list) and len(value) == 2:
        return [value[0]] if value[0] == value[1] else [value]
    return [value] if isinstance(value, int) else [1024]


def in_toml(value: object) -> str:
    """Return a value of one line in TOML."""
    if isinstance(value, str):
        return f"'{value}'" if "\\" in value and "'" not in value else quoted(value)
    if isinstance(value, list):
        return f"[{', '.join(map(in_toml, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def is_kohya(data: Table, ours: Iterable[str]) -> bool:
    """Return True for a configuration of kohya's sd-scripts, with sections or without.

    Args:
        data: the main file's table.
        ours: the keys that one of ours has.
    """
    return sum(key in KOHYA for key in lifted(data, ours)) > 1


def all_keys(data: Table) -> Iterator[str]:
    """Yield the keys of a table, of the tables in it, and of those in lists."""
    for key, value in data.items():
        yield key
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                yield from all_keys(inner)


def lifted(data: Table, ours: Iterable[str]) -> dict[str, Any]:
    """Return a table with the keys of its unknown sections in their place, as kohya's scripts read them."""
    known = set(ours) | FOREIGN.keys()
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and key not in known:
            found |= {name: inner for name, inner in value.items() if name not in data}
        else:
            found[key] = value
    return found
