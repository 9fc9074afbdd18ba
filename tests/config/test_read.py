"""TOML files and --set: what can be wrong before there is a config to check."""

import struct
import tomllib

import pytest

from anima_train.config.load import load_config
from anima_train.config.read import MAX_DEPTH, apply_override, read_toml
from anima_train.core.errors import ConfigError


def problem(path):
    with pytest.raises(ConfigError) as caught:
        read_toml(path)
    (text,) = caught.value.problems
    return text


def refused(override, data=None):
    with pytest.raises(ConfigError) as caught:
        apply_override({} if data is None else data, override)
    (text,) = caught.value.problems
    return text


def test_a_byte_order_mark_is_accepted(project):
    project.write("dataset.toml", "\ufeffdirectory = [{ path = 'data' }]")
    path = project.config({"dataset": "dataset.toml"})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_config(path).train.settings.directory[0].path == "data"


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ("a = 1\nb = = 2\n", 2, 5),
        ("a = 1\nb = 'x", 2, 7),
        ("a = [1,\nb = 2\n", 2, 1),
        ("a = 1\na = 2\n", 2, 6),
        ("[model\n", 1, 7),
        ("a = 1\r\nb = = 2\r\n", 2, 5),
        ("a = 1\rb = = 2\r", 2, 5),
    ],
)
def test_a_syntax_error_shows_its_line_with_a_caret_below(project, text, line, column):
    path = project.folder / "main.toml"
    path.write_bytes(text.encode())
    first, shown, caret = problem(path).split("\n")
    assert first.startswith(f"{path}: line {line}: ")
    assert shown == "  " + text.replace("\r\n", "\n").replace("\r", "\n").split("\n")[line - 1]
    assert caret == " " * (column + 1) + "^"


@pytest.mark.parametrize("key", ["wandb_api_key", "hf_token", "password"])
@pytest.mark.parametrize("line", ["{} = hunter2", "{} = “hunter2”", "{}: hunter2", "{} = 'hunter2", "{} hunter2"])
def test_a_line_with_a_secret_is_never_shown(project, key, line):
    assert "hunter2" not in problem(project.write("main.toml", line.format(key)))


def test_backslashes_that_are_valid_escapes_get_the_hint_with_the_missing_path(project):
    (project.folder / "main.toml").write_text(
        'output_dir = "o"\nepochs = 1\nmodel = { type = "anima", vae_path = "C:\\new\\tae" }\n'
        'optimizer = { type = "adamw", lr = 1.0 }\ndataset = { directory = [{ path = "data" }] }\n'
    )
    with pytest.raises(ConfigError) as caught:
        load_config(project.folder / "main.toml")
    (text,) = caught.value.problems
    assert text.startswith('main.toml: model.vae_path: "C:\\new\\tae" does not exist')
    assert "write Windows paths in single quotes" in text


def test_text_that_is_not_utf8_is_named_with_its_byte(project):
    path = project.folder / "main.toml"
    path.write_bytes(b"a = 1\nb = 'caf\xe9'\n")
    assert problem(path) == (
        f"{path}: line 2: byte 0xe9 is not UTF-8; save the file as UTF-8\n  b = 'caf\ufffd'\n          ^"
    )


@pytest.mark.parametrize(
    ("encoding", "name"), [("utf-16", "UTF-16"), ("utf-16-le", "UTF-16"), ("utf-16-be", "UTF-16"), ("utf-32", "UTF-32")]
)
def test_another_encoding_is_named_with_the_way_to_change_it(project, encoding, name):
    path = project.folder / "main.toml"
    path.write_bytes("a = 1".encode(encoding))
    first, second = problem(path).split("\n")
    assert first.startswith(f"{path}: is in {name}; save it as UTF-8")
    assert "Set-Content -Encoding utf8 main.toml" in second


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'{"epochs": 3,\n "model": {"type": "anima"}}', "is JSON"),
        (b'{"epochs": 3, // with a comment\n}', "is JSON"),
        (b"# a job\njob: extension\nconfig:\n  process:\n    - type: sd_trainer\n", "is YAML"),
        (b"---\na: 1\n", "is YAML"),
        (b"#!/bin/sh\naccelerate launch train.py\n", "is a program"),
        (b"<!DOCTYPE html><html></html>", "is a web page"),
        (struct.pack("<Q", 8) + b"{}      ", "is a model or a LoRA, not a configuration, which names such files"),
        (b"PK\x03\x04rest", "is a zip archive, or a checkpoint in pickle"),
        (b"\x89PNG\r\n", "is a picture"),
        (b"a" * (16 * 2**20 + 1), "has more than 16 MiB, which no configuration has"),
    ],
)
def test_a_file_of_another_kind_is_named_as_that(project, content, kind):
    path = project.folder / "main.toml"
    path.write_bytes(content)
    assert problem(path) == (
        f"{path}: {kind}\n  expected TOML, a `key = value` in each line, as in configs/style_lora.toml"
    )


def test_tables_in_tables_without_end_are_a_sentence(project):
    assert problem(project.write("main.toml", "a = " + "[" * 100_000)).endswith("deep, as in no configuration")


def test_an_integer_of_thousands_of_digits_is_a_syntax_error(project):
    assert "syntax error" in problem(project.write("main.toml", "a = " + "9" * 5000))


def test_a_missing_file_gets_the_nearest_name(project):
    project.write("configs/style.toml", "")
    assert problem(project.folder / "configs/stile.toml") == (
        f'{project.folder}/configs/stile.toml: does not exist; did you mean "{project.folder}/configs/style.toml"?'
    )


def test_a_folder_is_not_read_as_a_file(project):
    assert problem(project.folder) == f"{project.folder}: is a folder; give the .toml file"
    project.write("config.toml", "")
    assert (
        problem(project.folder) == f"{project.folder}: is a folder; give the file, such as {project.folder}/config.toml"
    )


@pytest.mark.parametrize(
    "text",
    ["1", "1e-4", "true", "'out'", '"out"', "[[512, 4], [1024, 1]]", "{ type = 'lora', rank = 4 }", "0x10 # sixteen"],
)
def test_set_reads_every_kind_of_toml_value(text):
    data = {}
    apply_override(data, f"key={text}")
    assert data == tomllib.loads(f"key = {text}")


def test_set_changes_one_key_and_creates_tables():
    data = {"adapter": {"type": "lora", "rank": 32}}
    assert apply_override(data, "adapter.rank=4") == "adapter.rank"
    assert apply_override(data, "monitoring.enable_wandb = true") == "monitoring"
    assert data == {"adapter": {"type": "lora", "rank": 4}, "monitoring": {"enable_wandb": True}}


def test_set_reaches_the_config(project):
    loaded = project.load(overrides=["adapter.rank=4", 'output_dir="other"', "seed=1", "seed=2"])
    assert (loaded.config.adapter.rank, loaded.config.output_dir, loaded.config.seed) == (4, "other", 2)


def test_set_can_create_the_adapter(project):
    loaded = project.load({"adapter": project.absent}, ["adapter.type='lora'", "adapter.rank=4"])
    assert loaded.config.adapter.rank == 4


@pytest.mark.parametrize("override", ["epochs", "", "=3", "a..b=3", ".a=3", "adapter.=3"])
def test_set_without_key_or_value_shows_how(override):
    assert refused(override) == f'--set "{override}": expected KEY.PATH=VALUE, such as --set adapter.rank=16'


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("run_name=style", "text needs quotes: --set 'run_name=\"style\"'"),
        ("run_name=", "text needs quotes: --set 'run_name=\"\"'"),
        ("model.vae_path=C:\\vae", "text needs quotes: --set 'model.vae_path=\"C:\\\\vae\"'"),
        ("run_name=it's", "text needs quotes: --set 'run_name=\"it'\"'\"'s\"'"),
        ("flux=True", "true and false are in small letters: --set flux=true"),
        ("optimizer.lr=1,5", "the decimal sign is a point: --set optimizer.lr=1.5"),
        ("optimizer.betas=0.9, 0.99", "several values are a list: --set 'optimizer.betas=[0.9, 0.99]'"),
        ("warmup_steps=100 steps", "a number has no unit: --set warmup_steps=100"),
    ],
)
def test_set_with_unquoted_text_shows_the_quotes(override, hint):
    text = refused(override)
    assert text.startswith(f"--set {override.partition('=')[0]}: the value is not TOML; ")
    assert text.endswith(f"; {hint}")
    assert "line 1" not in text


def test_set_never_repeats_a_secret():
    assert "abc" not in refused("monitoring.wandb_api_key=abc")


@pytest.mark.parametrize("override", ["seed=1\nepochs=3", "seed=1\n[model]\ntype='anima'"])
def test_set_swallows_no_further_lines(override):
    assert refused(override) == "--set seed: found several lines, expected one value"


@pytest.mark.parametrize("key", ["directory[0].path", "dataset.directory.0.path", "dataset.directory.0"])
def test_set_cannot_reach_into_lists(key):
    assert refused(f"{key}=3") == (
        f"--set {key}: entries of a list cannot be set one by one; set the whole list, or edit the file"
    )


def test_set_through_something_that_is_no_table_says_what_it_is():
    assert refused("dataset.directory.path=3", {"dataset": {"directory": [{}]}}) == (
        "--set dataset.directory.path: dataset.directory is [{}] (a list), expected a table; "
        "set it whole, or edit the file"
    )
    assert refused("dataset.resolutions=[512]", {"dataset": "data.toml"}) == (
        '--set dataset.resolutions: dataset is "data.toml" (text), expected a table; edit the file it names'
    )


def test_problems_of_what_was_set_name_set(project):
    found = project.problems(
        {"gradient_clipping": "1"},
        ["adapter.rnak=4", "monitoring.lr=1", "wandb.on=true", "seed=true", "epochs", "dataset.pth='x'"],
    )
    assert sorted(found) == sorted(
        [
            "--set adapter.rnak: unknown key; did you mean rank?",
            "--set monitoring.lr: unknown key; it belongs in [optimizer]",
            "--set wandb: unknown key; it is called enable_wandb, in [monitoring]",
            "--set seed: found true, expected an integer",
            '--set "epochs": expected KEY.PATH=VALUE, such as --set adapter.rank=16',
            "--set dataset.pth: unknown key; did you mean path, in [[directory]]?",
            'main.toml: gradient_clipping: found "1" (text), expected a number',
        ]
    )


def test_what_a_created_table_lacks_is_a_problem_of_set(project):
    assert project.problems({"adapter": project.absent}, ["adapter.rank=4"]) == [
        '--set adapter.type: missing; expected one of "lora", "lokr", "loha", "full"'
    ]


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 3000 + "]" * 3000,
        "a = " + "{a = " * 3000 + "1" + "}" * 3000,
        f"[{'.'.join(['a'] * 3000)}]",
        f"{'.'.join(['a'] * 3000)} = 1",
        f"a = {'[' * (MAX_DEPTH + 1)}{']' * (MAX_DEPTH + 1)}",
    ],
)
def test_deep_nesting_is_refused_in_a_sentence(tmp_path, text):
    path = tmp_path / "deep.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"deep\.toml: .*deep"):
        read_toml(path)
    value = text.partition(" = ")[2] or "1"
    key = "a" if text.startswith("a = ") else text.strip("[] =1")
    with pytest.raises(ConfigError, match=r"--set a.*deep"):
        apply_override({}, f"{key}={value}")


def test_a_configuration_is_not_nested_too_deeply(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(f"a.b.c.d = {'[' * 20}{{ e = 1 }}{']' * 20}")
    assert read_toml(path)["a"]["b"]["c"]["d"]


def test_a_name_without_its_ending_is_answered_with_it(project):
    project.write("base.toml", "")
    path = project.folder / "base"
    assert problem(path) == f'{path}: does not exist; did you mean "{path}.toml"?'
