"""What is answered without waiting for torch, or for the libraries of the models; and what the first word means."""

import json
import re
import sys
from pathlib import Path

import pytest

import anima_train
from anima_train.cli.main import COMMANDS, is_command, main, train_main

REPO = Path(__file__).parents[2]

# Runs command lines in one process; prints the exit code of each, and what of the second argument was imported.
DRIVER = """
import json, sys
from anima_train.cli.main import main, train_main
codes = []
for program, *words in json.loads(sys.argv[1]):
    libraries = sys.argv[2:]
    before, sys.argv = sys.argv, [program, *words]
    try:
        (main if program == "anima" else train_main)()
        codes.append(0)
    except SystemExit as end:
        codes.append(end.code or 0)
    sys.argv = before
print("RESULT" + json.dumps([codes, [name for name in libraries if name in sys.modules]]))
"""
MODELS = ["transformers", "peft", "diffusers", "datasets", "accelerate"]


@pytest.fixture
def started(command, monkeypatch):
    """Run command lines in a process of their own; returns exit codes, stdout, stderr and the libraries imported."""
    monkeypatch.setenv("PYTHONPATH", str(REPO))

    def run(lines, libraries):
        words = [[str(word) for word in line] for line in lines]
        result = command([sys.executable, "-c", DRIVER, json.dumps(words), *libraries])
        output, _, found = result.stdout.partition("RESULT")
        assert found, result.stderr
        codes, imported = json.loads(found)
        return codes, output, result.stderr, imported

    return run


def test_help_version_and_slips_are_answered_without_torch(started):
    right = [
        ("anima", "--help"), ("anima-train", "--help"), ("anima", "-h"), ("anima-train", "-h"), ("anima", "--version"),
        ("anima-train", "--version"), ("anima", "sample", "--help"), ("anima-train", "sample", "-h"),
        ("anima", "compare", "--help"),
    ]  # fmt: skip
    wrong = [
        ("anima", "trian", "x"), ("anima-train", "chekc", "x"), ("anima-train", "--resum"), ("anima-train",),
        ("anima", "check", "x.toml", "--frobnicate"), ("anima-train", "convert", "x.toml", "out", "--to", "onnx"),
    ]  # fmt: skip
    codes, output, errors, imported = started([*right, *wrong], ["torch", "rich", "numpy", *MODELS])
    assert imported == []
    assert codes == [0] * len(right) + [2] * len(wrong)
    assert output.count(f"anima-train {anima_train.__version__}\n") == 2
    assert output.count("er_sde") == 2
    for text in (
        "No such command 'trian'. Did you mean 'train'", "No such command 'chekc'. Did you mean 'check'",
        "Missing argument 'CONFIG'", "'onnx' is not",
    ):  # fmt: skip
        assert text in errors
    # Versions of Typer and click say it in other words each.
    assert re.search(r"No such option\W+--resum\b.*--resume\b", errors)
    assert re.search(r"No such option\W+--frobnicate\b", errors)
    assert len(errors.splitlines()) == 4 * len(wrong)  # usage, where to find help, an empty line, what is wrong


def test_refused_configs_reference_and_report_do_without_the_libraries_of_the_models(started, trainer, tmp_path):
    config = trainer.config(model={"dtyp": "float32"})
    lines = [("anima-train", config), ("anima", "train", tmp_path / "none.toml")]
    lines += [("anima", command, config) for command in ("check", "cache", "sample")]
    lines += [("anima", "convert", config, "out", "--to", "diffusers"), ("anima", "report", tmp_path)]
    codes, _, errors, imported = started([*lines, ("anima", "reference", tmp_path)], MODELS)
    assert imported == []
    assert codes == [2] * len(lines) + [0]
    assert errors.count("model.dtyp: unknown key; did you mean dtype?") == 5
    assert (tmp_path / "reference.toml").exists()


def test_a_report_does_without_torch(started, trainer):
    run = trainer("run", max_steps=1).path
    (run / "report.html").unlink()
    codes, output, _, imported = started([("anima-train", "report", run)], ["torch", *MODELS])
    assert (codes, imported) == ([0], [])
    assert (run / "report.html").exists()
    assert "page: " in output


@pytest.mark.parametrize("command", [command.__name__ for command in COMMANDS])
def test_anima_train_knows_every_command(command, monkeypatch, capsys):
    helps = []
    for words in (["anima", command, "--help"], ["anima-train", command, "--help"]):
        monkeypatch.setattr("sys.argv", words)
        with pytest.raises(SystemExit) as end:
            (main if words[0] == "anima" else train_main)()
        assert not end.value.code
        helps.append(capsys.readouterr().out)
    assert f"anima-train {command} [OPTIONS]" in helps[1].splitlines()[0]
    assert helps[1].replace("anima-train ", "anima ", 1) == helps[0]


def test_python_m_anima_train_is_anima_train(command, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    result = command([sys.executable, "-m", "anima_train", "report", str(tmp_path)])
    assert result.returncode == 2
    assert "holds no run" in result.stderr
    assert "--dry-run" in command([sys.executable, "-m", "anima_train", "--help"]).stdout


def test_the_first_word_is_a_command_or_else_a_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("check", "trian", "run"):
        (tmp_path / name).touch()
    assert is_command("check")  # although there is a file of this name
    assert is_command("smaple")
    assert not any(map(is_command, ("./check", "check.toml", "smaple.toml", "trian", "run", "styles", "--resume", "")))


@pytest.mark.parametrize(
    "words",
    [
        ["./check", "--dry-run", "--set", "max_steps=7"],
        ["--set", "max_steps=7", "--dry-run", "./check"],
        ["--dry-run", "--set", "max_steps=7", "check"],
        ["train", "--dry-run", "check", "--set", "max_steps=7"],
    ],
)
def test_options_stand_before_or_after_a_config_called_as_a_command(words, trainer, monkeypatch, capsys):
    trainer.config().rename(trainer.folder / "check")
    monkeypatch.chdir(trainer.folder)
    monkeypatch.setattr("sys.argv", ["anima-train", *words])
    with pytest.raises(SystemExit) as end:
        train_main()
    assert not end.value.code
    assert "7 steps in all" in capsys.readouterr().out


def test_resume_with_a_path_stands_before_the_config_too(trainer, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["anima-train", "--resume", "nowhere", str(trainer.config())])
    with pytest.raises(SystemExit) as end:
        train_main()
    assert end.value.code == 2
    assert "nowhere" in capsys.readouterr().err
