"""The keys of other trainers: accepted with a note, refused for now, or translated in an error message."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from anima_train.core.settings import quoted


@dataclass(frozen=True)
class Keys:
    """The keys of a file that its settings classes do not have. Names are dotted."""

    ignored: dict[str, str]  # without meaning here: why. Accepted with one note each
    off: dict[str, Any]  # not supported yet: the value that means "off", which is accepted, as it has its effect
    not_yet: dict[str, tuple[str, ...]]  # values of our own keys that are not supported yet


MAIN = Keys(
    ignored={
        "pipeline_stages": "models are not split into pipeline stages",
        "partition_method": "models are not split into pipeline stages",
        "partition_split": "models are not split into pipeline stages",
        "steps_per_print": "every step is logged",
        "logging_steps": "every step is logged",
        "reentrant_activation_checkpointing": "checkpointing is never reentrant",
        "map_num_proc": "images are read by threads",
        "eval_gradient_accumulation_steps": "evaluation needs no accumulation",
        "disable_block_swap_for_eval": "no blocks are swapped",
        "video_clip_mode": "videos are not trained",
    },
    off={
        "blocks_to_swap": 0,
        "compile": False,
        "metadata": {},
        "model.text_encoder_nf4": False,
        "model.text_encoder_fp8": False,
        "model.t5_path": "",
        "adapter.use_dora": False,
        "adapter.use_rslora": False,
        "adapter.init_from_existing": "",
        "adapter.target_modules": [],
        "adapter.exclude_modules": [],
        "adapter.rank_pattern": {},
        "adapter.alpha_pattern": {},
    },
    not_yet={
        "model.type": ("cosmos_predict2",),
        "model.transformer_dtype": ("float8", "float8_e4m3fn", "int8", "nf4"),
        "activation_checkpointing": ("offload", "unsloth", "selective"),
        "adapter.type": ("lokr", "loha"),
        "optimizer.type": (
            "adamw8bit", "adamw8bitkahan", "stableadamw", "sgd", "lion", "adafactor", "prodigy", "schedule-free",
            "muon", "came", "automagic",
        ),
    },
)  # fmt: skip
DATASET = Keys(ignored={"frame_buckets": "videos are not trained"}, off={}, not_yet={})

# Our name -> names of it in other trainers.
RENAMED = {
    "lr, in [optimizer]": ("learning_rate", "unet_lr"),
    "rank, in [adapter]": ("network_dim", "lora_rank", "r", "linear"),
    "alpha, in [adapter]": ("network_alpha", "lora_alpha", "linear_alpha"),
    "dropout, in [adapter]": ("network_dropout", "lora_dropout"),
    'type, in [adapter], for example "lora"': ("network_module",),
    "micro_batch_size_per_gpu": ("train_batch_size", "batch_size"),
    "micro_batch_size_per_gpu, as only images are trained": ("image_micro_batch_size_per_gpu",),
    "eval_micro_batch_size_per_gpu, as only images are trained": ("image_eval_micro_batch_size_per_gpu",),
    "max_steps": ("max_train_steps", "steps"),
    "epochs": ("max_train_epochs", "num_train_epochs"),
    "transformer_path, in [model]": ("pretrained_model_name_or_path", "dit_path"),
    "vae_path, in [model]": ("vae",),
    "llm_path, in [model]": ("qwen3",),
    "path, in a [[directory]] of the dataset": ("train_data_dir", "image_dir"),
    "dataset": ("dataset_config",),
    "resolutions, a list, in the dataset": ("resolution",),
    "dtype, in [model]": ("mixed_precision",),
    "save_dtype": ("save_precision",),
    "run_name": ("output_name",),
    "warmup_steps": ("lr_warmup_steps",),
    "type, in [optimizer]": ("optimizer_type",),
    "gradient_clipping": ("max_grad_norm",),
    "activation_checkpointing": ("gradient_checkpointing",),
    "uncond_fraction": ("caption_dropout_rate",),
    "cache_shuffle_delimiter, in the dataset": ("caption_separator",),
    "captions_per_line, in the dataset, where the lines take turns": ("enable_wildcard",),
    "trigger_word, in the dataset": ("class_tokens",),
    "shuffle_tags, in the dataset; cache_shuffle_num is the faster way": ("shuffle_caption",),
    "keep_first_n_tags, in the dataset": ("keep_tokens",),
    "tag_dropout, in the dataset": ("caption_tag_dropout_rate",),
    "horizontal_flip, in the dataset": ("flip_aug",),
    "alpha_as_mask, in the dataset": ("alpha_mask",),
    "no_upscale, in the dataset": ("bucket_no_upscale",),
    "timestep_sample_method, in [model]": ("timestep_sampling",),
    "shift, in [model]": ("discrete_flow_shift",),
    "enable_wandb, in [monitoring]": ("wandb",),
    "prompts, in [sampling]": ("sample_prompts",),
    "every_n_steps, in [sampling]": ("sample_every_n_steps",),
    "every_n_epochs, in [sampling]": ("sample_every_n_epochs",),
}
# Other names from other trainers, and those of earlier versions -> what to write here.
FOREIGN = {name: f"it is called {ours}" for ours, names in RENAMED.items() for name in names} | {
    "stop_within_seconds": "a signal to stop always lets the step finish first: remove the key",
    "text_encoder_lr": "the text encoder is not trained; the LLM adapter is llm_adapter_lr, in [model]",
    "network_args": "its keys stand in [adapter]",
    "reg_data_dir": 'write a [[directory]] with role = "regularization" in the dataset',
    "full_bf16": 'write transformer_dtype = "bfloat16", in [model]',
    "logging_dir": "logs are written into the run folder, below output_dir",
    "optimizer_args": "its keys stand in [optimizer]",
    "caption_extension": "captions are .txt files, or in a captions.json",
    "bucket_reso_steps": "sides are multiples of 16",
    "weighting_scheme": "t is not weighted; its distribution is timestep_sample_method, in [model]",
    "min_snr_gamma": "there is no such weighting for flow matching",
    "noise_offset": "there is no noise offset for flow matching",
    "clip_skip": "there is no CLIP in this model",
    "num_gpus": "the number of processes is given to accelerate launch or torchrun",
    "blocks_to_checkpoint": "activation_checkpointing = true recomputes every block",
    "fuse_adapters": "fusing LoRAs into the base is not supported yet",
    "huggingface_repo": "uploading is not supported yet",
    "upload_hf_from_epoch": "uploading is not supported yet",
    "network_train_unet_only": "write llm_adapter_lr = 0, in [model]",
}


def translate(
    data: dict[str, Any],
    keys: Keys,
    problem: Callable[[str, str], None],
    note: Callable[[str, str], None],
    prefix: str = "",
) -> dict[str, Any]:
    """Return a copy of a table without the keys that other trainers have and this one does not.

    Args:
        data: one table; nested tables are looked into.
        keys: what its file may hold besides settings.
        problem: gets the name of each key that is not supported yet, and a sentence.
        note: gets the name of each key without meaning, and why.
        prefix: dotted name of the table, with a final dot, or "".
    """
    kept: dict[str, Any] = {}
    for key, value in data.items():
        name = prefix + key
        if name in keys.ignored:
            note(name, keys.ignored[name])
        elif name in keys.off:
            off = keys.off[name]
            if value != off or isinstance(value, bool) != isinstance(off, bool):
                problem(name, "not supported yet; remove it")
        else:
            if isinstance(value, str) and value.lower() in keys.not_yet.get(name, ()):
                problem(name, f"found {quoted(value)}, which is not supported yet")
            kept[key] = translate(value, keys, problem, note, f"{name}.") if isinstance(value, dict) else value
    return kept
