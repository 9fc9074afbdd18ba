"""The commands, as a person types them."""

import re
import tomllib
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from typer.testing import CliRunner

from anima_train.cli.main import COMMANDS, application, main
from anima_train.config.load import load_config
from anima_train.core.errors import ConfigError
from anima_train.model.tiny import write_tiny

REPO = Path(__file__).parents[2]
PICTURES = REPO / "examples" / "quickstart"


@pytest.fixture
def anima():
    """Run `anima ...`; returns what it printed."""

    def invoke(*arguments):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()  # Accelerate keeps one configuration per process, and a person starts a new one
        result = CliRunner().invoke(application(COMMANDS, "anima"), [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.output

    return invoke


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The quickstart's config, with everything it writes below `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "quickstart").symlink_to(PICTURES)
    return [REPO / "configs" / "quickstart.toml", "--set", 'cache_dir="cache"']


def test_check_reports_buckets_steps_and_groups(anima, config):
    text = anima("check", *config)
    assert "dataset train: 8 images of 8 found" in text
    assert "128x128" in text
    assert "10 steps in the first epoch; 200 steps in all (20 epochs)" in text
    assert "llm_adapter      frozen" in text


def test_dry_run_reports_what_check_begins_with_and_makes_no_run_folder(anima, config, tmp_path):
    text = anima("check", *config, "--no-html")
    free = re.compile(r"of \S+ GiB that are free")  # from one moment to the next
    assert free.sub("", text).startswith(free.sub("", anima("train", *config, "--dry-run")))
    assert "cache: 17 latents, 8 captions" in text
    assert not (tmp_path / "out").exists()


def test_check_writes_a_page_and_no_run_folder(anima, config, tmp_path):
    assert "page with pictures: out/check_quickstart.html" in anima("check", *config)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["check_quickstart.html"]


def test_check_says_why_its_page_cannot_be_written(anima, config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"page\.html cannot be written"):
        anima("check", *config, "--html", tmp_path / "file" / "page.html")
    with pytest.raises(ConfigError, match="exclude each other"):
        anima("check", *config, "--html", tmp_path / "page.html", "--no-html")


def test_check_measures_the_smallest_and_the_largest_bucket(anima, config, tmp_path):
    text = anima("check", *config, "--measure", "2", "--set", "attention='math'", "--set", "max_steps=20")
    assert "\nattention: math, as the configuration says\n" in text
    seconds = [float(number) for number in re.findall(r"measured \d+x\d+, batch 2: (\S+) s a step, \S+ [MG]iB", text)]
    assert re.findall(r"measured (\d+x\d+),", text) == ["128x128", "192x192"]
    assert all(seconds)
    total = float(re.search(r"the whole run: about (\S+) s", text)[1])
    assert 0.9 * min(seconds) * 20 < total < 1.1 * max(seconds) * 20
    assert "Memory and time of a step, measured" in (tmp_path / "out" / "check_quickstart.html").read_text()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["check_quickstart.html"]
    assert "--measure" in anima("check", *config, "--measure", "0")


def test_cache_fills_the_cache_once(anima, config):
    assert "17 latents, 0 masks and 8 texts added" in anima("cache", *config)
    assert "0 latents, 0 masks and 0 texts added" in anima("cache", *config)


def test_tiny_names_its_files(anima, tmp_path):
    lines = anima("tiny", tmp_path, "--seed", "3").splitlines()
    assert len(lines) == 5
    assert all(Path(line).exists() for line in lines)


def test_tiny_model_of_the_quickstart_is_written_when_missing(anima, config, tmp_path):
    anima("check", *config)
    written = {path.relative_to("models/tiny") for path in Path("models/tiny").rglob("*") if path.is_file()}
    write_tiny(tmp_path / "again")
    again = {path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()}
    assert written == again


def test_reference_in_the_repo_is_what_the_command_writes(anima, tmp_path):
    anima("reference", tmp_path)
    written = list(tmp_path.iterdir())
    assert written
    for path in written:
        assert path.read_text() == (REPO / "configs" / path.name).read_text(), path.name


def test_bad_override_exits_with_2_and_a_sentence(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["anima", "check", str(REPO / "configs/quickstart.toml"), "--set", "epochs=often"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "--set epochs: the value is not TOML" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["style_lora", "character_lora", "full_finetune"])
def test_shipped_configs_load_once_the_data_is_there(name, tmp_path, monkeypatch):
    for folder in ("style", "character", "train", "heldout"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert load_config(REPO / "configs" / f"{name}.toml").notes == ()


@pytest.mark.parametrize("name", ["style_lora", "character_lora"])
def test_what_shipped_configs_hold_against_forgetting_loads_where_it_is_switched_on(name, tmp_path, monkeypatch):
    for folder in ("style", "character"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text, _, block = (REPO / "configs" / f"{name}.toml").read_text().partition("# [preservation]\n")
    block = "# [preservation]\n" + block
    (tmp_path / "on.toml").write_text("eval_every_n_steps = 100\n" + text + block.replace("# ", ""))
    loaded = load_config(tmp_path / "on.toml")
    assert loaded.config.preservation.share == 0.2
    assert [dataset.name for dataset in loaded.datasets] == ["train", "known", "preservation"]
    assert loaded.notes == loaded.warnings == ()


def test_shipped_config_without_data_says_which_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r'directory\[0\]\.path: "data/style" does not exist'):
        load_config(REPO / "configs" / "style_lora.toml")


def test_readme_names_every_command_and_config():
    readme = (REPO / "README.md").read_text()
    for command in COMMANDS:
        assert f"anima {command.__name__}" in readme or f"anima-{command.__name__}" in readme
    for path in (REPO / "configs").glob("*.toml"):
        assert path.name in readme
        tomllib.loads(path.read_text())


def test_a_mistake_cannot_command_the_terminal(tmp_path, monkeypatch, capfd):
    name = "a\x1b[2J\u202e\x9b.toml"
    monkeypatch.setattr("sys.argv", ["anima", "train", str(tmp_path / name)])
    with pytest.raises(SystemExit):
        main()
    assert "a\\x1b[2J\\u202e\\x9b.toml: does not exist" in capfd.readouterr().err
