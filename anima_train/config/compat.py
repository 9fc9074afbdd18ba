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
DATASET = Keys(
    ignored={"frame_buckets": "videos are not trained"},
    off={},
    not_yet={},
)

# Names from other trainers, and those of earlier versions -> what to write here.
FOREIGN = {
    "stop_within_seconds": "a signal to stop always lets the step finish first: remove the key",
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
    "image_micro_batch_size_per_gpu": "it is called micro_batch_size_per_gpu, as only images are trained",
    "image_eval_micro_batch_size_per_gpu": "it is called eval_micro_batch_size_per_gpu, as only images are trained",
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
    "reg_data_dir": 'write a [[directory]] with role = "regularization" in the dataset',
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
    "caption_extension": "captions are .txt files, or in a captions.json",
    "caption_separator": "it is called cache_shuffle_delimiter, in the dataset",
    "enable_wildcard": "it is called captions_per_line, in the dataset, where the lines take turns",
    "class_tokens": "it is called trigger_word, in the dataset",
    "shuffle_caption": "it is called shuffle_tags, in the dataset; cache_shuffle_num is the faster way",
    "keep_tokens": "it is called keep_first_n_tags, in the dataset",
    "caption_tag_dropout_rate": "it is called tag_dropout, in the dataset",
    "flip_aug": "it is called horizontal_flip, in the dataset",
    "alpha_mask": "it is called alpha_as_mask, in the dataset",
    "bucket_no_upscale": "it is called no_upscale, in the dataset",
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
    "fuse_adapters": "fusing LoRAs into the base is not supported yet",
    "huggingface_repo": "uploading is not supported yet",
    "upload_hf_from_epoch": "uploading is not supported yet",
    "sample_prompts": "it is called prompts, in [sampling]",
    "sample_every_n_steps": "it is called every_n_steps, in [sampling]",
    "sample_every_n_epochs": "it is called every_n_epochs, in [sampling]",
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
