"""The folder of a run: what is written when it is gone."""

import shutil

import pytest

from anima_train.core.errors import SpaceError
from anima_train.evaluation.previews import Previews
from anima_train.run.folder import RunFolder
from anima_train.training import saving, tasks, train

ACTS = {
    "removed": shutil.rmtree,
    "renamed": lambda folder: folder.rename(folder.with_name("other")),
    "another": lambda folder: (folder.rename(folder.with_name("other")), folder.mkdir()),
    "a file": lambda folder: (shutil.rmtree(folder), folder.write_text("")),
}
WRITES = {
    "metrics": (train, "compute_loss"),
    "weights": (saving, "save_weights"),
    "state": (saving, "save_state"),
    "preview": (Previews, "draw"),
    "evaluation": (tasks, "evaluate"),
    "end": (tasks, "seen_facts"),
}
SLOW = [pytest.param(write, "removed", marks=pytest.mark.slow) for write in WRITES if write not in ("metrics", "state")]


@pytest.mark.parametrize("act", ACTS)
def test_a_folder_that_is_gone_is_told_and_not_made_again(tmp_path, act):
    folder = RunFolder(tmp_path, "run")
    folder.open()
    folder.log(folder.metrics_path, {"step": 1})
    ACTS[act](folder.path)
    with pytest.raises(SpaceError, match=r"run: the folder of the run is gone: removed, renamed"):
        folder.log(folder.metrics_path, {"step": 2})
    assert not folder.metrics_path.exists()
    folder.close()


@pytest.mark.parametrize(("write", "act"), [("metrics", "a file"), ("state", "renamed"), *SLOW])
def test_whichever_write_meets_it_the_run_ends_with_a_sentence(trainer, monkeypatch, pictures, write, act):
    held = {"resolutions": [64], "directory": [{"path": str(pictures)}]}
    keys = {
        "save_every_n_steps": 2, "checkpoint_every_n_steps": 2,
        "eval_every_n_steps": 2, "eval_before_first_step": False,
        "eval_datasets": [{"name": "held", "config": held}],
        "sampling": {"every_n_steps": 2, "before_first_step": False, "width": 64, "height": 64, "steps": 2,
                     "prompts": ["red circle"]},
    }  # fmt: skip
    module, name = WRITES[write]
    real, run, calls = getattr(module, name), trainer.folder / "runs" / "run", []

    def call(*arguments, **options):
        calls.append(name)
        if len(calls) == 1:
            ACTS[act](run)
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, call)
    with pytest.raises(SpaceError, match="the folder of the run is gone"):
        trainer("run", **keys)
    assert calls
    assert not (run / "metrics.jsonl").exists()


def test_a_file_of_the_run_that_cannot_be_written_is_a_sentence(tmp_path):
    folder = RunFolder(tmp_path, "run")
    folder.open()
    folder.metrics_path.mkdir()
    with pytest.raises(SpaceError, match=r"metrics\.jsonl: cannot be written \(Is a directory\)"), folder.watched():
        folder.log(folder.metrics_path, {"step": 1})
    folder.close()


def test_the_hash_of_what_was_logged_is_there_without_reading_it(tmp_path, opened):
    first = RunFolder(tmp_path, "first")
    first.open()
    first.start_records(None, 0, ())
    assert first.digests_now() == {}
    for step in range(6):
        first.log(first.metrics_path, {"step": step, "loss": 0.1 * step})
    first.log(first.evaluations_path, {"step": 4, "name": "größer"})
    first.log(first.scores_path, {"step": 4, "scores": [0.5]})
    first.base_path.write_text("{}")
    opened.clear()
    found = first.digests_now()
    assert opened == ["base_evaluations.json"]
    assert found == first.digests(5, ())
    first.close()

    second = RunFolder(tmp_path, "second")
    second.open()
    second.start_records(first.path, 4, ["evaluation", "preview"])
    assert second.digests_now() == first.digests(4, ["evaluation", "preview"])
    assert list(second.lines(second.scores_path)) == []
    second.log(second.metrics_path, {"step": 5, "loss": 0.5})
    second.log(second.evaluations_path, {"step": 4, "name": "größer"})
    second.log(second.scores_path, {"step": 4, "scores": [0.5]})
    assert second.digests_now() == found
    second.close()
