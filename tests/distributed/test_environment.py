"""What accelerate's configuration and the environment ask for is honoured, noted or refused, never half."""

import os
import re
import sys
from dataclasses import replace

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from anima_train.config.launch import LaunchSettings
from anima_train.config.load import load_config
from anima_train.core.errors import ConfigError
from anima_train.distributed.environment import read_environment
from anima_train.training.train import run_training

BF16 = LaunchSettings("bfloat16", None, "nothing", 1, 1.0, False, 2)
SEVERAL = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}

PARALLEL = {**FSDP, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}

REFUSED = [  # variables, the beginning of the one problem, what it tells to do
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported", 'sharding = "fsdp2"'),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported", 'sharding = "fsdp2"'),
    ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "(mixed_precision of", "fp16 overflows"),
    ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "(mixed_precision of", "fp8 is not supported"),
    ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "(dynamo_backend of", "compile = true"),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "(gradient_accumulation_steps of", "keep one"),
    ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "(gradient_clipping of", "keep one"),
    ({"ACCELERATE_TORCH_DEVICE": "cuda:1"}, "the device is chosen by", "CUDA_VISIBLE_DEVICES"),
    ({"ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "DATA_PARALLEL"}, "SageMaker", "torchrun"),
    ({"ACCELERATE_DOWNCAST_BF16": "1"}, "TPU", "TPU"),
    ({"ACCELERATE_IN_TPU_POD": "1"}, "TPU", "TPU"),
    ({"XLA_USE_BF16": "1"}, "TPU", "TPU"),
    ({"XLA_DOWNCAST_BF16": "1"}, "TPU", "TPU"),
    ({"PMI_SIZE": "2"}, "MPI is not supported", "torchrun"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "MPI is not supported", "torchrun"),
    ({"MV2_COMM_WORLD_SIZE": "2"}, "MPI is not supported", "torchrun"),
    ({"ACCELERATE_USE_FSDP": "true"}, "without FSDP_VERSION, which is 1", "fsdp_version to 2"),
    ({**FSDP, "FSDP_VERSION": "1"}, "FSDP1 is not supported", "set fsdp_version to 2"),
    ({**FSDP, "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, "FSDP2 shards fully", "FULL_SHARD"),
    ({**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"}, "weights are gathered again", "true"),
    ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "shards stay on their GPUs", "false"),
    ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "the TOML file says", "activation_checkpointing = true"),
    ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"}, "the TOML file says", '"offload"'),
    ({**FSDP, "FSDP_IGNORED_MODULES": "blocks.0"}, "the whole model is divided", "remove it"),
    *(
        ({**PARALLEL, f"PARALLELISM_CONFIG_{name}_SIZE": "4"}, "is divided among all", "")
        for name in ("DP_REPLICATE", "DP_SHARD", "TP", "CP", "SP")
    ),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT", "torchrun"),
    ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 without RANK, WORLD_SIZE", "torchrun"),
]


@pytest.mark.parametrize(("variables", "problem", "remedy"), REFUSED)
def test_what_the_run_does_not_do_is_refused_in_a_sentence_with_the_variable_and_the_remedy(variables, problem, remedy):
    with pytest.raises(ConfigError) as refused:
        read_environment(variables, BF16)
    (line,) = refused.value.problems
    assert problem in line
    assert remedy in line
    name = list(variables)[-1]
    assert name in line
    assert variables[name] in line or name == "ACCELERATE_USE_FSDP"


NOTED = [  # variables, part of the one note
    ({"ACCELERATE_DYNAMO_MODE": "max-autotune"}, "compiled in no mode"),
    ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "no effect without ACCELERATE_USE_FSDP=true"),
    ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "no effect without ACCELERATE_USE_DEEPSPEED=true"),
    ({"MEGATRON_LM_TP_DEGREE": "2"}, "no effect without ACCELERATE_USE_MEGATRON_LM=true"),
    ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, "no effect without ACCELERATE_USE_PARALLELISM_CONFIG=true"),
    ({"ACCELERATE_FP8_BACKEND": "AO"}, "no effect, nothing here reads it"),
    ({"ACCELERATE_CONFIG_DS_FIELDS": ""}, "no effect, nothing here reads it"),
    ({"ACCELERATE_OF_LATER": "1"}, "no effect, nothing here reads it"),
    ({"ACCELERATE_DYNAMO_BACKEND": "NO", "MASTER_PORT": "29500"}, "accelerate launch has started one process"),
    ({**FSDP, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "block by block"),
    ({**FSDP, "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer"}, "block by block"),
    ({**FSDP, "FSDP_MIN_NUM_PARAMS": "2000"}, "block by block"),
    ({**FSDP, "FSDP_BACKWARD_PREFETCH": "BACKWARD_POST"}, "prefetches by itself"),
    ({**FSDP, "FSDP_FORWARD_PREFETCH": "true"}, "prefetches by itself"),
    ({**FSDP, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "files are whole"),
    ({**FSDP, "FSDP_USE_ORIG_PARAMS": "false"}, "FSDP2 always does"),
]


@pytest.mark.parametrize(("variables", "text"), NOTED)
def test_what_changes_nothing_is_noted_with_the_variable(variables, text):
    (note,) = read_environment(variables, BF16).notes
    assert text in note
    assert "accelerate launch" in note or list(variables)[-1] in note


def test_what_the_run_does_anyway_is_passed_over():
    run = LaunchSettings("bfloat16", True, "offload", 4, 0.5, False, 2)
    same = {
        **SEVERAL, **FSDP, "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_GRADIENT_CLIPPING": "0.5",
        "FSDP_ACTIVATION_CHECKPOINTING": "true", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2", "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    }  # fmt: skip
    launch = read_environment(same, run)
    assert launch.shards
    assert launch.notes == ()


def test_bfloat16_of_the_launcher_is_refused_for_a_model_in_float32():
    with pytest.raises(ConfigError, match="dtype = "):
        read_environment({"ACCELERATE_MIXED_PRECISION": "bf16"}, replace(BF16, dtype="float32"))


@pytest.mark.parametrize("variables", [{}, FSDP])
def test_sharding_in_one_process_is_noted(variables):
    launch = read_environment(variables, replace(BF16, shards=not variables, num_processes=1))
    assert not launch.shards
    assert launch.notes == ("sharding: no effect in a run of one process, which holds all of the model",)


def test_all_problems_come_at_once():
    with pytest.raises(ConfigError) as refused:
        read_environment({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "fp16"}, BF16)
    assert len(refused.value.problems) == 2


# What accelerate makes of its own configuration

BASE = {
    "compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_processes": 2, "num_machines": 1,
    "machine_rank": 0, "mixed_precision": "no", "use_cpu": False, "debug": False, "main_training_function": "main",
    "rdzv_backend": "static", "same_network": True, "gpu_ids": "all", "main_process_port": 0,
    "enable_cpu_affinity": False, "downcast_bf16": "no",
}  # fmt: skip
FSDP_FILE = {  # as `accelerate config` writes it
    "fsdp_version": 2, "fsdp_reshard_after_forward": True, "fsdp_offload_params": False,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_transformer_layer_cls_to_wrap": "Block",
    "fsdp_state_dict_type": "FULL_STATE_DICT", "fsdp_cpu_ram_efficient_loading": True,
    "fsdp_activation_checkpointing": False,
}  # fmt: skip


def launched(tmp_path, **keys):
    """The variables that accelerate hands on for a configuration file with these keys."""
    path = tmp_path / "accelerate.yaml"
    path.write_text(yaml.safe_dump({**BASE, **keys}))
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    arguments.nondefault = []
    arguments, *_ = _validate_launch_command(arguments)
    several = arguments.multi_gpu or arguments.use_fsdp or arguments.use_megatron_lm
    made = prepare_multi_gpu_env(arguments) if several else prepare_simple_launcher_cmd_env(arguments)[1]
    return {name: value for name, value in made.items() if os.environ.get(name) != value}


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({}, ()),
        ({"mixed_precision": "bf16"}, ()),
        ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "dynamo_backend of accelerate's configuration"),
        ({"mixed_precision": "fp16"}, "fp16 overflows"),
        ({"distributed_type": "MEGATRON_LM", "megatron_lm_config": {}}, "Megatron-LM is not supported"),
        ({"distributed_type": "FSDP", "fsdp_config": FSDP_FILE}, ()),
        ({"distributed_type": "FSDP", "fsdp_config": {**FSDP_FILE, "fsdp_version": 1}}, "FSDP1 is not supported"),
        ({"distributed_type": "FSDP", "fsdp_config": {**FSDP_FILE, "fsdp_offload_params": True}}, "shards stay on"),
        ({"distributed_type": "NO", "num_processes": 1}, ()),
    ],
)
def test_what_accelerate_makes_of_its_configuration_is_read(tmp_path, keys, found):
    variables = launched(tmp_path, **keys) | (SEVERAL if keys.get("num_processes") != 1 else {})
    if found:
        with pytest.raises(ConfigError, match=re.escape(found)):
            read_environment(variables, BF16)
        return
    launch = read_environment(variables, BF16)
    assert launch.notes == found
    assert launch.shards == ("fsdp_config" in keys)


def test_accelerate_starts_one_process_without_gpus_and_that_is_noted(tmp_path):
    (note,) = read_environment(launched(tmp_path, distributed_type="NO", use_cpu=True), BF16).notes
    assert "one process" in note


def test_every_variable_that_accelerate_reads_for_a_run_is_known():
    """Those that its sources of today name; a newer one gets a note until somebody has looked at it."""
    import accelerate

    from anima_train.distributed import environment

    folder = os.path.dirname(accelerate.__file__)
    found = set()
    for name in ("accelerator.py", "state.py", "utils/dataclasses.py", "utils/launch.py", "parallelism_config.py"):
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            found |= set(re.findall(r"\"((?:ACCELERATE|FSDP|PARALLELISM_CONFIG)_[A-Z0-9_]*[A-Z0-9])\"", file.read()))
    known = environment.HONOURED | set(environment.RULES) | set(environment.FSDP_RULES)
    prefixes = ("ACCELERATE_DEEPSPEED_", "ACCELERATE_FP8_", "PARALLELISM_CONFIG_", "FSDP_PYTORCH")
    left = {name for name in found - known if not name.startswith(prefixes)}
    assert left <= {"ACCELERATE_CONFIG_DS_FIELDS", "FSDP_AUTO_WRAP_POLICY", "FSDP_BACKWARD_PREFETCH"}


# The program


@pytest.mark.parametrize("arguments", [(), ("--dry-run",)])
def test_a_run_and_its_dry_run_are_refused_before_there_is_an_accelerator(trainer, monkeypatch, capsys, arguments):
    from anima_train.cli.main import train_main

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(sys, "argv", ["anima-train", str(trainer.config()), *arguments])
    with pytest.raises(SystemExit) as ended:
        train_main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ACCELERATE_USE_DEEPSPEED=true: DeepSpeed is not supported")


@pytest.mark.slow
def test_accelerate_launch_with_a_configuration_file_that_asks_for_what_is_not_done(trainer, command, tmp_path):
    path = tmp_path / "accelerate.yaml"
    keys = {"mixed_precision": "fp16", "dynamo_config": {"dynamo_backend": "INDUCTOR"}}
    sharded = {"distributed_type": "FSDP", "fsdp_config": {**FSDP_FILE, "fsdp_version": 1}}
    path.write_text(yaml.safe_dump({**BASE, **keys, **sharded}))
    arguments = ["-m", "accelerate.commands.launch", "--config_file", str(path), "-m", "anima_train"]
    result = command([sys.executable, *arguments, str(trainer.config("run", max_steps=1))])
    lines = [line.split(" (")[1] for line in result.stderr.splitlines() if line.startswith("error")]
    assert lines == [
        "process 0): ACCELERATE_DYNAMO_BACKEND=INDUCTOR",
        "process 0): ACCELERATE_MIXED_PRECISION=fp16",
        "process 0): FSDP_VERSION=1",
    ]


@pytest.mark.slow
def test_accelerate_launch_with_a_configuration_file_that_asks_for_fsdp2_divides_the_model(trainer, command, tmp_path):
    path = tmp_path / "accelerate.yaml"
    path.write_text(yaml.safe_dump({**BASE, "distributed_type": "FSDP", "fsdp_config": FSDP_FILE}))
    arguments = ["-m", "accelerate.commands.launch", "--config_file", str(path), "-m", "anima_train"]
    result = command([sys.executable, *arguments, str(trainer.config("run", max_steps=1))])
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("sharding: the model is divided among 2 processes (FSDP2)") == 1
    assert (trainer.folder / "runs" / "run" / "weights" / "run.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks_to_swap": 2}, "sharding: excludes blocks_to_swap"),
        ({"model": {"transformer_dtype": "int8"}}, 'sharding: excludes model.transformer_dtype = "int8"'),
        ({"optimizer": {"type": "lion"}}, 'sharding: optimizer.type "lion" needs whole weights'),
        ({"optimizer": {"type": "adamw_optimi", "rounding": "stochastic"}}, "sharding: excludes optimizer.rounding"),
    ],
)
def test_a_dry_run_refuses_what_cannot_be_divided(trainer, monkeypatch, changes, message):
    started = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for variable, value in started.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=re.escape(message)):
        run_training(load_config(trainer.config(sharding="fsdp2", **changes), []), dry_run=True)
