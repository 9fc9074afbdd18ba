"""Keys of other trainers: accepted with a note, refused for now, or translated in an error message."""

from collections.abc import Callable, Iterator
from typing import Any

# Keys of diffusion-pipe's engine, and of video, without meaning here: accepted with one note each.
IGNORED = {
    "pipeline_stages": "models are not split into pipeline stages here",
    "partition_method": "models are not split into pipeline stages here",
    "partition_split": "models are not split into pipeline stages here",
    "steps_per_print": "every step is logged",
    "reentrant_activation_checkpointing": "checkpointing is never reentrant",
    "map_num_proc": "images are read by threads",
    "eval_gradient_accumulation_steps": "evaluation needs no accumulation",
    "video_clip_mode": "videos are not trained",
    "logging_steps": "every step is logged",
}
IGNORED_DATASET = {"frame_buckets": "videos are not trained"}

# What a later version will do. The value is the setting that means "off", which is accepted, as it has its effect.
OFF: dict[str, Any] = {
    "blocks_to_swap": 0,
    "compile": False,
    "ema": {},
    "sampling": {},
    "metadata": {},
    "model.text_encoder_nf4": False,
    "model.text_encoder_fp8": False,
    "model.t5_path": None,
    "adapter.use_dora": False,
    "adapter.use_rslora": False,
    "adapter.init_from_existing": None,
    "adapter.target_modules": None,
    "adapter.exclude_modules": None,
    "adapter.rank_pattern": {},
    "adapter.alpha_pattern": {},
}
OFF_DATASET: dict[str, Any] = {
    "shuffle_tags": False,
    "role": "train",
    "weight": None,
    "recursive": False,
    "keep_first_n_tags": 0,
    "tag_dropout": 0.0,
    "protected_tags": [],
    "no_upscale": False,
    "alpha_as_mask": False,
    "horizontal_flip": False,
    "hf_dataset": None,
}
NOT_YET_HINTS = {"shuffle_tags": "; cache_shuffle_num gives a fixed number of shuffled variants"}

# Values that a later version will accept.
NOT_YET_VALUES: dict[str, tuple[Any, ...]] = {
    "model.type": ("cosmos_predict2",),
    "model.transformer_dtype": ("float8", "float8_e4m3fn", "int8", "nf4"),
    "model.cache_text_embeddings": (False,),
    "activation_checkpointing": ("offload", "unsloth", "selective"),
    "adapter.type": ("lokr", "loha"),
    "optimizer.type": (
        "adamw8bit", "adamw8bitkahan", "stableadamw", "sgd", "lion", "adafactor", "prodigy", "schedule-free", "muon",
        "came", "CAME", "automagic",
    ),
}  # fmt: skip

# Names from other trainers -> what to write here.
FOREIGN = {
    "learning_rate": "it is called lr, in [optimizer]",
    "unet_lr": "it is called lr, in [optimizer]",
    "text_encoder_lr": "the text encoder is not trained; the LLM adapter is llm_adapter_lr, in [model]",
    "network_dim": "it is called rank, in [adapter]",
    "lora_rank": "it is called rank, in [adapter]",
    "r": "it is called rank, in [adapter]",
    "linear": "it is called rank, in [adapter]",
    "network_alpha": "it is called alpha, in [adapter]",
    "lora_alpha": "it is called alpha, in [adapter]",
    "linear_alpha": "it is called alpha, in [adapter]",
    "network_dropout": "it is called dropout, in [adapter]",
    "lora_dropout": "it is called dropout, in [adapter]",
    "network_module": 'it is called type, in [adapter], for example "lora"',
    "network_args": "its keys stand in [adapter]",
    "train_batch_size": "it is called micro_batch_size_per_gpu",
    "batch_size": "it is called micro_batch_size_per_gpu",
    "max_train_steps": "it is called max_steps",
    "steps": "it is called max_steps",
    "max_train_epochs": "it is called epochs",
    "num_train_epochs": "it is called epochs",
    "pretrained_model_name_or_path": "it is called transformer_path, in [model]",
    "dit_path": "it is called transformer_path, in [model]",
    "vae": "it is called vae_path, in [model]",
    "qwen3": "it is called llm_path, in [model]",
    "train_data_dir": "it is called path, in a [[directory]] of the dataset",
    "image_dir": "it is called path, in a [[directory]] of the dataset",
    "dataset_config": "it is called dataset",
    "reg_data_dir": "regularisation sets are not supported yet",
    "resolution": "it is called resolutions, a list, in the dataset",
    "mixed_precision": "it is called dtype, in [model]",
    "full_bf16": 'write transformer_dtype = "bfloat16", in [model]',
    "save_precision": "it is called save_dtype",
    "output_name": "it is called run_name",
    "logging_dir": "logs are written into the run folder, below output_dir",
    "lr_warmup_steps": "it is called warmup_steps",
    "optimizer_type": "it is called type, in [optimizer]",
    "optimizer_args": "its keys stand in [optimizer]",
    "max_grad_norm": "it is called gradient_clipping",
    "gradient_checkpointing": "it is called activation_checkpointing",
    "caption_dropout_rate": "it is called uncond_fraction",
    "caption_extension": "captions are .txt files",
    "shuffle_caption": "it is called cache_shuffle_num, in the dataset",
    "keep_tokens": "keeping the first tags in place is not supported yet",
    "caption_tag_dropout_rate": "tag dropout is not supported yet",
    "flip_aug": "horizontal flips are not supported yet",
    "bucket_reso_steps": "sides are multiples of 16",
    "timestep_sampling": "it is called timestep_sample_method, in [model]",
    "discrete_flow_shift": "it is called shift, in [model]",
    "weighting_scheme": "t is not weighted; its distribution is timestep_sample_method, in [model]",
    "min_snr_gamma": "there is no such weighting for flow matching",
    "noise_offset": "there is no noise offset for flow matching",
    "clip_skip": "there is no CLIP in this model",
    "num_gpus": "the number of processes is given to accelerate launch or torchrun",
    "blocks_to_checkpoint": "activation_checkpointing = true recomputes every block",
    "wandb": "it is called enable_wandb, in [monitoring]",
    "sample_prompts": "previews are not supported yet",
    "network_train_unet_only": "write llm_adapter_lr = 0, in [model]",
}


def translate(
    data: dict[str, Any],
    ignored: dict[str, str],
    off: dict[str, Any],
    prefix: str,
    problem: Callable[[str], None],
    note: Callable[[str], None],
) -> dict[str, Any]:
    """A copy of a table without the keys that other trainers have and this one does not.

    Args:
        data: one table; nested tables are looked into with their dotted names.
        ignored: keys without meaning here, by their dotted name.
        off: keys not supported yet, with the value that means "off".
        prefix: dotted name of the table, with a final dot, or "".
        problem: gets a sentence for each value that is not supported yet.
        note: gets a sentence for each ignored key.
    """
    kept: dict[str, Any] = {}
    for key, value in data.items():
        name = prefix + key
        if name in ignored:
            note(f"{name}: has no meaning here ({ignored[name]}); ignored")
        elif name in off:
            if value != off[name] and value not in ({}, [], "", None):
                problem(f"{name}: not supported yet{NOT_YET_HINTS.get(key, '')}; remove it")
        elif any(value is wanted or (isinstance(value, str) and value == wanted) for wanted in not_yet(name)):
            problem(f"{name}: {value!r} is not supported yet")
        elif isinstance(value, dict):
            kept[key] = translate(value, ignored, off, f"{name}.", problem, note)
        else:
            kept[key] = value
    return kept


def not_yet(name: str) -> Iterator[Any]:
    """Values of a key that a later version will accept."""
    yield from NOT_YET_VALUES.get(name, ())
