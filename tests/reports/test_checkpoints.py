"""What a run's page says of its checkpoints: learned against forgotten, the front, and pictures beside each."""

import json
import math
import random
import re

import pytest
from jinja2 import ChoiceLoader, DictLoader
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from anima_train.reports.charts import HEIGHT, PLANE_HEIGHT, PLANE_WIDTH, WIDTH, Dot, named_dots, padded_axis, plane
from anima_train.reports.checkpoints_page import MAX_CHECKPOINTS, chosen, nearest_previews
from anima_train.reports.evaluations import (
    Checkpoint,
    Estimate,
    checkpoints_of,
    evaluations_by_set,
    kept_step,
    on_front,
    scores_of,
)
from anima_train.reports.html import TEMPLATES
from anima_train.reports.run import collect_run, run_facts
from anima_train.reports.run_page import preview_rows, render_run
from anima_train.sampling.generate import Request
from anima_train.sampling.pictures import UsedWeights, png_info
from tests.reports.page import Page

UNKNOWN = Estimate()
KEYS = ("learning", "learning_at_highest_t", "memorization", "forgetting", "forgetting_relative", "drift_relative")


def jsonl(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def drawn(path, prompt):
    """A preview as a run writes it."""
    path.parent.mkdir(exist_ok=True)
    info = png_info(Request(prompt=prompt, width=64, height=32, steps=7), UsedWeights("model"))
    Image.new("RGB", (64, 32)).save(path, pnginfo=info)


def checkpoint(step, **values):
    return Checkpoint(step, **{key: Estimate(values.get(key, math.nan)) for key in KEYS})


def logged(step, **values):
    """A line of evaluations.jsonl, with an error for each of (value, error)."""
    line = {"step": step}
    for key, (value, error) in values.items():
        line |= {f"evaluation/{key}": value, f"evaluation/{key}_stderr": error}
    return line


@pytest.fixture
def run(tmp_path):
    """A run of three roles: at step 20 it learned less than at 10 and forgot more, but most at the highest t."""
    folder = tmp_path / "style"
    folder.mkdir()
    jsonl(
        folder / "metrics.jsonl",
        [{"step": step, "epoch": 0, "examples": step, "loss": 1 / step} for step in range(1, 31)],
    )
    numbers = {  # learning, at the highest t, drift
        0: (0.0, 0.0, 0.0),
        10: (0.04, 0.01, 0.002),
        20: (0.03, 0.05, 0.004),
        30: (0.06, 0.03, 0.008),
    }
    jsonl(
        folder / "evaluations.jsonl",
        [
            line
            for step, (learning, highest, drift) in numbers.items()
            for line in (
                {"step": step, "new/loss": 0.5 - learning},
                logged(
                    step, learning=(learning, 0.01), learning_at_highest_t=(highest, 0.02), memorization=(0.02, 0.005),
                    forgetting=(drift / 2, 0.001), forgetting_relative=(drift, 0.002), drift_relative=(drift, 0.001),
                ),
            )
        ],
    )  # fmt: skip
    for step in (0, 15, 30):
        drawn(folder / "samples" / f"s{step:06d}_00.png", "a cat")
    return folder


def test_no_point_of_the_front_is_surpassed_and_every_other_one_is():
    source = random.Random(0)
    points = [
        checkpoint(step, learning=source.randint(0, 9), drift_relative=source.randint(0, 9)) for step in range(60)
    ]
    points.append(checkpoint(99, learning=100))  # what it forgot is not known
    front = on_front(points, "learning", "drift_relative")

    def surpasses(one, other):
        gains = (one.learning.value, -one.drift_relative.value), (other.learning.value, -other.drift_relative.value)
        return gains[0] != gains[1] and all(a >= b for a, b in zip(*gains, strict=True))

    for point in points[:-1]:
        assert (point.step in front) != any(surpasses(other, point) for other in points[:-1])
    assert 99 not in front
    assert len(front) >= 2


def test_equal_checkpoints_are_on_the_front_together():
    pair = [checkpoint(step, learning=1.0, drift_relative=0.5) for step in (1, 2)]
    assert on_front(pair, "learning", "drift_relative") == {1, 2}


def test_an_error_is_the_larger_one_and_has_two_digits():
    values = {"x": 0.123456, "x_stderr": 0.00123, "x_stderr_kinds": 0.0456, "x_stderr_of_a": 2.0, "x_of_a": 31.4}
    assert Estimate.of(values, "x") == Estimate(0.123456, 0.0456)
    assert Estimate.of(values, "x").text == "0.123 ± 0.046"
    assert Estimate.of(values, "x", "_of_a").text == "31.4 ± 2.0"
    assert [Estimate(-0.0, 0.0).text, Estimate(2.5).text, UNKNOWN.text] == ["0 ± 0", "2.5", ""]
    assert Estimate(1e-12, 1e-13).text == "1e-12 ± 1e-13"
    assert Estimate(123456.0, 321.0).text == "1.2346e+05 ± 321"


def test_points_and_their_errors_are_where_their_numbers_are():
    dots = [Dot(0, 0.0, 0.0, math.nan, math.nan, True, "base"), Dot(5, 2.0, 4.0, 0.5, 1.0, True, "five")]
    page = Page(plane("plane", "cost", "gain", dots))
    x_axis, y_axis = padded_axis([(0.0, 0.0), (2.0, 0.5)], PLANE_WIDTH), padded_axis([(4.0, 1.0)], PLANE_HEIGHT)
    assert (x_axis.low, x_axis.high) == pytest.approx((-0.125, 2.625))
    circles = [(float(each["cx"]), float(each["cy"])) for each in page.all("circle")]
    expected = [(x_axis.place(dot.x), PLANE_HEIGHT - y_axis.place(dot.y)) for dot in dots]
    assert [value for place in circles for value in place] == pytest.approx(
        [value for place in expected for value in place], abs=0.01
    )
    (x, y), (left, right) = expected[1], (x_axis.place(1.5), x_axis.place(2.5))
    low, high = (PLANE_HEIGHT - y_axis.place(value) for value in (3.0, 5.0))
    assert page.all("path", d=f"M{left:.2f} {y:.2f}H{right:.2f}M{x:.2f} {low:.2f}V{high:.2f}")
    assert [group["data-step"] for group in page.all("g")] == ["0", "5"]
    assert "base" in page.text
    assert plane("plane", "cost", "gain", []) == ""


def test_steps_beside_points_do_not_lie_on_each_other():
    dots = [Dot(step, 1.0 + step / 1e4, 1.0, math.nan, math.nan, True, "") for step in range(9)]
    dots.append(Dot(50, 9.0, 9.0, math.nan, math.nan, True, ""))
    axes = [padded_axis([(1.0, 0.0), (9.0, 0.0)], length) for length in (PLANE_WIDTH, PLANE_HEIGHT)]
    assert [dot.step for dot in named_dots(dots, *axes)] == [50, 8]


def test_of_many_checkpoints_those_that_matter_are_shown_and_the_last():
    many = [checkpoint(step, learning=1.0) for step in range(200)]
    found = [each.step for each in chosen(many, {3, 77, 78})]
    assert len(found) == MAX_CHECKPOINTS
    assert found == sorted(found)
    assert {3, 77, 78, 199} <= set(found)
    assert len(chosen(many, set(range(200)))) <= MAX_CHECKPOINTS
    assert chosen(many[:5], set()) == many[:5]


def test_lines_of_one_step_are_one_checkpoint_and_sets_alone_are_none():
    lines = [(4, {"new/loss": 1.0}), (4, {"evaluation/learning": 0.5, "evaluation/learning_stderr": 0.1})]
    (found,) = checkpoints_of(lines)
    assert (found.step, found.learning, found.forgetting) == (4, Estimate(0.5, 0.1), UNKNOWN)
    assert checkpoints_of(lines[:1]) == []
    assert list(evaluations_by_set(lines)) == ["new"]


def test_the_page_shows_what_was_learned_against_what_was_forgotten(run):
    page = Page(render_run(collect_run(run)))
    labels = [svg["aria-label"] for svg in page.all("svg")]
    cost = "drift from the base, relative"
    assert labels[:5] == [
        "learning and forgetting", cost, "memorization", f"learning, mean over t against {cost}",
        f"learning at the highest t against {cost}",
    ]  # fmt: skip
    assert "Equal validation loss is not equal learning in pictures" in page.text
    marked = [group["data-step"] for group in page.all("g") if "marked" in group["class"]]
    assert marked == ["0", "10", "30", "0", "10", "20"]
    assert len(page.all("g")) == 8
    rows = (
        "10 0.040 ± 0.010 0.010 ± 0.020 0.0010 ± 0.0010 0.0020 ± 0.0020 0.0020 ± 0.0010 0.0200 ± 0.0050",
        "best by evaluation/learning: step 30 best by evaluation/learning_at_highest_t: step 20 step learning",
    )
    for words in rows:
        assert words in page.text, words
    assert not re.search(r"\bbest\b(?! by| as such)", page.text)


def test_the_band_is_a_standard_error_to_either_side(run):
    page = Page(render_run(collect_run(run)))
    low, high = (
        -0.03,
        0.08,
    )  # of all lines, errors and zero: the highest t begins with 0 - 0.02, and ends at most at 0.07
    values = [(0.0, 0.01), (0.04, 0.01), (0.03, 0.01), (0.06, 0.01)]
    low, high = -0.02, 0.07  # of the highest t

    def places(sign):
        return [
            f"{WIDTH * step / 3:.2f},{HEIGHT - (value + sign * error - low) / (high - low) * HEIGHT:.2f}"
            for step, (value, error) in enumerate(values)
        ]

    assert " ".join([*places(1), *places(-1)[::-1]]) in [each["points"] for each in page.all("polygon")]


def test_beside_a_checkpoint_are_the_last_previews_until_its_step(run):
    for step in (10, 20):
        drawn(run / "samples" / f"s{step:06d}_01.png", "a dog")
    rows = preview_rows(collect_run(run).previews)
    assert [[(each.prompt, each.step) for each in nearest_previews(rows, step)] for step in (0, 10, 29, 30)] == [
        [("a cat", 0)],
        [("a cat", 0), ("a dog", 10)],
        [("a cat", 15), ("a dog", 20)],
        [("a cat", 30), ("a dog", 20)],
    ]
    strip = render_run(collect_run(run)).partition('<div class="strip">')[2].partition("<h3>Checkpoints")[0]
    found = re.findall(r'data-step="(\d+)"|alt="(a \w+ at step \d+)"', strip)
    assert [step or words for step, words in found] == [
        "0", "a cat at step 0", "10", "a cat at step 0", "a dog at step 10", "20", "a cat at step 15",
        "a dog at step 20", "30", "a cat at step 30", "a dog at step 20",
    ]  # fmt: skip


@pytest.mark.parametrize("lacks", ["learning", "forgetting"])
def test_of_two_roles_what_they_tell_is_shown(run, lacks):
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    gone = ("learning", "memorization") if lacks == "learning" else ("forgetting", "drift")
    kept = [{key: each for key, each in line.items() if not any(word in key for word in gone)} for line in lines]
    jsonl(run / "evaluations.jsonl", kept)
    page = Page(render_run(collect_run(run)))
    assert not [svg for svg in page.all("svg") if "plane" in svg["class"]]
    assert "Learning and forgetting" in page.text
    assert ("Memorization" in page.text) == (lacks == "forgetting")
    assert ("Drift from the base, relative" in page.text) == (lacks == "learning")
    assert ("Equal validation loss" in page.text) == (lacks == "forgetting")


def test_without_a_drift_the_front_is_of_the_loss_on_retention_images(run):
    text = (run / "evaluations.jsonl").read_text().replace("drift_relative", "other")
    (run / "evaluations.jsonl").write_text(text)
    labels = [svg["aria-label"] for svg in Page(render_run(collect_run(run))).all("svg")]
    assert "learning, mean over t against forgetting, relative to the base's loss" in labels


def test_nothing_of_it_is_on_the_page_of_a_run_without_roles(run):
    jsonl(run / "evaluations.jsonl", [{"step": step, "new/loss": 1.0} for step in (0, 10)])
    html = render_run(collect_run(run))
    assert "Learning and forgetting" not in html
    assert 'class="front"' not in html
    assert 'checkpoint"' not in html
    assert run_facts(collect_run(run))["checkpoints"] == []


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"keep_best": "new/loss"}, {"kept: best by new/loss": 30}),
        ({"keep_best": "new/loss", "forgetting_budget": 0.5}, {"kept: best by new/loss within the budget": 20}),
        ({"forgetting_budget": 0.2}, {"kept: the last within the budget": 10}),
        ({"keep_best": "score"}, {"kept: best by score/CLIP": 25}),
        ({"keep_best": "score", "forgetting_budget": 0.5}, {"kept: best by score/CLIP within the budget": 20}),
        ({"keep_best": 7, "forgetting_budget": "x", "eval_datasets": [3]}, {}),
        ({}, {}),
    ],
)
def test_the_checkpoint_that_was_kept_is_named_by_what_it_was_kept_for(config, expected):
    sets = [{"name": "known", "role": "retention"}, {"name": "new"}]
    lines = [(step, {"new/loss": 1 / step, "known/drift_relative": step / 50}) for step in (10, 20, 30)]
    judged = {"judge": "CLIP", "higher_is_better": True, "requests": "r"}
    scored = [(step, {"scores": [score], **judged}) for step, score in ((0, 9.0), (20, 2.0), (25, 3.0), (30, 2.5))]
    assert kept_step(lines, {"eval_datasets": sets, **config}, scores_of(scored)) == expected


def test_a_run_with_every_role_leaves_the_whole_section(trainer, pictures, images_drawer, tmp_path):
    for kind, width in (("artist", 98), ("text", 104)):
        images_drawer(tmp_path / kind, [(width, 90), (width, 80)])

    def held(name, folders, **keys):
        return {"name": name, "config": {"resolutions": [96], "directory": folders}, **keys}

    kinds = [{"path": str(tmp_path / kind), "kind": kind} for kind in ("artist", "text")]
    left = trainer(
        eval_datasets=[
            held("seen", [{"path": str(pictures)}], role="train", quantiles=[0.5]),
            held("new", [{"path": str(tmp_path / "artist")}], quantiles=[0.2, 0.8]),
            held("known", kinds, role="retention", sigmas=[0.5, 0.9]),
        ],
        eval_every_n_steps=2, max_steps=4, optimizer={"lr": 1e-2}, keep_best="evaluation/learning",
        monitoring={"tensorboard": True},
        sampling={"every_n_steps": 2, "width": 32, "height": 32, "steps": 1, "prompts": ["a cat"]},
    )  # fmt: skip
    page = Page((left.path / "report.html").read_text())
    labels = [svg["aria-label"] for svg in page.all("svg")]
    for label in (
        "learning and forgetting", "memorization", "learning at the highest t against drift from the base, relative",
        "difference, drift and cross term on known", "difference from base by kind on known",
        "update relative to the base weights",
    ):  # fmt: skip
        assert label in labels, label
    assert [section["data-step"] for section in page.all("section", **{"class": "checkpoint"})] == ["0", "2", "4"]
    lines = {step: {} for step in (0, 2, 4)}
    for line in left.evaluations:
        lines[line["step"]] |= line
    shown = next(each for each in collect_run(left.path).checkpoints if each.step == 4)
    for name in KEYS:
        errors = [lines[4].get(f"evaluation/{name}_{which}", 0.0) for which in ("stderr", "stderr_kinds")]
        assert getattr(shown, name) == Estimate(lines[4][f"evaluation/{name}"], max(errors)), name
        assert getattr(shown, name).text in page.text
    assert f"mlp {lines[4]['update_norm/mlp']:.5g} {lines[4]['update_norm_relative/mlp']:.5g} " in page.text
    high = lines[4]["new/loss_quantile_0.80"] - lines[0]["new/loss_quantile_0.80"]
    assert shown.learning_at_highest_t.value == pytest.approx(-high)
    events = EventAccumulator(str(next(left.path.rglob("events.out.tfevents*")).parent), {"scalars": 0}).Reload()
    for tag in lines[4].keys() - {"step", "examples"}:
        (last,) = (each.value for each in events.Scalars(tag) if each.step == 4)
        assert last == pytest.approx(lines[4][tag], rel=1e-5), tag
    best = max((2, 4), key=lambda step: lines[step]["evaluation/learning"])
    assert collect_run(left.path).best["kept: best by evaluation/learning"] == best


POINT = """
document.querySelector('.point[data-step="20"]').dispatchEvent(new Event("click"));
"""


def test_a_click_on_a_point_shows_its_previews(run, opened, monkeypatch):
    script = TEMPLATES.loader.get_source(TEMPLATES, "run.js")[0] + POINT
    monkeypatch.setattr(TEMPLATES, "loader", ChoiceLoader([DictLoader({"run.js": script}), TEMPLATES.loader]))
    dom, complaints = opened(render_run(collect_run(run)))
    assert complaints == []
    beside = dom.partition('<div class="beside">')[2].partition('<div class="strip">')[0]
    assert "step 20: learning, mean over t 0.030 ± 0.010; drift from the base, relative 0.0040 ± 0.0010" in beside
    assert 'alt="a cat at step 15"' in beside
    assert dom.count(" chosen") == 2  # in both planes


def test_many_checkpoints_with_long_words_fit_a_telephone_and_a_desktop(run, laid_out):
    words = "x" * 200
    lines = [
        logged(step, learning=(step * 1e-9, 1e-11), learning_at_highest_t=(step, 2.0), drift_relative=(step * 7.0, 3.0))
        for step in range(0, 1_000_000, 25_000)
    ]
    jsonl(run / "evaluations.jsonl", [*lines, {"step": 0, f"{words}/loss": 1.0, f"{words}/drift": 2.0}])
    for step in (0, 500_000):
        Image.new("RGB", (900, 30)).save(run / "samples" / f"s{step:06d}_{words}.png")
        Image.new("RGB", (30, 900)).save(run / "samples" / f"s{step:06d}_tall.png")
    for width, found in laid_out(render_run(collect_run(run))).items():
        assert found["scroll"] == found["width"] == int(width), width
        assert [each for each in found["cut"] if "step" not in each and "drawn" not in each and "on the" not in each
                and "best" not in each] == [], width  # fmt: skip
        assert found["smallest"] > 9, width  # pixels
