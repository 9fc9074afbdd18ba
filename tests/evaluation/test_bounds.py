"""What a run keeps of its evaluations, and where it ends: by rules on numbers, and in whole runs."""

import contextlib
import json
import math
import shutil
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from anima_train.cli.train import next_steps
from anima_train.config.load import load_config
from anima_train.config.sections import EarlyStopping
from anima_train.core.errors import ConfigError, Interrupted
from anima_train.data.plan import EpochSchedule
from anima_train.evaluation import evaluate as evaluate_module
from anima_train.evaluation import previews as previews_module
from anima_train.evaluation.bounds import Bounds, history_of
from anima_train.reports.run import collect_run
from anima_train.reports.run_page import render_run
from anima_train.run.intervals import Interval
from anima_train.training.build import check_previews


def course(**numbers):
    """A history: each number's values, after steps 0, 10, 20, ..."""
    length = max(map(len, numbers.values()))
    return [
        (10 * index, {name.replace("_", "/", 1): values[index] for name, values in numbers.items()})
        for index in range(length)
    ]


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("held/loss", [9, 3, 2, 2, 4], 20),
        ("held/loss", [1, 3, 2], 20),  # the base is none
        ("held/loss", [9, math.nan, 2], 20),
        ("held/loss", [9, math.nan], None),
        ("evaluation/learning", [0, 1, 3, 2], 20),
    ],
)
def test_the_best_is_the_first_with_the_best_number(metric, values, best):
    history = course(**{metric.replace("/", "_"): values})
    assert Bounds(keep_best=metric).best(history) == best


def test_the_best_stays_within_the_budget_which_is_the_mean_of_the_sets():
    history = course(held_loss=[9, 3, 2, 1], a_drift=[0, 0.1, 0.2, 0.4], b_drift=[0, 0.1, 0.2, 0.2])
    names = ("a/drift", "b/drift")
    assert Bounds("held/loss", None, 0.25, True, names).best(history) == 20
    assert Bounds("held/loss", None, 0.35, True, names).best(history) == 30
    assert Bounds(None, None, 0.25, True, names).best(history) == 20  # the last within
    assert Bounds(None, None, 0.01, True, names).best(history) is None
    assert Bounds(None, None, None, True, names).best(history) is None


def test_the_run_ends_beyond_the_budget_unless_it_is_to_go_on():
    history = course(a_drift=[0, 0.1, 0.3])
    assert Bounds(None, None, 0.2, True, ("a/drift",)).ending(history) == "forgetting_budget: 0.3 is above 0.2"
    assert Bounds(None, None, 0.2, True, ("a/drift",)).ending(history[:2]) is None
    assert Bounds(None, None, 0.2, False, ("a/drift",)).ending(history) is None
    broken = course(a_drift=[0, math.nan])
    assert Bounds(None, None, 0.2, True, ("a/drift",)).ending(broken) is not None
    assert Bounds(None, None, 0.2, True, ("a/drift",)).ending([]) is None
    drawn = [*history, (25, {"score": 1.0, "higher_is_better": True})]  # a step that was not evaluated
    assert Bounds(None, None, 0.2, True, ("a/drift",)).ending(drawn) == "forgetting_budget: 0.3 is above 0.2"


@pytest.mark.parametrize(
    ("values", "patience", "min_change", "ends"),
    [
        ([9, 5, 6, 6], 2, 0.0, True),
        ([9, 5, 6, 4], 2, 0.0, False),
        ([9, 5, 6], 2, 0.0, False),
        ([9, 5, 4.9, 4.8], 2, 0.5, True),
        ([9, 5, 4.9, 4.4], 2, 0.5, False),
        ([9, 5, math.nan, math.nan], 2, 0.0, True),
    ],
)
def test_early_stopping_counts_evaluations_without_a_better_one(values, patience, min_change, ends):
    rule = EarlyStopping(metric="held/loss", patience=patience, min_change=min_change)
    assert (Bounds(early_stopping=rule).ending(course(held_loss=values)) is not None) == ends


@pytest.mark.parametrize(("higher", "best"), [(True, 20), (False, 10)])
def test_the_best_score_is_what_the_judge_says_and_within_the_budget_only_where_that_is_measured(higher, best):
    of_previews = {"judge": "j", "requests": "r", "higher_is_better": higher}
    values = {0: [0.0, 9.0], 10: [1.0, 2.0], 20: [5.0, 2.0], 30: [4.0, 2.0], 40: [math.nan, 9.0]}
    lines = [{"step": step, "scores": scores, **of_previews} for step, scores in values.items()]
    best_of_all = {"step": 35, "scores": [1e3 if higher else -1e3], **of_previews}
    other = [best_of_all | {key: "?"} for key in ("judge", "requests")]
    history = history_of([], [*other, *lines])
    assert Bounds("score").best(history) == best
    assert Bounds("score").best(history_of([], [])) is None
    evaluated = [{"step": step, "a/drift": step / 100} for step in (0, 15, 30)]
    for budget, within in ((0.2, None), (0.3, 30)):
        assert Bounds("score", None, budget, True, ("a/drift",)).best(history_of(evaluated, lines)) == within


def test_a_damaged_line_of_scores_counts_as_none():
    line = {"step": 5, "scores": [1.0, 2.0], "judge": "j", "requests": "r", "higher_is_better": True}
    damaged = [{key: each for key, each in line.items() if key != gone} for gone in line if gone != "step"]
    damaged += [line | {"scores": scores} for scores in ([], None, [None], ["1"], 2.0)]
    assert history_of([], [line, *(each | {"step": 6} for each in damaged)]) == history_of([], [line])
    assert history_of([], damaged) == []


def test_early_stopping_by_a_score_counts_previews_alone():
    lines = [
        {"step": step, "scores": [score], "judge": "j", "requests": "r", "higher_is_better": True}
        for step, score in ((0, 1.0), (20, 3.0), (40, 2.0), (60, 1.0))
    ]
    evaluated = [{"step": step, "held/loss": 1.0} for step in range(0, 80, 5)]
    bounds = Bounds(early_stopping=EarlyStopping(metric="score", patience=2))
    assert bounds.ending(history_of(evaluated[:12], lines[:3])) is None
    ended = "early_stopping: score did not get better in 2 drawings of the previews"
    assert bounds.ending(history_of(evaluated, lines)) == ended


def test_lines_of_one_step_are_one_evaluation():
    lines = [{"step": 4, "a/loss": 1.0}, {"step": 4, "evaluation/learning": 2.0}, {"step": 2, "a/loss": 3.0}]
    assert [step for step, _ in history_of(lines)] == [2, 4]
    assert dict(history_of(lines))[4] == {"step": 4, "a/loss": 1.0, "evaluation/learning": 2.0}


# In runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sets(images_drawer, tmp_path):
    """A retention set of other pictures, and a validation set."""
    for name, width in (("known", 98), ("new", 104)):
        images_drawer(tmp_path / name, [(width, 90), (width, 80)])
    return {
        "eval_datasets": [
            {"name": name, "role": role, "quantiles": [0.5],
             "config": {"resolutions": [96], "directory": [{"path": str(tmp_path / name)}]}}
            for name, role in (("known", "retention"), ("new", "validation"))
        ],
        "eval_every_n_steps": 2,
        "optimizer": {"lr": 1e-2},
        "max_steps": 12,
    }  # fmt: skip


def step_of(path):
    with safe_open(path, "pt") as file:
        return int(file.metadata()["ss_steps"])


def drifts(run):
    return {line["step"]: line["known/drift_relative"] for line in run.evaluations if "known/drift_relative" in line}


def test_a_run_ends_at_its_budget_keeps_what_was_within_and_resumes_exactly(trainer, sets, capsys, tmp_path):
    whole = trainer("whole", **sets)
    found = drifts(whole)
    budget = (found[6] + found[8]) / 2  # it drifts on and on
    assert sorted(found.values()) == list(found.values())
    capsys.readouterr()
    run = trainer("run", **sets, forgetting_budget=budget, checkpoint_every_n_steps=3)
    assert "the run ends after step 8: forgetting_budget: " in capsys.readouterr().out
    assert len(run.losses) == 8
    assert run.losses == whole.losses[:8]
    assert run.manifest["finished"]
    best = run.path / "weights" / "run-best.safetensors"
    assert step_of(best) == 6
    assert step_of(run.path / "weights" / "run.safetensors") == 8
    loaded = load_config(trainer.config(**sets, forgetting_budget=budget))
    assert f"kept by forgetting_budget: {best}" in next_steps(loaded, best.with_name("run.safetensors"), best, [])
    page = render_run(collect_run(run.path))
    assert "not at its end" not in page
    assert f"forgetting_budget: {found[8]:.4g} is above {budget:g}" in page
    assert "<th>kept: the last within the budget</th><td>step 6</td>" in page
    final, kept, losses, evaluations = run.weights, load_file(best), run.losses, run.evaluations

    # As a kill after step 7 leaves it.
    (run.path / "weights" / "run.safetensors").unlink()
    for path in (run.path / "checkpoints").iterdir():
        if path.name > "step-000006":
            shutil.rmtree(path)
    (run.path / "manifest.json").write_text(json.dumps(run.manifest | {"finished": False}))
    again = trainer("run", **sets, forgetting_budget=budget, checkpoint_every_n_steps=3)
    assert again.losses == losses
    assert again.evaluations == evaluations
    assert all(torch.equal(tensor, again.weights[key]) for key, tensor in final.items())
    assert all(torch.equal(tensor, load_file(best)[key]) for key, tensor in kept.items())

    with pytest.raises(ConfigError, match=r"change what ended it \(forgetting_budget: .* above .*\) and use --resume"):
        trainer("run", **sets, forgetting_budget=budget, checkpoint_every_n_steps=3)
    budget = (found[10] + found[12]) / 2  # beyond it only after the last step, where a run ends anyway
    further = trainer("run", resume=True, **sets, forgetting_budget=budget, checkpoint_every_n_steps=3)
    assert further.manifest["ended_by"] is None
    assert further.losses == whole.losses
    assert all(torch.equal(tensor, whole.weights[key]) for key, tensor in further.weights.items())


def test_an_evaluation_that_was_left_to_the_next_process_is_heeded_there(trainer, sets, monkeypatch):
    budget = drifts(trainer("whole", **sets))[2] * 1.01
    real, calls = evaluate_module.predict, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 7:  # the first of the second evaluation, after step 2
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate_module, "predict", interrupted)
        with pytest.raises(Interrupted):
            trainer("run", **sets, forgetting_budget=budget, eval_before_first_step=True)
    run = trainer("run", **sets, forgetting_budget=budget)
    straight = trainer("straight", **sets, forgetting_budget=budget)
    assert run.losses == straight.losses
    assert run.evaluations == straight.evaluations
    for folder in (run.path, straight.path):
        assert step_of(folder / "weights" / f"{folder.name}-best.safetensors") == 2


def test_a_run_may_go_on_beyond_its_budget_and_keep_the_best_within(trainer, sets):
    whole = trainer("whole", **sets)
    budget = drifts(whole)[4] * 1.01
    run = trainer("run", **sets, forgetting_budget=budget, at_budget="go_on", keep_best="new/loss")
    assert run.losses == whole.losses
    losses = {line["step"]: line["new/loss"] for line in run.evaluations if "new/loss" in line}
    assert step_of(run.path / "weights" / "run-best.safetensors") == min((2, 4), key=losses.__getitem__)


@pytest.mark.slow
def test_two_processes_end_together(trainer, sets):
    one = trainer("one", **sets, gradient_accumulation_steps=2)
    budget = (drifts(one)[4] + drifts(one)[6]) / 2
    two = trainer.processes(2, "two", **sets, forgetting_budget=budget)
    assert len(two.losses) == 6
    assert step_of(two.path / "weights" / "two-best.safetensors") == 4


def score_of(run):
    lines = [json.loads(line) for line in (run.path / "scores.jsonl").read_text().splitlines()]
    return {line["step"]: sum(line["scores"]) / len(line["scores"]) for line in lines}


DRAWN = {"every_n_steps": 2, "width": 32, "height": 32, "steps": 1, "prompts": ["a"]}


def test_the_best_by_the_previews_and_the_end_by_them_are_exact_after_resume(trainer, installed, capsys):
    installed("red")
    keys = {
        "sampling": DRAWN | {"judge": "red:-1"}, "keep_best": "score", "max_steps": 20, "optimizer": {"lr": 3e-2},
        "early_stopping": {"metric": "score", "patience": 2}, "checkpoint_every_n_steps": 5, "keep_last": 99,
    }  # fmt: skip
    run = trainer("run", **keys)
    out, scores = capsys.readouterr().out, score_of(run)
    best = run.path / "weights" / "run-best.safetensors"
    lowest = min(scores, key=scores.__getitem__)  # redness: the lower the better
    assert list(scores) == list(range(0, lowest + 5, 2))  # not better two times in a row, for the first time
    why = "early_stopping: score did not get better in 2 drawings of the previews"
    assert f"the run ends after step {lowest + 4}: {why}" in out
    assert "mean over the previews; lower is better" in out
    assert step_of(best) == lowest > 5
    page = (run.path / "report.html").read_text()
    assert f"kept: best by score/redness</th><td>step {lowest}<" in page
    assert page.count("<th>kept: ") == 1

    # As a kill after some step beyond the state of step 5 leaves it.
    final, kept, losses = run.weights, load_file(best), run.losses
    for path in (best, run.path / "weights" / "run.safetensors"):
        path.unlink()
    for path in (run.path / "checkpoints").iterdir():
        if path.name > "step-000005":
            shutil.rmtree(path)
    (run.path / "manifest.json").write_text(json.dumps(run.manifest | {"finished": False}))
    again = trainer("run", **keys)
    assert "resuming after step 5 " in capsys.readouterr().out
    assert again.losses == losses
    assert score_of(again) == scores
    assert all(torch.equal(tensor, again.weights[key]) for key, tensor in final.items())
    assert all(torch.equal(tensor, load_file(best)[key]) for key, tensor in kept.items())


@pytest.mark.slow
def test_a_preview_that_was_left_to_the_next_process_is_heeded_there(trainer, installed, monkeypatch):
    installed("red")
    keys = {"sampling": DRAWN | {"judge": "red"}, "keep_best": "score", "max_steps": 3}
    real, calls = previews_module.generate, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:  # after step 2
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(previews_module, "generate", interrupted)
        with pytest.raises(Interrupted):
            trainer("run", **keys)
    folder = trainer.folder / "runs" / "run"
    assert not (folder / "weights" / "run-best.safetensors").exists()
    run, straight = trainer("run", **keys), trainer("straight", **keys)
    assert score_of(run) == score_of(straight)
    assert step_of(folder / "weights" / "run-best.safetensors") == 2


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [None, "fsdp2"])
def test_two_processes_keep_what_the_one_that_draws_has_scored_and_end_together(trainer, clip_folder, sharding):
    sampling = DRAWN | {"judge": f"clip:{clip_folder[0]}", "prompts": ["a", "b"]}
    stops = {"metric": "score", "patience": 1}
    run = trainer.processes(
        2, "two", sampling=sampling, keep_best="score", early_stopping=stops, max_steps=40, optimizer={"lr": 1e-2},
        sharding=sharding,
    )  # fmt: skip
    scores = score_of(run)
    highest = max(scores, key=scores.__getitem__)  # of CLIP the higher the better
    assert list(scores) == list(range(0, highest + 3, 2))
    assert len(run.losses) == highest + 2 < 40
    assert step_of(run.path / "weights" / "two-best.safetensors") == max(list(scores)[1:], key=scores.__getitem__)


def test_early_stopping_ends_a_run_that_does_not_learn(trainer, sets, capsys):
    rule = {"metric": "new/loss", "patience": 2, "min_change": 10.0}
    run = trainer("run", **sets, early_stopping=rule)
    assert "early_stopping: new/loss did not get better in 2 evaluations" in capsys.readouterr().out
    assert len(run.losses) == 4


NEVER = {"eval_every_n_steps": None}  # again
LATE = {"adapter": None, "eval_before_first_step": False, "eval_every_n_steps": 1}  # a base that is gone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep_best": "new/los"}, 'keep_best: found "new/los", which cannot decide; expected one of evaluation/'),
        ({"keep_best": "new/drift"}, 'keep_best: found "new/drift"'),
        ({"keep_best": "evaluation/memorization"}, 'keep_best: found "evaluation/memorization"'),
        ({"keep_best": "a/loss", "eval_datasets": []}, "there are no eval_datasets that would log it"),
        ({"early_stopping": {"metric": "loss"}}, 'early_stopping: metric: found "loss"'),
        ({"keep_best": "score/taste"}, 'found "score/taste", which cannot decide; expected one of evaluation/'),
        ({"keep_best": "score/taste"}, ', or "score", that of the previews'),
        ({"keep_best": "score"}, 'sampling: keep_best = "score" needs a judge in [sampling]'),
        ({"keep_best": "score", "sampling": DRAWN}, 'such as judge = "clip:PATH"'),
        (
            {"keep_best": "score", "sampling": {"judge": "clip:a/b", "prompts": ["a"]}},
            "needs every_n_steps or every_n_epochs in [sampling]; without, only the base is drawn and scored",
        ),
        ({"early_stopping": {"metric": "score"}}, 'early_stopping: metric: "score" needs a judge in [sampling]'),
        (NEVER | {"keep_best": "new/loss"}, "keep_best: needs evaluations after some steps, which decide; set eval_"),
        (NEVER | {"forgetting_budget": 0.1}, "forgetting_budget: needs evaluations after some steps"),
        (NEVER | {"early_stopping": {"metric": "new/loss"}}, "early_stopping: needs evaluations after some steps"),
        (
            {"keep_best": "evaluation/learning", "eval_before_first_step": False},
            'keep_best: "evaluation/learning" needs eval_before_first_step = true: the base is measured then',
        ),
        (
            {"early_stopping": {"metric": "new/difference_from_base"}, "eval_before_first_step": False},
            'early_stopping: "new/difference_from_base" needs eval_before_first_step = true',
        ),
        ({"strengths_after_training": [0.0]}, "strengths_after_training: holds 0 alone, which is the base"),
        ({"at_budget": "go_on"}, "at_budget: has no effect without forgetting_budget"),
        ({"forgetting_budget": 0.1, "eval_datasets": []}, 'needs a set in eval_datasets with role = "retention"'),
        (
            {"forgetting_budget": 0.1, **LATE},
            "adapter: forgetting_budget needs eval_before_first_step = true in a full",
        ),
        ({"keep_best": "known/drift", **LATE}, "adapter: keep_best needs eval_before_first_step = true"),
        ({"early_stopping": {"metric": "known/drift"}, **LATE}, "early_stopping: metric: needs eval_before_first_step"),
    ],
)
def test_what_cannot_work_is_refused(trainer, sets, change, message):
    with pytest.raises(ConfigError) as refused:
        load_config(trainer.config(**sets | change))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("previews", "evaluation", "message"),
    [
        (Interval(steps=7), Interval(), "the run has 6 steps, and ends before the first previews"),
        (Interval(steps=2), Interval(steps=5), "needs previews and an evaluation after the same step"),
        (Interval(steps=2), Interval(steps=3), None),
        (Interval(epochs=1), Interval(steps=3), None),
        (Interval(steps=2), Interval(examples=5), None),  # not known so early
    ],
)
def test_previews_that_can_decide_nothing_are_refused(previews, evaluation, message):
    intervals, schedule = {"preview": previews, "evaluation": evaluation}, EpochSchedule([0, 3, 6], 6)
    with contextlib.nullcontext() if message is None else pytest.raises(ConfigError, match=message):
        check_previews(intervals, schedule, is_bound=True)
