"""The environment of a launch: what `accelerate launch` and its configuration ask for is honoured, or refused.

Accelerate reads its environment whatever it is told in Python, and overrides some of it in silence. So each variable is
looked at before there is an `Accelerator`: what is equal to what the run does anyway is passed over, what changes
nothing is noted, and what would train otherwise than asked for is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from anima_train.config.launch import LaunchSettings
from anima_train.core.errors import ConfigError

TRUE = ("1", "true", "yes", "on", "y", "t")


@dataclass(frozen=True)
class Launch:
    """The answer to an environment that is not refused."""

    shards: bool  # the model is divided among the processes
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """A variable's meaning for a run."""

    key: str  # of accelerate's configuration
    is_ours: Callable[[str, LaunchSettings], bool]  # (value in lower case, run): nothing is to be said about it
    answer: Literal["refused", "noted"]
    text: str


def among(*values: str) -> Callable[[str, LaunchSettings], bool]:
    """Return a rule's question: is it one of these?"""
    return lambda value, run: value in values


def is_off(value: str, run: LaunchSettings) -> bool:
    """Return True for a switch that is off."""
    return value not in TRUE


# Read by torch, by accelerate itself, or by a launcher on the way, with nothing that a run could contradict.
HONOURED = {
    "ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_LOG_LEVEL",
    "ACCELERATE_ENABLE_RICH", "ACCELERATE_DEBUG_RDV_FILE", "ACCELERATE_INIT_INCLUDE_BUFFERS",
    "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_SAGEMAKER",
    "ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_BYPASS_DEVICE_MAP", "ACCELERATE_ALLOW_CP_STANDALONE",
    # What compiling means here whatever they say: blocks one by one, each in one graph for all sizes.
    "ACCELERATE_DYNAMO_USE_FULLGRAPH", "ACCELERATE_DYNAMO_USE_DYNAMIC", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION",
}  # fmt: skip

COMPILE = 'blocks are compiled, not the whole model; set dynamo_backend to "no", and compile = true in the TOML file'
TPU = "there is no training on a TPU"
RULES = {
    "ACCELERATE_MIXED_PRECISION": Rule(
        "mixed_precision",
        lambda value, run: value == "no" or (value == "bf16" and run.dtype == "bfloat16"),
        "refused",
        'the TOML file says what is computed in: dtype = "bfloat16" or "float32" of [model]; fp16 overflows in this '
        'model, and fp8 is not supported; set it to "no"',
    ),
    "ACCELERATE_DYNAMO_BACKEND": Rule(
        "dynamo_backend",
        lambda value, run: value == "no" or (value == "inductor" and run.compiles is True),
        "refused",
        COMPILE,
    ),
    "ACCELERATE_DYNAMO_MODE": Rule("dynamo_mode", among("default", "none"), "noted", "blocks are compiled in no mode"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": Rule(
        "gradient_accumulation_steps",
        lambda value, run: value in ("auto", str(run.gradient_accumulation_steps)),
        "refused",
        "the TOML file has another gradient_accumulation_steps; keep one",
    ),
    "ACCELERATE_GRADIENT_CLIPPING": Rule(
        "gradient_clipping",
        lambda value, run: value in ("auto", "none") or number(value) == run.gradient_clipping,
        "refused",
        "the TOML file has another gradient_clipping; keep one",
    ),
    "ACCELERATE_TORCH_DEVICE": Rule(
        "(none)", among(), "refused", "the device is chosen by CUDA_VISIBLE_DEVICES, or ACCELERATE_USE_CPU=1"
    ),
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": Rule(
        "distributed_type", among("no"), "refused", "SageMaker's own libraries are not supported; start with torchrun"
    ),
    "ACCELERATE_DOWNCAST_BF16": Rule("downcast_bf16", is_off, "refused", TPU),
    "ACCELERATE_IN_TPU_POD": Rule("tpu_use_cluster", is_off, "refused", TPU),
    "XLA_USE_BF16": Rule("mixed_precision", is_off, "refused", TPU),
    "XLA_DOWNCAST_BF16": Rule("downcast_bf16", is_off, "refused", TPU),
    "PMI_SIZE": Rule("mpirun_config", among("1"), "refused", "MPI is not supported; start with torchrun"),
    "OMPI_COMM_WORLD_SIZE": Rule("mpirun_config", among("1"), "refused", "MPI is not supported; start with torchrun"),
    "MV2_COMM_WORLD_SIZE": Rule("mpirun_config", among("1"), "refused", "MPI is not supported; start with torchrun"),
}

WRAPPING = "the transformer is divided block by block, whatever is to be wrapped"
FSDP_RULES = {
    "FSDP_VERSION": Rule(
        "fsdp_version", among("2"), "refused", "FSDP1 is not supported, FSDP2 is; set fsdp_version to 2"
    ),
    "FSDP_SHARDING_STRATEGY": Rule(
        "fsdp_sharding_strategy", among("full_shard", "1"), "refused", "FSDP2 shards fully; set it to FULL_SHARD"
    ),
    "FSDP_RESHARD_AFTER_FORWARD": Rule(
        "fsdp_reshard_after_forward", among("true"), "refused",
        "weights are gathered again for the backward pass; set it to true",
    ),
    "FSDP_OFFLOAD_PARAMS": Rule(
        "fsdp_offload_params", is_off, "refused", "shards stay on their GPUs; set it to false"
    ),
    "FSDP_AUTO_WRAP_POLICY": Rule("fsdp_auto_wrap_policy", among("transformer_based_wrap"), "noted", WRAPPING),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": Rule(
        "fsdp_transformer_layer_cls_to_wrap", among("block", "block,transformerblock", ""), "noted", WRAPPING
    ),
    # What accelerate hands on whether it is asked for or not, its defaults, is passed over.
    "FSDP_MIN_NUM_PARAMS": Rule("fsdp_min_num_params", among("100000000", "0"), "noted", WRAPPING),
    "FSDP_BACKWARD_PREFETCH": Rule(
        "fsdp_backward_prefetch", among("backward_pre", "1"), "noted", "FSDP2 prefetches by itself"
    ),
    "FSDP_FORWARD_PREFETCH": Rule("fsdp_forward_prefetch", is_off, "noted", "FSDP2 prefetches by itself"),
    "FSDP_STATE_DICT_TYPE": Rule(
        "fsdp_state_dict_type", among("full_state_dict", "1"), "noted",
        "files are whole, so that any number of processes can resume from them",
    ),
    "FSDP_USE_ORIG_PARAMS": Rule("fsdp_use_orig_params", among("true"), "noted", "FSDP2 always does"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": Rule(
        "fsdp_cpu_ram_efficient_loading", among("true", "false"), "noted", "each process reads the model's file"
    ),
    "FSDP_SYNC_MODULE_STATES": Rule(
        "fsdp_sync_module_states", among("true", "false"), "noted", "each process reads the model's file"
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": Rule(
        "fsdp_activation_checkpointing",
        lambda value, run: value not in TRUE or run.recompute != "nothing",
        "refused",
        "the TOML file says what is computed again: set it to false, and activation_checkpointing = true there",
    ),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": Rule(
        "fsdp_activation_checkpointing_offload",
        lambda value, run: value not in TRUE or run.recompute == "offload",
        "refused",
        'the TOML file says what is offloaded: set it to false, and activation_checkpointing = "offload" there',
    ),
    "FSDP_IGNORED_MODULES": Rule("fsdp_ignored_modules", among(""), "refused", "the whole model is divided; remove it"),
}  # fmt: skip

# What replaces another engine is asked for in the same words.
FSDP2 = 'FSDP2 takes its place: sharding = "fsdp2" in the TOML file, or distributed_type: FSDP with fsdp_version: 2'
PARALLEL = "the model is divided among all processes, and only that"
PARALLEL_RULES = {
    f"PARALLELISM_CONFIG_{name}_SIZE": Rule(f"parallelism_config_{name.lower()}_size", among("1"), "refused", PARALLEL)
    for name in ("DP_REPLICATE", "TP", "CP", "SP")
} | {
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": Rule(
        "parallelism_config_dp_shard_size",
        lambda value, run: value in ("1", str(run.num_processes)),
        "refused",
        PARALLEL,
    )
}
# Switches of accelerate, the variables that count while they are on, and what those say.
SWITCHES: Mapping[str, tuple[str, Mapping[str, Rule]]] = {
    "ACCELERATE_USE_FSDP": ("FSDP_", FSDP_RULES),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("PARALLELISM_CONFIG_", PARALLEL_RULES),
    "ACCELERATE_USE_DEEPSPEED": ("ACCELERATE_DEEPSPEED_", {}),
    "ACCELERATE_USE_MEGATRON_LM": ("MEGATRON_LM_", {}),
}
ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": f"DeepSpeed is not supported; {FSDP2}",
    "ACCELERATE_USE_MEGATRON_LM": f"Megatron-LM is not supported; {FSDP2}",
}
# Those of torch.distributed: some of them without the others would start a run that is neither one process nor several.
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def read_environment(variables: Mapping[str, str], run: LaunchSettings) -> Launch:
    """Return what the environment asks for, if the run can heed all of it.

    Args:
        variables: of the environment.
        run: the configuration.

    Raises:
        ConfigError: it asks for what the run does not do, or half of it.
    """
    problems = [
        f"{name}={variables[name]}: {text}" for name, text in ENGINES.items() if is_on(variables, name)
    ] + incomplete(variables)
    notes = []
    rules = {**RULES}
    for switch, (prefix, those) in SWITCHES.items():
        if is_on(variables, switch):
            rules.update(those)
        elif names := sorted(name for name in variables if name.startswith(prefix)):
            notes.append(f"{', '.join(names)}: no effect without {switch}=true")
    for name in sorted(set(variables) & set(rules)):
        rule = rules[name]
        if not rule.is_ours(variables[name].strip().lower(), run):
            line = f"{name}={variables[name]} ({rule.key} of accelerate's configuration): {rule.text}"
            (problems if rule.answer == "refused" else notes).append(line)
    notes.extend(f"{name}: no effect, nothing here reads it" for name in sorted(unknown(variables)))
    if "ACCELERATE_DYNAMO_BACKEND" in variables and "WORLD_SIZE" not in variables and "MASTER_PORT" in variables:
        notes.append(
            "accelerate launch has started one process, though several are configured: without GPUs, and with "
            "distributed_type NO, it starts one; torchrun --nproc_per_node starts several"
        )
    if is_on(variables, "ACCELERATE_USE_FSDP") and "FSDP_VERSION" not in variables:
        problems.append("ACCELERATE_USE_FSDP without FSDP_VERSION, which is 1 then: set fsdp_version to 2")
    if problems:
        raise ConfigError(problems)
    asks = run.shards or is_on(variables, "ACCELERATE_USE_FSDP")
    if asks and run.num_processes == 1:
        notes.append("sharding: no effect in a run of one process, which holds all of the model")
    return Launch(asks and run.num_processes > 1, tuple(notes))


def is_on(variables: Mapping[str, str], switch: str) -> bool:
    """Return True if a switch is there and on."""
    return variables.get(switch, "").strip().lower() in TRUE


def number(value: str) -> float | None:
    """Return a number; None for what is none."""
    try:
        return float(value)
    except ValueError:
        return None


def incomplete(variables: Mapping[str, str]) -> list[str]:
    """Return what is wrong where only some of the variables of several processes are there."""
    places = [name for name in TORCHRUN[:3] if name in variables]
    if not places or variables.get("WORLD_SIZE") == "1":
        return []
    if missing := [name for name in TORCHRUN if name not in variables]:
        there = ", ".join(f"{name}={variables[name]}" for name in places)
        return [f"{there} without {', '.join(missing)}: start several processes with torchrun or accelerate launch"]
    return []


def unknown(variables: Mapping[str, str]) -> set[str]:
    """Return the variables in accelerate's name that nobody has looked at yet."""
    prefixes = tuple(prefix for prefix, _ in SWITCHES.values())
    own = {name for name in variables if name.startswith("ACCELERATE_") and not name.startswith(prefixes)}
    return own - HONOURED - set(RULES)
