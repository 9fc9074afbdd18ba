"""The settings that a result depends on most, in a few lines for the top of a page."""

from collections.abc import Iterator, Mapping
from typing import Any

from anima_train.core.format import count

LOSSES = ("huber_delta", "smooth_l1_beta", "pseudo_huber_c")
NOISE = ("timestep_sample_method", "sigmoid_scale", "shift", "flux_shift", "multiscale_loss_weight")
ADDITIONS = {"lora": "LoRA", "lokr": "LoKr", "loha": "LoHa"}
CHOICES = ("decompose_factor", "full_matrix", "use_dora", "use_rslora", "min_rank", "target_modules", "exclude_modules")
SAVING = ("activation_checkpointing", "checkpointed_blocks", "blocks_to_swap")  # memory


def key_settings(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (what, value) for these settings of a resolved configuration.

    It may be one that was edited by hand: what is not there, or of another kind, is left out.
    """
    rows = {
        "trained": trained_text(table_of(table, "adapter")),
        "learning rate": rates_text(table),
        "schedule": schedule_text(table),
        "optimizer": named_text(table_of(table, "optimizer"), without=("type", "lr")),
        "batch": batch_text(table),
        "resolutions": items_text(table_of(table, "dataset").get("resolutions", "")),
        "noise levels": named_text(noise_of(table_of(table, "model"))),
        "computation": computation_text(table),
        "loss": ", ".join(f"{key} {value_text(table[key])}" for key in LOSSES if key in table),
        "without a caption": share_text(table.get("uncond_fraction")),
        "seed": value_text(table.get("seed", "")),
    }
    return [(what, text) for what, text in rows.items() if text]


def table_of(table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a table of the configuration; an empty one where there is none."""
    found = table.get(key)
    return found if isinstance(found, Mapping) else {}


def value_text(value: object) -> str:
    """Return a value as people write it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(value_text, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def items_text(value: object) -> str:
    """Return the values of a list as people write them, without its brackets."""
    return ", ".join(map(value_text, value)) if isinstance(value, list) else value_text(value)


def named_text(table: Mapping[str, Any], without: tuple[str, ...] = ("type",)) -> str:
    """Return the type of a table, and its other values in parentheses."""
    values = ", ".join(f"{key} {value_text(value)}" for key, value in table.items() if key not in without)
    kind = value_text(table.get("type", ""))
    return f"{kind} ({values})" if kind and values else kind or values


def trained_text(adapter: Mapping[str, Any]) -> str:
    """Return what is trained: a LoRA or the like with its sizes, or all weights."""
    kind = adapter.get("type")
    if not isinstance(kind, str) or kind not in ADDITIONS:
        return "all weights (full)" if kind == "full" else value_text(kind or "")
    values = {key: adapter.get(key) for key in ("rank", "alpha", "dtype", "dropout")}
    values["alpha"] = values["alpha"] or values["rank"]  # as it is where it is not written
    if adapter.get("full_matrix"):
        values |= {"rank": None, "alpha": None}  # they have no effect
    values |= {key: adapter.get(key) for key in CHOICES if adapter.get(key) != "all"}
    return ", ".join([ADDITIONS[kind], *(f"{key} {value_text(value)}" for key, value in values.items() if value)])


def rates_text(table: Mapping[str, Any]) -> str:
    """Return the learning rate, and those components that have another one or none."""
    model, lr = table_of(table, "model"), table_of(table, "optimizer").get("lr", "")
    own = {key.removesuffix("_lr"): rate for key, rate in model.items() if key.endswith("_lr")}
    frozen = [f"{component} frozen" for component, rate in own.items() if rate == 0]
    others = [f"{component} {value_text(rate)}" for component, rate in own.items() if rate and rate != lr]
    if "force_constant_lr" in table:
        lr, others = f"{value_text(table['force_constant_lr'])} (force_constant_lr)", []
    return ", ".join(filter(None, [value_text(lr), *others, *frozen]))


def schedule_text(table: Mapping[str, Any]) -> str:
    """Return the schedule of the learning rate."""
    text = named_text(table_of(table, "lr_scheduler"))
    warmup = table.get("warmup_steps")
    return f"{text}, warmup of {count(warmup, 'step')}" if isinstance(warmup, int) and warmup and text else text


def batch_text(table: Mapping[str, Any]) -> str:
    """Return the images of a step in one process."""
    width, number = table.get("micro_batch_size_per_gpu"), table.get("gradient_accumulation_steps", 1)
    if width is None:
        return ""
    text = count(width, "image") if isinstance(width, int) else f"[resolution, images] = {value_text(width)}"
    return f"{text} at once" + ("" if number == 1 else f", {value_text(number)} times in a step")


def computation_text(table: Mapping[str, Any]) -> str:
    """Return the types that are computed with, and what saves memory."""
    model = table_of(table, "model")
    weights = model.get("transformer_dtype")
    parts = [value_text(model.get("dtype", "")), f"weights {value_text(weights)}" if weights else ""]
    saving = {key: table.get(key) for key in SAVING}
    return ", ".join(filter(None, [*parts, *(f"{key} {value_text(value)}" for key, value in saving.items() if value)]))


def noise_of(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the distribution of t that are there and have an effect."""

    def pairs() -> Iterator[tuple[str, Any]]:
        for key in NOISE:
            if model.get(key) not in (None, False) and not (key == "sigmoid_scale" and model[key] == 1):
                yield "type" if key == "timestep_sample_method" else key, model[key]

    return dict(pairs())


def share_text(share: object) -> str:
    """Return a share of the samples in percent; "" for none."""
    return f"{100 * share:.3g} % of the samples" if isinstance(share, float) and share > 0 else ""
