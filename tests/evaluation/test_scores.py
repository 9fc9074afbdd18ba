"""A judge scores the previews of a run: logged, resumed, shown beside what was learned and forgotten."""

import json
import re

import pytest
import tomli_w
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from anima_train.config.load import load_config
from anima_train.config.resolved import config_toml
from anima_train.core.errors import ConfigError
from anima_train.evaluation.strengths_table import strengths_table
from anima_train.reports.evaluations import scores_of
from anima_train.reports.places import shared_config
from anima_train.reports.run import collect_run
from anima_train.training.train import run_training

SAMPLING = {"every_n_steps": 2, "width": 32, "height": 32, "steps": 1, "prompts": ["a", "(b:1.2)"]}


def lines_of(run):
    return [json.loads(line) for line in (run.path / "scores.jsonl").read_text().splitlines()]


def redness(path, words):
    with Image.open(path) as image:
        return sum(image.convert("RGB").tobytes()) + len(words)


def sets_in(folder):
    at = {"resolutions": [96], "directory": [{"path": str(folder)}]}
    return [
        {"name": "new", "config": at, "quantiles": [0.5]},
        {"name": "known", "role": "retention", "config": at, "sigmas": [0.5]},
    ]


def test_scores_are_those_of_the_pictures_logged_shown_and_taken_at_strengths(
    trainer, installed, images_drawer, tmp_path
):
    installed("red")
    others = images_drawer(tmp_path / "others", [(98, 90), (98, 80)])
    run = trainer(
        sampling=SAMPLING | {"judge": "red"}, eval_datasets=sets_in(others), eval_every_n_steps=2, max_steps=2,
        optimizer={"lr": 3e-2}, monitoring={"tensorboard": True}, strengths_after_training=[0.5, 1.0],
    )  # fmt: skip
    lines = lines_of(run)
    assert [line["step"] for line in lines] == [0, 2]
    for line in lines:
        pictures = [run.path / "samples" / f"s{line['step']:06d}_{number:02d}.png" for number in (0, 1)]
        assert line["scores"] == [redness(pictures[0], "a"), redness(pictures[1], "b")]
    shown = EventAccumulator(str(run.path / "anima-train")).Reload().Scalars("score/redness")
    means = [sum(line["scores"]) / 2 for line in lines]
    assert [each.value for each in shown] == pytest.approx(means)

    report = collect_run(run.path)
    gain = report.checkpoints[-1].score
    first, second = (now - base for now, base in zip(lines[1]["scores"], lines[0]["scores"], strict=True))
    assert (gain.value, gain.error) == pytest.approx(((first + second) / 2, abs(first - second) / 2))
    assert report.best["best by score/redness"] == 2  # the lower the better
    page = (run.path / "report.html").read_text()
    assert 'aria-label="redness, above the base against drift from the base, relative"' in page
    assert "<th>redness, above the base</th>" in page
    captions = re.findall(r"<figcaption>step (\d+): (.*?)</figcaption>", page)
    assert [(int(step), float(score)) for step, score in captions] == [
        (line["step"], pytest.approx(line["scores"][number], rel=1e-4)) for number in (0, 1) for line in lines
    ]

    record = json.loads((run.path / "strengths.json").read_text())
    by_strength = {each["strength"]: each["scores"] for each in record["strengths"]}
    assert (by_strength[0.0], by_strength[1.0]) == (lines[0]["scores"], lines[1]["scores"])
    headings, rows = strengths_table(record)
    assert headings[-1] == "redness"
    assert [float(row[-1]) for row in rows[::2]] == pytest.approx(means, rel=1e-3)


def test_a_resumed_run_has_scored_each_preview_once_and_training_does_not_notice(trainer, installed, capfd):
    installed("red", "broken")
    judged = SAMPLING | {"judge": "red"}
    run = trainer("one", sampling=judged, checkpoint_every_n_steps=1, max_steps=2)
    with open(run.path / "scores.jsonl", "a") as file:
        file.write('{"step": 3, "scores"')  # by a process that was killed
    run = trainer("one", sampling=judged, checkpoint_every_n_steps=1, resume=True)
    whole = trainer("two", sampling=judged)
    assert lines_of(run) == lines_of(whole)
    plain = trainer("plain", sampling=SAMPLING | {"judge": "broken"})
    assert plain.losses == whole.losses
    assert not (plain.path / "scores.jsonl").exists()
    assert "the judge broken has failed (OSError: no)" in capfd.readouterr().out


def test_a_judge_that_is_not_there_is_refused_before_anything(
    trainer, installed, clip_folder, tmp_path, monkeypatch, capsys
):
    installed("absent")
    for judge, message in (
        ("taste", r'sampling\.judge: found "taste", expected one of clip, absent; .*pip install PACKAGE'),
        ("clip", r"sampling\.judge: .*write clip:PATH"),
        ("clip:no/such/folder", r"neither a folder nor a name on the Hub"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(trainer.config(sampling=SAMPLING | {"judge": judge}))
    with pytest.raises(ConfigError, match=r"judge absent: .* \(RuntimeError: needs a file\)"):
        trainer(sampling=SAMPLING | {"judge": "absent"})
    assert not (trainer.folder / "runs" / "run" / "metrics.jsonl").exists()

    # A folder beside the configuration is found from the run's own, and in no page.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load_config(trainer.config(sampling=SAMPLING | {"judge": "clip:clip"})).config
    assert config.sampling.judge == f"clip:{clip_folder[0]}"
    (tmp_path / "elsewhere" / "again.toml").write_text(config_toml(config))
    assert load_config(tmp_path / "elsewhere" / "again.toml").config.sampling == config.sampling
    assert 'judge = "clip:clip"' in shared_config(config_toml(config))[0]
    run_training(load_config(tmp_path / "elsewhere" / "again.toml"), dry_run=True)
    assert f"previews are scored by clip:{clip_folder[0]}, each time" in capsys.readouterr().out


def test_scores_of_other_prompts_or_another_judge_are_not_compared():
    logged = {"judge": "j", "higher_is_better": True, "requests": "a", "scores": [1.0, 3.0]}
    lines = [(0, logged), (1, logged | {"judge": "k"}), (2, logged | {"scores": [2.0, 5.0]})]
    scores = scores_of(lines)
    assert (list(scores.means), scores.gains[2].value) == ([0, 2], 1.5)
    assert scores_of([*lines, (3, logged | {"requests": "b"})]).gains == {}
    assert scores_of([(0, {"scores": ["x"]}), (1, {"scores": None}), (2, {})]).means[0].is_known is False
    assert scores_of([]) is None


@pytest.mark.slow
def test_two_processes_score_as_one(trainer, clip_folder):
    sampling = SAMPLING | {"judge": f"clip:{clip_folder[0]}", "prompts": ["a", "b"]}
    one, two = trainer("one", sampling=sampling), trainer.processes(2, "two", sampling=sampling)
    assert [line["step"] for line in lines_of(two)] == [0, 2, 4]
    assert lines_of(two)[0] == lines_of(one)[0]


def test_captions_of_a_file_are_in_the_resolved_configuration(trainer, tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "known.toml").write_text(tomli_w.dumps({"manner": ["ink, a fox", "oil"]}))
    (folder / "kept.toml").write_text(tomli_w.dumps({"manner": ["chalk"]}))
    changes = {
        "eval_datasets": [{"name": "known", "role": "retention", "captions": "known.toml"}],
        "preservation": {"captions": "kept.toml"},
    }
    (folder / "run.toml").write_text(trainer.config(**changes).read_text())
    monkeypatch.chdir(tmp_path)
    loaded = load_config(folder / "run.toml")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.toml").write_text(config_toml(loaded.config))
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = load_config(tmp_path / "elsewhere" / "config.toml")
    assert again.config == loaded.config
    assert [each.drawn for each in again.datasets] == [each.drawn for each in loaded.datasets]
