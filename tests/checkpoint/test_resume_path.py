"""What is said where there is nothing to resume, or nothing that is whole."""

import re
import tomllib
from pathlib import Path

import pytest

from anima_train.checkpoint.manifest import StateManifest, entry_of
from anima_train.checkpoint.resume import find_resume_point, resume_from_path
from anima_train.cli.output import quiet
from anima_train.core.errors import ConfigError, ModelFileError


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("out/stlye", r': "out/stlye" does not exist; did you mean "out/style"\? Give'),
        ("style", r': "style" does not exist; did you mean "out/style"\? Give'),
        ("nothing/like/it", r': "nothing/like/it" does not exist \(there is no "nothing"\); give'),
        ("styles", r' styles: there is no training state \(.*\) in it; did you mean "out/style"\? Give'),
        ("img", r" img: there is no training state \(a folder step-\.\.\.\) in it; give"),
    ],
)
def test_a_path_without_a_state_is_answered_with_what_to_give(tmp_path, monkeypatch, path, found):
    monkeypatch.chdir(tmp_path)
    for folder in ("img", "styles", "out/empty/checkpoints", "out/style/checkpoints/step-000003"):
        (tmp_path / folder).mkdir(parents=True)
    wanted = r" a run's folder or \.\.\./checkpoints/step-\.\.\.; states are saved with checkpoint_every_n_steps$"
    with pytest.raises(ConfigError, match=rf"^--resume{found}{wanted}"):
        resume_from_path({"output_dir": "out", "adapter": {"type": "lora"}}, "new", Path(path))


CONFIG = """
output_dir = "out"
run_name = "old"
adapter = {type = "lora", rank = 4}
optimizer = {type = "adamw", lr = 1e-3}
model = {tiny_path = "tiny"}
dataset = {directory = [{path = "img"}]}
"""
RESOLVED = tomllib.loads(CONFIG)


@pytest.fixture
def damaged(tmp_path, monkeypatch):
    """The states of an unfinished run, after steps 9, 10 and 11; what is in the last two is not what was written."""
    monkeypatch.chdir(tmp_path)
    folders = [Path("out/old/checkpoints") / f"step-{step:06d}" for step in (9, 10, 11)]
    for step, folder in enumerate(folders, start=9):
        folder.mkdir(parents=True)
        for name in ("weights", "optimizer"):
            (folder / f"{name}.safetensors").write_text(name)
        files = {path.name: entry_of(path) for path in folder.iterdir()}
        (folder / "state.json").write_text(StateManifest(step=step, optimizer="AdamW", files=files).text())
    for folder in folders[1:]:
        (folder / "weights.safetensors").write_text("weighty")
    Path("out/old/config.toml").write_text(CONFIG)
    return folders


def error_of(function, *arguments):
    with pytest.raises(ModelFileError) as caught:
        function(*arguments)
    (problem,) = caught.value.problems
    return problem


def test_of_a_damaged_state_that_was_asked_for_an_earlier_whole_one_is_named(damaged):
    problem = error_of(resume_from_path, RESOLVED, "new", damaged[2])
    assert problem.startswith(f"{damaged[2]}: damaged: weights.safetensors has other content")
    assert problem.endswith(f"; an earlier state is whole: --resume {damaged[0]}")


@pytest.mark.parametrize(
    ("kind", "table", "key"), [("lora", "adapter", "init_from_existing"), ("full", "model", "transformer_path")]
)
@pytest.mark.parametrize("newest", ["old-s000008", "old"])
def test_where_no_state_is_whole_the_weights_that_were_saved_are_the_way_on(damaged, kind, table, key, newest):
    (damaged[0] / "state.json").unlink()
    weights = Path("out/old/weights")
    weights.mkdir()
    for name in ("old-s000004", "old-s000008", "other", newest):
        (weights / f"{name}.safetensors").write_text("")
    config = CONFIG if kind == "lora" else CONFIG.replace('{type = "lora", rank = 4}', '{type = "full"}')
    Path("out/old/config.toml").write_text(config)
    resolved = tomllib.loads(config)
    Path("out/old/manifest.json").write_text('{"finished": false}')
    first, *states, way, line = error_of(find_resume_point, resolved, "old", True, None).split("\n  ")
    assert first == "out/old: cannot resume, as no training state is whole:"
    assert [re.match(r".*step-0+(\d+): damaged: ", state)[1] for state in states] == ["11", "10", "9"]
    assert way == (
        f"remove the run's folder, or start another run, of another run_name, from these weights; write in [{table}]:"
    )
    assert tomllib.loads(line) == {key: f"out/old/weights/{newest}.safetensors"}
    ways = f"\n  start {way.partition(' start ')[2]}\n  {line}"
    for path, which in ((Path("out/old"), "no"), (damaged[1], "no earlier")):
        problem = error_of(resume_from_path, resolved, "new", path)
        assert problem.startswith(f"out/old: cannot resume, as {which} training state is whole:\n  {damaged[1].parent}")
        assert problem.endswith(ways)


def test_where_there_are_no_weights_either_that_is_said(damaged):
    for folder in damaged:
        (folder / "optimizer.safetensors").unlink()
    *_, way = error_of(find_resume_point, RESOLVED, "old", False, None).split("\n  ")
    assert way.startswith("remove the run's folder, or start another run, of another run_name; this one has no saved")


@pytest.mark.parametrize(("content", "fault"), [(None, "missing"), ("", "damaged")])
def test_a_manifest_that_is_not_whole_is_a_warning_even_where_little_is_told(damaged, caplog, content, fault):
    manifest = Path("out/old/manifest.json")
    if content is not None:
        manifest.write_text(content)
    with quiet(wanted=True):
        point = find_resume_point(RESOLVED, "old", True, None)
    assert point.saved.folder == damaged[0]
    assert caplog.messages[-1] == f"{manifest}: {fault}; it is written anew"
    assert not any("anew" in note for note in point.notes)
