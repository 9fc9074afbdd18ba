"""Flags of other programs, and of settings: what to write instead."""

import pytest

from anima_train.cli.main import COMMANDS, application
from anima_train.config.compat import FLAGS, FOREIGN
from anima_train.config.flags import flag_fault
from anima_train.core.errors import ConfigError

OWN = ["--set", "--dry-run", "--resume", "--size", "--negative"]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--config", "the file is given without a flag: anima-train FILE.toml"),
        ("--config_file", "the file is given without a flag: anima-train FILE.toml"),
        ("--dataset_config", "the configuration names it: dataset = 'FILE.toml'"),
        ("--regenerate_cache", FOREIGN["regenerate_cache"].replace("remove it", "leave it out")),
        ("--resume_from_checkpoint", "write --resume, or --resume PATH"),
        ("--deepspeed", FLAGS["deepspeed"]),
        ("--num_cpu_threads_per_process", FLAGS["num_gpus"]),
        ("--network_dim", "settings stand in the TOML file, and it is called rank, in [adapter]"),
        ("--rank", "settings stand in the TOML file; for one run write --set adapter.rank=VALUE"),
        ("--max-steps", "settings stand in the TOML file; for one run write --set max_steps=VALUE"),
        ("--tag_dropout", "settings stand in the TOML file, this one in the dataset's"),
        ("--lr_scheduler", "settings stand in the TOML file; for one run write --set lr_scheduler=VALUE"),
        ("--dry_run", "it is written --dry-run"),
        ("--Resume", "it is written --resume"),
        ("--json", "it is for anima check and anima report"),
        ("--width", "write --size WIDTHxHEIGHT, such as --size 832x1216"),
        ("--negative-prompt", "write --negative TEXT"),
    ],
)
def test_a_flag_of_another_program_is_answered_with_ours(flag, said):
    assert flag_fault(flag, OWN) == f"{flag}: unknown flag; {said}"


def test_a_flag_is_not_answered_with_one_that_the_command_does_not_have():
    assert "--size" not in flag_fault("--resolution", ["--set"])
    assert flag_fault("--nonsense", OWN) is None


@pytest.mark.parametrize("flag", ["--model", "--adapter", "--sampling", "--eval_datasets", "--ema", "--type"])
def test_no_value_is_advised_for_a_table_or_for_the_type_of_some_table(flag):
    assert flag_fault(flag, OWN) is None


def test_no_flag_of_ours_is_refused_and_commands_ask():
    app = application(COMMANDS, "")
    with pytest.raises(ConfigError, match="--network_dim: unknown flag"):
        app(args=["train", "x.toml", "--network_dim", "8"])
    import typer

    for command in typer.main.get_command(app).commands.values():
        flags = {option for each in command.params for option in each.opts if option.startswith("-")}
        assert not {flag.lstrip("-").replace("-", "_") for flag in flags} & FLAGS.keys(), command.name


@pytest.mark.parametrize("flag", ["--resume_path", "--resume-pat", "--resume-paths"])
def test_an_option_that_no_help_shows_is_not_suggested(flag):
    import typer

    with pytest.raises((typer.BadParameter.__base__, ConfigError)) as caught:
        application(COMMANDS, "")(args=["train", "x.toml", flag], standalone_mode=False)
    text = str(caught.value) + getattr(caught.value, "format_message", str)()
    assert "--resume-path" not in text.replace(flag, "")
    assert "--resume" in text.replace(flag, "")
