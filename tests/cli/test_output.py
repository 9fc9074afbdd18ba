"""What commands print: for people, for programs, in terminals that cannot show it, and where errors stand."""

import json
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from anima_train.cli import check_report
from anima_train.cli.main import main
from anima_train.cli.output import as_json
from anima_train.cli.train import next_steps
from anima_train.config.load import load_config
from anima_train.core.errors import DataError
from anima_train.distributed.failures import print_error
from anima_train.reports import run as run_reports
from anima_train.reports import run_page
from anima_train.training.ladder import Budget

REPO = Path(__file__).parents[2]
ENCODINGS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "cp1252": {"PYTHONIOENCODING": "cp1252:strict"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.fixture
def anima(monkeypatch, capsys):
    """Run `anima ...` in this process; returns exit code, stdout and stderr."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["anima", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def clean(trainer, images_drawer, tmp_path):
    """A config whose images nothing is wrong with."""
    images = images_drawer(tmp_path / "images", [(96, 96)] * 2)
    return trainer.config(dataset={"directory": [{"path": str(images)}]}), images


@pytest.mark.parametrize(
    "encoding", ["ascii", *(pytest.param(name, marks=pytest.mark.slow) for name in ENCODINGS if name != "ascii")]
)
def test_output_that_cannot_show_a_character_escapes_it_in_lines_and_errors(trainer, encoding, tmp_path):
    name = "k\u00e4tzchen-\u732b-\U0001f431"
    folder = tmp_path / name
    folder.mkdir()
    config = trainer.config(dataset={"directory": [{"path": str(folder)}]}, run_name=name)
    config = config.rename(config.with_name(f"{name}.toml"))
    base = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHON"))}
    environment = {**base, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), **ENCODINGS[encoding]}
    fake = "report.write_report = lambda run, html: ({}, [str(run)])"
    script = f"from anima_train.cli import main, report\n{fake}\nmain.main()"
    commands = [(["report", str(folder)], 0), (["report", "--html"], 2)]
    if encoding != "C":  # where Python cannot name the folder either
        commands.append((["check", str(config)], 3))
    for words, code in commands:
        done = subprocess.run(
            [sys.executable, "-c", script, *words], env=environment, capture_output=True, check=False, cwd=tmp_path
        )
        assert done.returncode == code, done.stderr
        assert b"Traceback" not in done.stderr
        text = (done.stdout + done.stderr).decode("cp1252" if encoding == "cp1252" else "ascii")
        if code != 2:
            assert "\\u732b-\\U0001f431" in text or "\\udce7\\udc8c\\udcab" in text


def test_an_error_begins_a_line_whatever_was_written_before(command, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from tqdm import tqdm\n"
        "from anima_train.cli import main, report\n"
        "from anima_train.core.errors import ConfigError\n"
        "def fail(run, html):\n"
        "    bar = tqdm(total=3, file=sys.stderr)\n"
        "    bar.update()\n"
        "    sys.stderr.write('half a line')\n"
        "    bar.close = lambda: None\n"
        "    raise (ConfigError(['first', 'second']) if str(run) == 'user' else RuntimeError('ours'))\n"
        "report.write_report = fail\n"
        "main.main()\n"
    )
    found = command([sys.executable, str(script), "report", "user"])
    assert (found.returncode, re.findall("(?m)^error.*", found.stderr)) == (2, ["error: first", "error: second"])
    found = command([sys.executable, str(script), "report", "fault"])
    assert (found.returncode, re.findall("(?m)^error.*", found.stderr)) == (1, ["error: RuntimeError: ours"])
    assert "Traceback" in found.stderr


def test_every_mistake_on_the_command_line_is_an_error_line(anima):
    for words in (
        ["chekc"],
        ["check"],
        ["check", "x", "--frobnicate"],
        ["convert", "x", "y", "--to", "kohya"],
        ["sample"],
    ):
        code, out, errors = anima(*words)
        assert (code, out) == (2, "")
        assert len(re.findall("(?m)^error: ", errors)) == 1
    code, _, errors = anima()
    assert code == 2
    assert "Commands" in errors


def test_one_of_several_processes_begins_a_line_of_its_own(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    print_error(DataError("cats/a.png: is gone"))
    assert capsys.readouterr().err == "\nerror (process 1): cats/a.png: is gone\n"


def test_check_as_json_is_one_object_and_nothing_else(anima, trainer, tmp_path):
    code, out, errors = anima("check", trainer.config(), "--json", "--html", tmp_path / "page.html")
    found = json.loads(out)
    assert (code, out.count("\n")) == (0, 1)
    assert (found["steps"], found["run_name"], found["page"]) == (4, "run", str(tmp_path / "page.html"))
    assert found["datasets"]["train"]["images"] == 6
    assert {bucket["size"]: bucket["images"] for bucket in found["buckets"]} == {"64x128": 1, "96x96": 2, "128x64": 3}
    assert sum(row["num_parameters"] for row in found["trained"]) == 20_224
    assert "6 steps in the first epoch" in errors


def test_errors_as_json_are_an_object_too(anima, tmp_path):
    for words in (["check", tmp_path / "none.toml"], ["report", tmp_path]):
        code, out, errors = anima(*words, "--json")
        found = json.loads(out)
        assert code == found["exit_code"] == 2
        assert errors == "".join(f"error: {line}\n" for line in found["errors"])


def test_errors_as_json_have_all_files(anima, trainer, images_drawer, tmp_path):
    images = images_drawer(tmp_path / "images", [(96, 96)] * 23)
    directory = {"path": str(images), "min_image_side": 100, "missing_caption": "empty"}
    config = trainer.config(dataset={"directory": [directory]})
    code, out, errors = anima("check", config, "--json", "--no-html")
    (problem, *_) = json.loads(out)["errors"]
    assert (code, problem.count("is smaller than min_image_side")) == (3, 23)
    assert errors.count("is smaller than min_image_side") == 20


def test_warnings_as_json_stand_once_with_those_of_the_page_and_so_do_notes(anima, trainer, images_drawer, tmp_path):
    images = images_drawer(tmp_path / "images", [(96, 96)] * 3)
    for number in range(2):
        (images / f"stray{number}.txt").write_text("of no image")
    changes = {"warmup_steps": 9, "save_every_n_steps": 500}
    config = trainer.config(dataset={"directory": [{"path": str(images)}]}, **changes)
    found = json.loads(anima("check", config, "--json", "--no-html")[1])
    (stray,) = [line for line in found["warnings"] if "stray0.txt" in line]
    assert stray.startswith("dataset train: ")
    assert any(line.startswith("warmup_steps: 9 is longer") for line in found["warnings"])
    assert any(line.startswith("save_every_n_steps: has no effect") for line in found["notes"])
    assert len({*found["warnings"]}) == len(found["warnings"])


def test_a_caption_that_is_cut_off_is_a_warning_for_strict(anima, clean):
    config, images = clean
    (images / f"{min(images.glob('*.png')).stem}.txt").write_text(", ".join(["tag"] * 600))
    code, _, errors = anima("check", config, "--strict", "-q", "--no-html")
    assert code == 3
    assert re.fullmatch(r"error: dataset train: .* longer than model\.max_caption_tokens .*\n", errors)


def test_memory_that_may_run_out_is_a_warning_for_strict(anima, clean, monkeypatch):
    choose = check_report.choose_here
    monkeypatch.setattr(check_report, "choose_here", lambda *of: choose(*of).chosen_for(Budget(1, "1 byte", "a card")))
    code, _, errors = anima("check", clean[0], "--strict", "-q", "--no-html")
    assert code == 3
    assert re.fullmatch(r"error: memory may run out: about .*, on a card \(a warning.*\)\n", errors)


def test_report_as_json_has_the_numbers_of_the_page(anima, trainer, capsys, monkeypatch):
    run = trainer("run")
    capsys.readouterr()
    collected, collect = [], run_reports.collect_run
    for module in (run_reports, run_page):
        monkeypatch.setattr(module, "collect_run", lambda folder: collected.append(folder) or collect(folder))
    code, out, errors = anima("report", run.path, "--json")
    found = json.loads(out)
    assert (code, errors) == (0, "")
    assert (found["run"], found["steps"], found["planned_steps"], found["finished"]) == ("run", 4, 4, True)
    assert found["last"]["lr"] == pytest.approx(1e-3)
    assert found["page"].endswith("report.html")
    assert collected == [run.path]


def test_what_json_does_not_have(tmp_path):
    assert as_json({1: (float("nan"), tmp_path, [float("-inf")]), "a": {"b": True}}) == {
        "1": [None, str(tmp_path), [None]],
        "a": {"b": True},
    }


def test_strict_makes_warnings_errors_and_quiet_tells_nothing_else(anima, clean):
    config, images = clean
    assert anima("check", config, "--strict", "-q", "--no-html") == (0, "", "")
    (images / "stray.txt").write_text("of no image")
    code, out, _ = anima("check", config, "-q", "--no-html")
    assert code == 0
    assert out.startswith("warning: dataset train: ")
    assert "stray.txt" in out
    assert out.count("\n") == 1
    code, out, errors = anima("check", config, "--strict", "-q", "--no-html")
    assert (code, out) == (3, "")
    assert re.fullmatch(r"error: dataset train: .*stray\.txt.* \(a warning, which --strict makes an error\)\n", errors)


def test_a_quiet_run_tells_nothing(anima, trainer):
    code, out, errors = anima("train", trainer.config(), "--quiet")
    assert (code, out, errors) == (0, "", "")
    assert (trainer.folder / "runs" / "run" / "weights" / "run.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "file", "words"),
    [
        ({}, "style.toml", "sample style.toml --lora w/x.safetensors --prompt '1girl, solo'"),
        ({"adapter": None}, "a b.toml", "sample 'a b.toml' --checkpoint w/x.safetensors --prompt '1girl, solo'"),
        ({"dataset": {"directory": [{"trigger_word": "ohwx style"}]}}, "s.toml", "sample s.toml --lora w/x.safetensors "
         "--prompt 'ohwx style'"),
        ({"sampling": {"every_n_steps": 2, "prompts": ["a"]}}, "s.toml", "sample s.toml --lora w/x.safetensors"),
    ],
)  # fmt: skip
def test_the_end_of_a_run_says_how_to_try_the_weights_and_where_comfyui_wants_them(trainer, changes, file, words):
    if "dataset" in changes:
        directory = {**trainer.base["dataset"]["directory"][0], **changes["dataset"]["directory"][0]}
        changes = {"dataset": {"directory": [directory]}}
    loaded = load_config(trainer.config(**changes))
    lines = next_steps(loaded, Path("w/x.safetensors"), Path(file), [])
    assert lines[:2] == ["weights w/x.safetensors", f"try them: anima {words}"]
    assert lines[2].endswith("ComfyUI/models/diffusion_models" if "adapter" in changes else "ComfyUI/models/loras")
    lines = next_steps(loaded, Path("x"), Path(file), ["max_steps=3", "model.dtype='float32'"])
    assert """--set 'model.dtype='"'"'float32'"'"''""" in lines[1]
    assert "max_steps" not in lines[1]
    read = ["attention='math'", "offline = true", "sampling.prompts=['x']", "model={type='anima'}"]
    lines = next_steps(loaded, Path("x"), Path(file), [*read, "optimizer.lr=1e-3", "modelling.x=1"])
    words = shlex.split(lines[1].removeprefix("try them: "))
    assert [value for flag, value in pairwise(words) if flag == "--set"] == read


def test_the_shell_is_told_how_to_complete(anima, monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # pytest runs in none
    code, out, _ = anima("--show-completion", "bash")
    assert code == 0
    assert "complete_bash" in out


@pytest.mark.parametrize("words", [["check", "x" * 300], ["report", "x" * 300], ["train", "x" * 300 + ".toml"]])
def test_a_name_that_no_disk_takes_is_a_sentence(anima, words):
    code, _, errors = anima(*words)
    assert code == 2
    assert re.search(r"(?m)^error: .*File name too long", errors)


def test_a_name_that_no_disk_takes_is_a_sentence_for_a_state_and_for_pictures(anima, trainer):
    code, _, errors = anima("train", "--resume", "x" * 300, trainer.config())
    assert (code, "File name too long" in errors, "Traceback" in errors) == (2, True, False)
    code, _, errors = anima("sample", trainer.config(), "--prompt", "x", "--out", "x" * 300)
    assert (code, "File name too long" in errors, "Traceback" in errors) == (2, True, False)
