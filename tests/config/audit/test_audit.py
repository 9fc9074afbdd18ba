"""Every key of the reference, with what another value of it moves, and by that what it leaves alone.

A row names the observations (conftest.py) that are different with the changed value: all others must be the same. A key
without a row fails, and so does a row that moves nothing.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import pytest

from anima_train.adapters.choice import AnyAdapter
from anima_train.config.config import Config
from anima_train.config.model_settings import Anima, CosmosPredict2
from anima_train.config.reference import is_same
from anima_train.core.settings import is_settings, item_types, type_name
from anima_train.data.settings import DatasetSettings, DirectoryOptions


@dataclass(frozen=True)
class Row:
    """A changed value, and what it moves."""

    moves: str  # the names of observations, separated by commas
    changes: dict[str, Any]
    given: dict[str, Any] = field(default_factory=dict)  # on both sides
    refused: str = ""  # instead of moves: a part of the message
    kind: str = ""  # of the observations beside those of data and settings: steps, memory, trackers


def table(name, moves, value, kind="", **given):
    """The row of a key in a table of the main file, or of the table itself."""
    *path, key = re.sub(r"\[\w+\]\.\w+$", "", name).split(".")
    if name.startswith(("eval_datasets.", "sampling.prompts.")):
        path, key = path[:-1], path[-1]
    changes = {key: value}
    for each in reversed(path):
        changes = {each: changes}
    return name, Row(moves, changes, given, kind=kind)


def of_dataset(key, moves, value, given=None, refused=""):
    """The row of a key of a dataset that holds for its directory; `given` are other keys of it."""
    return f"dataset.{key}", Row(moves, {"dataset": {key: value}}, {"dataset": given or {}}, refused)


ALIASES = {  # names for observations that go together
    "computed": ["loss", "gradient", "weights", "saved"],
    "other images": ["images", "samples", "captions", "views", "roles", "latents", "order", "steps", "length"],
}
DRAWN = {"shuffle_tags": True}
BOTH = {"enable_wandb": True, "tensorboard": True}
SAMPLING = {"prompts": ["a"], "width": 64, "height": 64, "steps": 3, "every_n_steps": 5}
ANCESTRAL, SDE = {"type": "euler_ancestral"}, {"type": "dpmpp_2m_sde"}
EVAL = {"name": "held out", "config": {"resolutions": [96], "directory": [{"path": "$OTHERS"}]}}
KEPT = {"name": "known", "role": "retention", "captions": "shipped"}
HELD = {"on": "empty_caption", "share": 0.8}
OF_CLASS = {"on": "class_caption", "class_caption": "1girl"}
WATCHED = {"eval_datasets": [KEPT], "eval_every_n_steps": 2}
RULE = {"metric": "known/loss", "patience": 3}
LARGER = EVAL | {"config": {"resolutions": [128], "directory": [{"path": "$OTHERS"}]}}
CLIPS = {"gradient_clipping": 0.0}
FULL = {"type": "full", "rank": None}
HALF = {"adapter": {"type": "lora", "rank": 4, "dtype": "bfloat16"}}
SCHEDULES = {
    "min_factor": ("rates", 0.5),
    "power": ("rates", 3.0),
    "num_cycles": ("rates", 2),
    "decay_fraction": ("rates", 0.9),
}
MADE = "saved,weights"  # what steps make of the weights
OPTIMIZERS = {  # of every optimizer that has the key
    "lr": (f"metadata,rates,rates in use,{MADE}", 2e-3),
    "weight_decay": (MADE, 5.0),
    "betas": (MADE, [0.5, 0.6]),
    "eps": (MADE, 0.5),
    "rounding": (f"{MADE},state", "stochastic"),
    "gradient_release": ("gradient?,notes,state", True),  # the norm is that of bfloat16 gradients, added up otherwise
    "moments_device": ("notes", "cpu"),  # where the device that trains is another, its memory
    "moments_dtype": (f"{MADE},notes,state", "8bit"),
    "momentum": (MADE, 0.5),
    "clip_threshold": (MADE, 0.1),
    "decay_rate": (MADE, -0.2),
    "scale_parameter": (MADE, True),
    "d0": (f"rates in use,{MADE}", 1e-3),
    "d_coef": (f"rates in use,{MADE}", 1e4),
}
CHANGED = "gradient,metadata,saved,weights"
MLPS = ".*[.]mlp[.].*"
ADAPTERS = {  # of every adapter that has the key
    "rank": (CHANGED, 8),
    "alpha": ("gradient,saved,weights", 2.0),
    "dropout": (CHANGED, 0.5),
    "dtype": ("gradient,notes,saved,state,weights", "bfloat16"),
    "target_modules": (f"{CHANGED},rates in use", "attention"),
    "exclude_modules": (f"{CHANGED},rates in use", MLPS),
    "rank_pattern": (CHANGED, {MLPS: 8}),
    "alpha_pattern": (CHANGED, {MLPS: 2.0}),
    "lr_pattern": ("metadata,rates in use,saved,weights", {MLPS: 2e-3}),
    "use_rslora": (CHANGED, True),
    "b_lr_ratio": ("metadata,rates in use,saved,weights", 4.0),
    "use_dora": (CHANGED, True),
    "min_rank": (CHANGED, 1),
    "alpha_rank_scale": (CHANGED, 4.0),
    "init": (CHANGED, "orthogonal"),
    "init_from_existing": ("computed", "$LORA.safetensors"),
    "decompose_factor": (CHANGED, 4),
    "full_matrix": (f"{CHANGED},notes", True),
}
SPECIAL = {  # what makes a key act in two steps on a small model
    **{f"adapter[lokr].{key}": {"given": {"decompose_factor": 2}} for key in ADAPTERS},  # else factors are whole
    "adapter[lora].alpha_rank_scale": {"given": {"min_rank": 1}},
    "optimizer[adafactor].eps": {"value": [1e-3, 1e-3]},
    "optimizer[muon].betas": {"adapter": FULL},
    "optimizer[muon].eps": {"adapter": FULL},
    "optimizer[prodigy].weight_decay": {"given": {"d0": 1e-2}},
    "optimizer[prodigy].d_coef": {"given": {"lr": 1.0}, "kind": "steps:4"},  # the first guess that it is in
    "optimizer[adamw_optimi].moments_dtype": {"adapter": {"type": "lora", "rank": 64, "dtype": "bfloat16"}},
}


def of_choices(annotation, path, values, kind="", **given):
    """Yield a row for each key of each type of a choice, with the same value for all that have it."""
    for choice in item_types(annotation):
        for key in sorted(choice.model_fields.keys() & values.keys()):
            name, (moves, value) = f"{path}[{type_name(choice)}].{key}", values[key]
            special = SPECIAL.get(name, {})
            own = {**given, path: {"type": type_name(choice), **special.get("given", {})}}
            own |= {"adapter": special["adapter"]} if "adapter" in special else {}
            yield name, Row(moves, {path: {key: special.get("value", value)}}, own, kind=special.get("kind", kind))


def of_directory(*directories):
    """A dataset of these directories."""
    return {"dataset": {"directory": list(directories)}}


def two_folders(weight):
    """A dataset of two folders with weights, of which the second is 1."""
    return of_directory({"path": "$PICTURES", "weight": weight}, {"path": "$OTHERS", "weight": 1.0})


def of_table(key, moves, value, refused="", **given):
    """The row of a key of a directory that is a Hugging Face dataset."""
    directory = {"hf_dataset": "$TABLE.parquet", **given}
    return f"dataset.directory.{key}", Row(
        moves, of_directory(directory | {key: value}), of_directory(directory), refused
    )


FILES = {"tiny_path": None, "transformer_path": "$TRANSFORMER", "vae_path": "$VAE", "llm_path": "$LLM"}
TOKENIZERS = {"tokenizer_path": "$TOKENIZER", "t5_tokenizer_path": "$T5_TOKENIZER"}
COSMOS = {"type": "cosmos_predict2", "tiny_path": "$COSMOS", "llm_adapter_lr": None}
COSMOS_FILES = {
    "tiny_path": None, "transformer_path": "$COSMOS_TRANSFORMER", "vae_path": "$COSMOS_VAE", "t5_path": "$COSMOS_LLM",
    "t5_tokenizer_path": "$COSMOS_TOKENIZER",
}  # fmt: skip
RATES = "metadata,rates,rates in use,saved,weights"
MODEL = {  # (what it moves, another value, other keys), of every family that has the key
    "dtype": ("metadata,computed,precision,texts", "bfloat16", {}),
    "transformer_dtype": ("computed,precision", "float8", {"dtype": "bfloat16"}),
    "cache_text_embeddings": ("texts", False, {}),
    "text_encoder_device": ("notes", "cpu", {}),
    "text_encoder_nf4": ("encoder,loss,saved,texts,weights", True, {}),
    "text_encoder_fp8": ("computed,encoder,texts", True, {}),
    "max_caption_tokens": ("texts", 600, {}),
    "timestep_sample_method": ("computed,t", "uniform", {}),
    "sigmoid_scale": ("computed,t", 1.5, {}),
    "shift": ("computed,t", 3.0, {}),
    "flux_shift": ("computed,t", True, {}),
    "multiscale_loss_weight": ("notes,objective", 0.5, {}),
    "self_attn_lr": (RATES, 2e-3, {}),
    "cross_attn_lr": (RATES, 2e-3, {}),
    "mlp_lr": (f"gradient,{RATES}", 0, {}),
    "mod_lr": (RATES, 2e-3, {}),
}
ANIMA_KEYS = {  # files of the same content under other names: the same is computed
    "transformer_path": ("files", "$COPIES/transformer.safetensors", FILES),
    "vae_path": ("files", "$COPIES/vae.safetensors", FILES),
    "llm_path": ("files", "$COPIES/llm.safetensors", FILES | TOKENIZERS),
    "tokenizer_path": ("files", "$COPIES/tokenizer", FILES),
    "t5_tokenizer_path": ("files", "$COPIES/t5_tokenizer", FILES),
    "llm_adapter_path": ("files", "$COPIES/transformer.safetensors", {}),
    "tiny_path": ("files", "$OTHER_TINY", {}),
    "llm_adapter_lr": (f"texts,{RATES}", 1e-4, {}),
}
COSMOS_KEYS = {
    "transformer_path": ("files", "$COSMOS_COPIES/transformer", COSMOS_FILES),
    "vae_path": ("files", "$COSMOS_COPIES/vae", COSMOS_FILES),
    "t5_path": ("files", "$COSMOS_COPIES/llm", COSMOS_FILES),
    "t5_tokenizer_path": ("files", "$COSMOS_COPIES/tokenizer", COSMOS_FILES),
    "tiny_path": ("files", "$COSMOS_OTHER", {}),
}


def of_models():
    """Yield a row for each key of each family of models."""
    for family, own, given in ((Anima, ANIMA_KEYS, {}), (CosmosPredict2, COSMOS_KEYS, COSMOS)):
        for key, (moves, value, others) in (MODEL | own).items():
            if key in family.model_fields:
                row = Row(moves, {"model": {key: value}}, {"model": {**given, **others}}, kind="steps")
                yield f"model[{type_name(family)}].{key}", row


ROWS: dict[str, Row] = dict((
    table("output_dir", "place", "$ELSEWHERE"),
    table("dataset", "cache,other images,rates,texts", {"directory": [{"path": "$OTHERS"}]}),
    table("run_name", "place", "another"),
    table("seed", "computed,metadata,order", 1, "steps"),
    table("epochs", "metadata,length", 3),
    table("max_steps", "metadata,length,rates", 4),
    table("micro_batch_size_per_gpu", "metadata,gradient,length,loss,order,rates,saved,steps,weights", 2, "steps"),
    table("gradient_accumulation_steps", "metadata,gradient,length,loss,rates,saved,steps,weights", 2, "steps"),
    table("gradient_clipping", "metadata,saved,weights", 0.001, "steps"),
    table("lr_scheduler", "metadata,rates,rates in use,saved,weights", "cosine", "steps"),
    *of_choices(Config.model_fields["lr_scheduler"].annotation, "lr_scheduler", SCHEDULES),
    table("warmup_steps", "metadata,rates,rates in use,saved,weights", 3, "steps"),
    table("force_constant_lr", "metadata,notes,rates,rates in use,saved,weights", 3e-3, "steps"),
    table("activation_checkpointing", "metadata,work", True, "steps work"),
    table("checkpointed_blocks", "work", 1, "steps work", activation_checkpointing="selective"),
    table("blocks_to_swap", "host,notes", 1, "steps"),
    table("memory", "memory", "low", "memory"),
    table("max_memory_gib", "memory", 2.0, "memory"),
    table("compile", "compiles", True, "machine"),
    table("sharding", "divides", "fsdp2", "machine"),
    table("deterministic", "deterministic", True, "machine"),
    table("attention", "attention", "math", "machine"),
    table("huber_delta", "metadata,computed,objective", 0.5, "steps"),
    table("smooth_l1_beta", "metadata,computed,objective", 0.5, "steps"),
    table("pseudo_huber_c", "metadata,computed,objective", 0.5, "steps"),
    table("normalize_masked_loss", "notes,objective", True),
    table("uncond_fraction", "metadata,computed", 1.0, "steps"),
    table("eval_datasets", "cache,latents,measured,texts", [EVAL]),
    table("eval_datasets.name", "measured", [EVAL | {"name": "others"}], eval_datasets=[EVAL]),
    table("eval_datasets.config", "latents,measured", [LARGER], eval_datasets=[EVAL]),
    table("eval_datasets.role", "measured", [EVAL | {"role": "retention"}], eval_datasets=[EVAL]),
    table("eval_datasets.captions", "drawn", [KEPT], eval_datasets=[KEPT | {"captions": "$CAPTIONS"}]),
    table("eval_datasets.pictures", "drawn", [KEPT | {"pictures": {"steps": 5}}], eval_datasets=[KEPT]),
    table("eval_datasets.quantiles", "measured", [EVAL | {"quantiles": [0.5]}], eval_datasets=[EVAL]),
    table("eval_datasets.sigmas", "measured", [EVAL | {"sigmas": [0.5]}], eval_datasets=[EVAL]),
    table("eval_datasets.repeats", "measured", [EVAL | {"repeats": 2}], eval_datasets=[EVAL]),
    table("eval_datasets.drift", "measured", [EVAL | {"drift": True}], eval_datasets=[EVAL]),
    table("eval_every_n_epochs", "due", 1, eval_datasets=[EVAL]),
    table("eval_every_n_steps", "due", 4, eval_datasets=[EVAL]),
    table("eval_every_n_examples", "due", 3, eval_datasets=[EVAL]),
    table("eval_before_first_step", "first", False, eval_datasets=[EVAL], eval_every_n_steps=4),
    table("keep_best", "bounds", "known/difference_from_base", **WATCHED, keep_best="known/loss"),
    table("forgetting_budget", "bounds", 0.5, **WATCHED, forgetting_budget=0.2),
    table("preservation", "computed,preserved", HELD, kind="steps"),
    table("preservation.on", "drawn,preserved,texts", "training_latents", preservation={"on": "retention"}),
    table("preservation.share", "computed,preserved", 0.01, kind="steps", preservation=HELD),
    table("preservation.weight", f"preserved,{MADE}", 9.0, kind="steps:4", preservation=HELD),
    table("preservation.captions", "drawn", {"manner": ["ink"]}, preservation={"share": 0.5}),
    table("preservation.pictures", "drawn", {"steps": 2}, preservation={"share": 0.5}),
    table("preservation.class_caption", "preserved,texts", "1boy", preservation=OF_CLASS),
    table("at_budget", "bounds", "go_on", **WATCHED, forgetting_budget=0.2),
    table("strengths_after_training", "strengths", [0.5], eval_datasets=[KEPT]),
    table("early_stopping", "bounds", {"metric": "known/loss"}, **WATCHED),
    table("early_stopping.metric", "bounds", "known/difference_from_base", **WATCHED, early_stopping=RULE),
    table("early_stopping.patience", "bounds", 1, **WATCHED, early_stopping=RULE),
    table("early_stopping.min_change", "bounds", 3.5, **WATCHED, early_stopping=RULE),
    table("eval_micro_batch_size_per_gpu", "measured", 3, eval_datasets=[{"name": "a", "config": {"resolutions": [96],
          "max_bad_fraction": 0.5, "directory": [{"path": "$PICTURES"}]}}]),
    table("save_every_n_epochs", "due", 1),
    table("save_every_n_steps", "due", 5),
    table("save_every_n_examples", "due", 6),
    table("save_every_n_minutes", "due", 7.5),
    table("save_dtype", "saved", "bfloat16", "steps"),
    table("checkpoint_every_n_epochs", "due", 1),
    table("checkpoint_every_n_steps", "due", 5),
    table("checkpoint_every_n_minutes", "due", 7.5),
    table("keep_last", "disk", 5, "machine", checkpoint_every_n_steps=1),
    table("caching_batch_size", "at once", 3),
    table("cache_dir", "cache", "$CACHE"),
    table("num_workers", "threads", 0, "steps"),
    table("offline", "offline,trackers", True, "trackers", monitoring={"enable_wandb": True}),
    table("x_axis_examples", "axis", True, monitoring={"tensorboard": True}),
    table("model", "files,gradient,loss,metadata,saved,texts,weights", COSMOS, "steps"),
    *of_models(),
    table("adapter", "gradient,metadata,rates in use,saved,weights", {"type": "full", "rank": None}, "steps"),
    *of_choices(AnyAdapter, "adapter", ADAPTERS, "steps"),
    table("metadata.level", "metadata", "minimal"),
    table("metadata.author", "metadata", "me"),
    table("metadata.description", "metadata", "a style"),
    table("metadata.usage_hint", "metadata", "strength 0.8"),
    table("metadata.tags", "metadata", ["style"]),
    table("metadata.license", "metadata", "mine"),
    table("metadata.thumbnail", "metadata", True, sampling=SAMPLING),
    table("metadata.tag_frequencies", "tags told", True),
    table("optimizer", "metadata,saved,state,weights", {"type": "lion"}, "steps"),
    *of_choices(Config.model_fields["optimizer"].annotation, "optimizer", OPTIMIZERS, "steps", **CLIPS, **HALF),
    table("ema", "saved", {}, "steps"),
    table("ema.decay", "saved", 0.1, "steps", ema={}),
    table("monitoring.tensorboard", "trackers", True, "trackers"),
    table("monitoring.enable_wandb", "trackers", True, "trackers"),
    table("monitoring.wandb_api_key", "wandb key", "0" * 40, "trackers", monitoring={"enable_wandb": True}),
    table("monitoring.wandb_tracker_name", "trackers", "project", "trackers", monitoring=BOTH),
    table("monitoring.wandb_run_name", "trackers", "third", "trackers", monitoring=BOTH),
    table("sampling", "due,first,pictures", SAMPLING),
    table("sampling.cfg", "pictures", 2.0, sampling=SAMPLING),
    table("sampling.negative_prompt", "pictures", "dark", sampling=SAMPLING),
    table("sampling.seed", "pictures", 3, sampling=SAMPLING),
    table("sampling.width", "pictures", 80, sampling=SAMPLING),
    table("sampling.height", "pictures", 80, sampling=SAMPLING),
    table("sampling.steps", "pictures", 4, sampling=SAMPLING),
    table("sampling.shift", "pictures", 1.0, sampling=SAMPLING),
    table("sampling.sampler", "pictures", "euler", sampling=SAMPLING),
    table("sampling.schedule", "pictures", "beta", sampling=SAMPLING),
    table("sampling.every_n_steps", "due", 3, sampling=SAMPLING),
    table("sampling.every_n_epochs", "due", 1, sampling=SAMPLING),
    ("sampling.judge", Row("", {"sampling": {"judge": "taste"}}, {"sampling": SAMPLING}, "sampling.judge")),
    table("sampling.before_first_step", "first", False, sampling=SAMPLING),
    table("sampling.prompts", "pictures", ["a", "b"], sampling=SAMPLING),
    table("sampling.prompts.prompt", "pictures", [{"prompt": "b"}], sampling=SAMPLING),
    table("sampling.sampler[euler_ancestral].eta", "pictures", ANCESTRAL | {"eta": 0.5},
          sampling=SAMPLING | {"sampler": ANCESTRAL}),
    table("sampling.sampler[dpmpp_2m_sde].eta", "pictures", SDE | {"eta": 0.5}, sampling=SAMPLING | {"sampler": SDE}),
    # The dataset.
    of_dataset("resolutions", "captions,latents,length,order,roles,samples,steps,views", [64, 96]),
    of_dataset("enable_ar_bucket", "other images,notes,rates", False),
    of_dataset("min_ar", "latents,samples,views", 0.4),
    of_dataset("max_ar", "latents,samples,views", 3.0),
    of_dataset("num_ar_buckets", "latents,samples,views", 5),
    of_dataset("ar_buckets", "other images,notes,rates", [1.0]),
    of_dataset("size_buckets", "other images,notes,rates", [[96, 112]]),
    of_dataset("num_repeats", "length,order,rates,steps", 0.5),
    ("dataset.weight", Row("length?,order,rates?,steps?", two_folders(3.0), two_folders(1.0))),
    of_dataset("role", "roles", "regularization"),
    of_dataset("kind", "kinds,notes", "artist"),
    of_dataset("subsample_ratio", "other images,rates", 0.5),
    of_dataset("no_upscale", "latents,order,samples,views", True),
    of_dataset("crop_position", "latents,views", "left"),
    of_dataset("horizontal_flip", "latents,views", True),
    of_dataset("alpha_as_mask", "masks", True),
    of_dataset("recursive", "other images", True),
    of_dataset("kohya_folders", "other images", True),
    of_dataset("tars", "other images", True),
    of_dataset("cache_shuffle_num", "captions,texts", 2),
    of_dataset("cache_shuffle_delimiter", "captions", " ", DRAWN),
    of_dataset("shuffle_tags", "captions,texts", True),
    of_dataset("keep_first_n_tags", "captions", 1, DRAWN),
    of_dataset("keep_tokens_separator", "captions", "|||", DRAWN),
    of_dataset("tag_dropout", "captions,texts", 0.5),
    of_dataset("protected_tags", "captions", ["one", "hat"], {"tag_dropout": 0.9}),
    of_dataset("unescape_parentheses", "captions,texts", True),
    of_dataset("caption_prefix", "captions,texts", "art, "),
    of_dataset("trigger_word", "captions,texts", "mia"),
    of_dataset("replace_underscores", "captions,texts", True),
    of_dataset("captions_per_line", "captions,texts", True),
    of_dataset("caption_mode", "captions,texts", "mixed"),
    of_dataset("nl_weight", "captions", 0.9, {"caption_mode": "mixed"}),
    of_dataset("caption_shares", "captions,texts", {"tags_nl": 1.0}, {"caption_mode": "mixed"}),
    of_dataset("skip_empty_caption", "other images,rates,texts", True),
    of_dataset("missing_caption", "", "error", refused="missing_caption"),
    of_dataset("min_image_side", "other images", 32),
    of_dataset("min_kept", "other images,rates", 0.6),
    of_dataset("max_bad_fraction", "", 0.01, refused="max_bad_fraction"),
    ("dataset.directory", Row("cache,other images,texts", of_directory({"path": "$PICTURES"}, {"path": "$OTHERS"}))),
    ("dataset.directory.path", Row("cache,other images,rates,texts", of_directory({"path": "$OTHERS"}))),
    ("dataset.directory.mask_path", Row("masks", of_directory({"path": "$PICTURES", "mask_path": "$MASKS"}))),
    of_table("hf_dataset", "latents", "$OTHER.parquet"),
    of_table("hf_subset", "", "one", refused="has no subsets"),
    of_table("hf_split", "other images,rates,texts", "train[:1]"),
    of_table("hf_revision", "", "main", refused="has no revisions"),
    of_table("image_column", "latents,samples,views", "picture"),
    of_table("caption_column", "captions,texts", "tags"),
    of_table("natural_column", "captions,texts", "prose", caption_mode="mixed"),
    of_table("mask_column", "masks", "mask"),
))  # fmt: skip


def keys_of(root, prefix="", above=DirectoryOptions):
    """Every key of a settings class; those of a choice as `optimizer[adamw].lr`; what is shared with `above` once."""
    for key, described in root.model_fields.items():
        name, members = f"{prefix}{key}", item_types(described.annotation)
        choices = list(filter(is_settings, members))
        if key == "type" or (
            prefix and root is not DatasetSettings and is_same(described, above.model_fields.get(key))
        ):
            continue  # a choice is the row of its table's name
        can_be_absent = described.get_default(call_default_factory=True) is None
        if can_be_absent or len(choices) != 1 or str in members or name in LISTS:
            yield name
        if choices[:1] != [DatasetSettings] or name == "dataset":
            for choice in choices:
                inside = f"{name}[{type_name(choice)}]." if len(choices) > 1 else f"{name}."
                yield from keys_of(choice, inside, root)


LISTS = ("eval_datasets", "sampling.prompts", "dataset.directory")
KEYS = list(keys_of(Config))


def faults(audit, row):
    """What a row says wrongly: what its changes move beside it, and what they do not move though it says so."""
    kinds = {name: int(number or 1) for name, _, number in (kind.partition(":") for kind in row.kind.split())}
    before, after = audit(row.given, **kinds), audit(row.given, row.changes, **kinds)
    if row.refused or "refused" in before or "refused" in after:
        found = before.get("refused") or after.get("refused", "")
        return [] if row.refused and row.refused in found and "refused" not in before else [f"refused: {found}"]
    moved = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    said = {each for name in row.moves.split(",") if name for each in ALIASES.get(name, [name])}
    may = {name.removesuffix("?") for name in said}
    return [
        *(f"moves {name}" for name in sorted(moved - may)),
        *(f"does not move {name}" for name in sorted(said - moved) if not name.endswith("?")),
        *([] if moved else ["moves nothing"]),
    ]


def test_every_key_of_the_reference_has_a_row():
    assert set(KEYS) - ROWS.keys() == set()
    assert ROWS.keys() - set(KEYS) == set()


def test_a_row_that_says_too_much_or_too_little_is_found(audit):
    assert faults(audit, Row("place", {"run_name": "another"})) == []
    assert faults(audit, Row("", {"run_name": "another"})) == ["moves place"]
    assert faults(audit, Row("place,order", {"run_name": "another"})) == ["does not move order"]
    assert faults(audit, Row("", {"run_name": "run"})) == ["moves nothing"]
    assert faults(audit, Row("place", {"run_names": "run"}))[0].startswith("refused: config.toml: run_names: unknown")


def is_of_another_choice(name):
    """True for the keys of the optimizers, adapters and models that are not the first: their rows are like its rows."""
    return re.match(r"(optimizer|adapter|model)\[(?!adamw\]|lora\]|anima\])", name) is not None


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * is_of_another_choice(name)) for name in ROWS]
)
def test_a_key_moves_what_its_row_says_and_nothing_else(audit, name):
    assert faults(audit, ROWS[name]) == []
