"""TOML files and --set: what can be wrong before there is a config to check."""

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
        ("a = [1,\n", 2, 1),
        ("a = 1\na = 2\n", 2, 6),
        ("[model\n", 1, 7),
    ],
)
def test_a_syntax_error_has_line_and_column(project, text, line, column):
    path = project.write("main.toml", text)
    assert f"(at line {line}, column {column}" in problem(path)
    assert problem(path).startswith(f"{path}: syntax error: ")


@pytest.mark.parametrize("text", [r'p = "C:\models\a"', r'p = "C:\Users\a"', r'p = "C:\xyz"', r'p = "C:\8"'])
def test_backslashes_of_windows_get_a_hint(project, text):
    assert problem(project.write("main.toml", text)).endswith(
        r"; write Windows paths in single quotes: 'C:\models\anima.safetensors'"
    )


def test_other_syntax_errors_get_no_hint_about_windows(project):
    assert "Windows" not in problem(project.write("main.toml", "a = = 1"))


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
        f"{path}: found byte 0xe9 at line 2, column 9, expected text in UTF-8; save it in that encoding"
    )


def test_utf16_is_named_as_not_utf8(project):
    path = project.folder / "main.toml"
    path.write_bytes("a = 1".encode("utf-16"))
    assert "expected text in UTF-8" in problem(path)


def test_an_integer_of_thousands_of_digits_is_a_syntax_error(project):
    assert "syntax error" in problem(project.write("main.toml", "a = " + "9" * 5000))


def test_a_missing_file_gets_the_nearest_name(project):
    project.write("configs/style.toml", "")
    assert problem(project.folder / "configs/stile.toml") == (
        f'{project.folder}/configs/stile.toml: does not exist; did you mean "{project.folder}/configs/style.toml"?'
    )


def test_a_folder_is_not_read_as_a_file(project):
    assert problem(project.folder) == f"{project.folder}: cannot be read (Is a directory)"


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
        ("flux=True", "write true"),
    ],
)
def test_set_with_unquoted_text_shows_the_quotes(override, hint):
    text = refused(override)
    assert text.startswith(f"--set {override.partition('=')[0]}: the value is not TOML (")
    assert text.endswith(f"); {hint}")
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
        '--set adapter.type: missing; expected one of "lora", "full"'
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
