"""The page that `anima report` writes: its numbers against direct formulas, its text harmless, its form valid."""

import base64
import io
import json
import math
import random
import re
import shutil

import pytest
from jinja2 import ChoiceLoader, DictLoader
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from anima_train.cli.main import COMMANDS, application
from anima_train.core.averages import ExponentialAverage
from anima_train.core.errors import ConfigError
from anima_train.reports.charts import HEIGHT, WIDTH, Axis, Line, chart, line_of, value_axis
from anima_train.reports.html import TEMPLATES
from anima_train.reports.run import MAX_PREVIEWS, MIN_WINDOW, PREVIEW_SIDE, collect_run
from anima_train.reports.run_page import histogram, preview_rows, render_run, write_run_report
from anima_train.reports.series import MAX_POINTS, Series, number
from anima_train.sampling.generate import Request
from anima_train.sampling.pictures import UsedWeights, png_info
from tests.reports.page import Page

HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e\"'&"


def jsonl(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def metric(step, **values):
    """A line of metrics.jsonl."""
    return {"step": step, "epoch": 0, "examples": 2 * step, "loss": 1 / step, **values}


def full_line(step):
    """A line with everything that a run logs."""
    return metric(
        step,
        **{"lr": 1e-4, "lr/mlp": 1e-4 / step, "lr/self_attn": 2e-4, "loss/train": 2.0, "loss/regularization": 3.0},
        grad_norm=0.5 + step, images_per_second=4.0, seconds=step / 2, memory_bytes=step << 28,
        loss_by_t=[[step % 10, 1 / step, 2]],
    )  # fmt: skip


def picture(path, size=(640, 320)):
    path.parent.mkdir(exist_ok=True)
    Image.effect_noise(size, 40).convert("RGB").save(path)


@pytest.fixture
def run(tmp_path):
    """The folder of a run of eight steps that left everything."""
    folder = tmp_path / "runs" / "style"
    folder.mkdir(parents=True)
    jsonl(folder / "metrics.jsonl", map(full_line, range(1, 9)))
    jsonl(
        folder / "evaluations.jsonl",
        [
            {
                "step": step, "examples": 2 * step, "held/loss": 1.5 - step / 16,
                "held/loss_quantile_0.10": 2.5, "held/difference_from_base": -step / 16,
                "held/difference_from_base_stderr": 0.25,
            }
            for step in (0, 4, 8)
        ],
    )  # fmt: skip
    jsonl(folder / "warnings.jsonl", [{"step": 0, "text": "dull data"}] * 2 + [{"step": 3, "text": "no gradient"}])
    samples = {"0/a.png@96": 3, "0/b.png@96": 1, "0/c.png@96": 3}
    (folder / "seen.json").write_text(json.dumps({"samples": samples, "buckets": {"96x96@96": 7}}))
    (folder / "config.toml").write_text('max_steps = 8\n\n[model]\ntype = "anima"\n')
    manifest = {
        "num_steps": 8, "seed": 5, "libraries": {"torch": "2.99"}, "trained": ["mlp", "mod"],
        "model_files": {"vae": {"name": "vae.safetensors", "bytes": 1234, "sha256": "abc"}},
        "groups": [{"component": "mlp", "lr": 1e-4}],
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for step in (0, 4, 8):
        picture(folder / "samples" / f"s{step:06d}_girl.png")
    return folder


def page_of(run):
    return Page(render_run(collect_run(run)))


def anima(*arguments):
    result = CliRunner().invoke(application(COMMANDS, "anima"), [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


# Series


def test_average_is_that_of_the_formula():
    source = random.Random(0)
    values = [source.gauss(3, 1) for _ in range(200)]
    average = ExponentialAverage(0.9)
    assert math.isnan(average.value)
    plain = 0.0  # of the values so far, from zero
    for n, value in enumerate(values, 1):
        average.add(value)
        plain = 0.9 * plain + 0.1 * value
        assert average.value == pytest.approx(plain / (1 - 0.9**n), rel=1e-12)
        weights = [0.9 ** (n - place) for place in range(1, n + 1)]
        direct = sum(map(float.__mul__, weights, values)) / sum(weights)
        assert average.value == pytest.approx(direct, rel=1e-12)


@pytest.mark.parametrize("num_values", [1, 999, 1000, 1001, 25_003])
def test_thinning_keeps_the_extremes_and_the_last_step(num_values):
    source = random.Random(num_values)
    values = [source.gauss(0, 1) for _ in range(num_values)]
    series, average = Series(num_values, 0.98), ExponentialAverage(0.98)
    smooth = []
    for step, value in enumerate(values, 1):
        series.add(step, value)
        average.add(value)
        smooth.append(average.value)
    width = math.ceil(num_values / MAX_POINTS)
    assert len(series.points) == math.ceil(num_values / width) <= MAX_POINTS
    for place, point in enumerate(series.points):
        chunk = values[place * width : (place + 1) * width]
        assert (point.low, point.high) == (min(chunk), max(chunk))
        assert point.step == place * width + len(chunk)
        assert point.smooth == smooth[point.step - 1]
    assert series.points[-1].step == num_values


def test_what_is_no_finite_number_is_a_gap():
    logged = [1.0, math.nan, math.inf, "<b>", None, True, 10**400, [1], 2]
    series = Series(len(logged), 0.5)
    for step, value in enumerate(logged):
        series.add(step, number(value))
    assert [math.isfinite(point.low) for point in series.points] == [True] + [False] * 7 + [True]
    assert (series.num_gaps, series.first_gap) == (7, 1)
    assert series.average.value == pytest.approx((0.5 * 1 + 2) / 1.5)
    page = Page(chart("x", [line_of("loss", series)]))
    assert len(page.all("polyline")) == len(page.all("polygon")) == len(page.all("circle")) == 2
    assert page.all("path", **{"class": "mark"})[0]["d"].count("M") == 7


# Charts


def test_curve_runs_from_corner_to_corner():
    page = Page(chart("x", [Line("y", [(10, 1.0), (20, 3.0), (30, 2.0)], [(10, 1.0, 3.0), (30, 1.0, 1.0)])]))
    assert page.all("polyline")[0]["points"] == f"0.00,{HEIGHT}.00 {WIDTH / 2:.2f},0.00 {WIDTH}.00,{HEIGHT / 2:.2f}"
    assert page.all("polygon")[0]["points"] == (
        f"0.00,0.00 {WIDTH}.00,{HEIGHT}.00 {WIDTH}.00,{HEIGHT}.00 0.00,{HEIGHT}.00"
    )


@pytest.mark.parametrize(
    "values", [[0.0], [5e-324, 0.0], [3e38, -3e38], [1.0, 1.0 + 1e-15], [1e-30] * 3, [-2.0], [1, 2, 3], [1e-60, 1e30]]
)
@pytest.mark.parametrize("from_zero", [False, True])
def test_every_value_is_on_the_axis_and_ticks_are_few(values, from_zero):
    axis = value_axis(map(float, values), from_zero)
    for value in values:
        assert -1e-6 <= axis.place(value) <= HEIGHT * (1 + 1e-9)
    assert len(axis.ticks()) <= 100
    Page(chart("x", [Line("y", list(enumerate(values)))], from_zero))


def test_ticks_are_round():
    assert Axis(0.13, 0.72, 100).ticks() == pytest.approx([0.2, 0.4, 0.6])
    assert Axis(1, 3000, 100).ticks() == [1000, 2000, 3000]
    assert Axis(0.03, 500, 100, is_log=True).ticks() == pytest.approx([0.1, 1, 10, 100])


def test_labels_differ_where_their_values_differ():
    assert [label for _, label in Axis(1.99805, 1.99811, 100).labels()] == [
        "1.99806", "1.99808", "1.9981"
    ]  # fmt: skip
    assert [label for _, label in Axis(-1, 1, 100).labels()] == ["-1", "-0.5", "0", "0.5", "1"]


def test_powers_on_an_axis_are_few():
    ticks = Axis(1e-30, 1e30, 100, is_log=True).ticks()
    assert 4 <= len(ticks) <= 8
    assert ticks == pytest.approx([1e-30 * (ticks[1] / ticks[0]) ** place for place in range(len(ticks))])


def test_a_lone_spike_makes_the_axis_logarithmic():
    axis = value_axis([0.1] * 9 + [100.0], from_zero=False)
    assert axis.is_log
    assert axis.place(math.sqrt(0.1 * 100)) == pytest.approx(HEIGHT / 2)
    assert "logarithmic" in chart("x", [Line("y", [(0, 0.1), (1, 0.1), (2, 100.0)])])
    assert not value_axis([0.1] * 9 + [1.0], from_zero=False).is_log


# Numbers of the report


def test_loss_by_t_is_the_mean_over_samples_of_each_quarter(tmp_path):
    source = random.Random(3)
    lines, losses = [], {}
    for step in range(1, 41):
        entries = [[t, source.random(), source.randint(1, 4)] for t in source.sample(range(10), 3)]
        lines.append(metric(step, loss_by_t=entries))
        quarter = (step - 1) // 10
        for t, mean, num_samples in entries:
            losses.setdefault((quarter, t), []).extend([mean] * num_samples)
    lines[0]["loss_by_t"] += [[0, math.nan, 1], [10, 1.0, 1], [-1, 1.0, 1], [0], "x"]  # none of them counts
    jsonl(tmp_path / "metrics.jsonl", lines)
    report = collect_run(tmp_path)
    rows = []
    for t in range(10):
        for quarter, shares in ((0, report.metrics.first_by_t), (3, report.metrics.last_by_t)):
            expected = losses.get((quarter, t), [])
            assert shares[t].num_samples == len(expected)
            if expected:
                assert shares[t].mean == pytest.approx(sum(expected) / len(expected))
        first, last = (losses.get((quarter, t)) for quarter in (0, 3))
        if first and last:
            rows.append(f"{t / 10:.1f} to {t / 10 + 0.1:.1f} {sum(first) / len(first):.5g} {len(first)} ")
    assert rows
    assert all(row in Page(render_run(report)).text for row in rows)


def test_throughput_is_images_by_the_clock_which_a_resume_sets_back(tmp_path):
    clock = [1.0, 2.0, 6.0, 0.5, 1.0]
    jsonl(tmp_path / "metrics.jsonl", [metric(step, seconds=now) for step, now in enumerate(clock, 1)])
    metrics = collect_run(tmp_path).metrics
    speeds = [(point.step, point.low) for point in metrics.curves["speed"].points]
    assert speeds == [(1, 2.0), (2, 2.0), (3, 0.5), (5, 4.0)]
    assert metrics.seconds == 6 + 1


def test_throughput_of_a_run_without_a_clock_is_what_was_logged(tmp_path):
    jsonl(tmp_path / "metrics.jsonl", [metric(step, images_per_second=5.0 + step) for step in (1, 2)])
    metrics = collect_run(tmp_path).metrics
    assert [point.low for point in metrics.curves["speed"].points] == [6.0, 7.0]
    assert metrics.seconds == 0


def test_half_a_line_at_the_end_is_skipped_and_noted(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "loss": 0.')
    report = collect_run(run)
    assert report.metrics.num_steps == 8
    assert report.metrics.curves["loss"].num_values == 8
    assert any("1 damaged line is skipped, from line 9 on" in note for note in report.notes)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null\n", b"\xff\xfe\n", b"[" * 100_000, b'{"step": "x"}', b'{"step": 1, "loss": {}}', b"7"],
)
def test_files_of_nonsense_are_noted_and_the_rest_is_shown(run, content):
    for name in ("metrics.jsonl", "evaluations.jsonl", "warnings.jsonl", "seen.json", "manifest.json", "config.toml"):
        good = (run / name).read_bytes()
        (run / name).write_bytes(content)
        assert "Overview" in page_of(run).text
        (run / name).write_bytes(good)


def test_long_runs_are_thinned_and_read_line_by_line(tmp_path):
    source = random.Random(1)
    losses = [source.random() for _ in range(20_000)]
    losses[12_345] = 9.0
    jsonl(tmp_path / "metrics.jsonl", (metric(step, loss=loss) for step, loss in enumerate(losses, 1)))
    report = collect_run(tmp_path)
    points = report.metrics.curves["loss"].points
    assert len(points) == MAX_POINTS
    assert max(point.high for point in points) == 9.0
    average = ExponentialAverage(1 - 1 / (20_000 / 50))
    for loss in losses:
        average.add(loss)
    assert points[-1].smooth == average.value
    text = Page(render_run(report)).text
    assert "moving average over about 400 steps (decay 0.9975), bias-corrected" in text
    assert "A point stands for 20 steps" in text


def test_short_runs_are_averaged_over_the_least_window(run):
    average = ExponentialAverage(1 - 1 / MIN_WINDOW)
    for step in range(1, 9):
        average.add(1 / step)
    assert f"loss, averaged, at the end {average.value:.5g}" in page_of(run).text


def test_losses_that_are_not_finite_are_told(run):
    jsonl(run / "metrics.jsonl", [metric(step, loss=math.nan if step == 3 else 1.0) for step in range(1, 9)])
    page = page_of(run)
    assert "1 value is not finite (NaN or infinite), from step 3 on" in page.text
    assert len(page.all("polyline", **{"data-name": "loss"})) >= 2


def test_evaluations_are_shown_with_difference_and_error(run):
    page = page_of(run)
    assert (
        "step loss difference standard error q 0.10 0 1.5 0 0.25 2.5 4 1.25 -0.25 0.25 2.5 8 1 -0.5 0.25" in page.text
    )
    assert "lowest loss on held 1 at step 8" in page.text
    low, high, band = -0.75, 0.25, []
    for step, difference in ((0, 0), (4, -0.25), (8, -0.5)):
        places = [HEIGHT * (high - edge) / (high - low) for edge in (difference + 0.25, difference - 0.25)]
        band.append([f"{WIDTH * step / 8:.2f},{place:.2f}" for place in places])
    corners = [top for top, _ in band] + [bottom for _, bottom in band[::-1]]
    assert " ".join(corners) in [polygon["points"] for polygon in page.all("polygon")]


def test_an_evaluation_shows_its_levels_the_drift_and_the_kinds(run):
    values = {
        "known/loss": 0.5, "known/loss_sigma_0.50": 0.25, "known/loss_sigma_0.90": 0.75, "known/drift": 0.125,
        "known/difference_from_base": 0.1, "known/difference_from_base_stderr": 0.01,
        "known/difference_from_base_stderr_kinds": 0.04, "known/difference_from_base_in_stderr": 2.5,
        "known/difference_from_base_of_text": 0.3, "known/difference_from_base_stderr_of_text": 0.02,
        "known/difference_from_base_in_stderr_of_text": 15.0, "known/difference_from_base_of_an artist_stderr": -0.1,
        "known/drift_relative": 0.2, "known/drift_cross_term": -0.025, "known/loss_of_text": 0.75,
        "known/drift_of_text": 0.5, "known/drift_stderr_of_text": 0.25, "known/loss_of_a/loss": 1.0,
    }  # fmt: skip
    jsonl(run / "evaluations.jsonl", [{"step": 4, **values}, {"step": 4, "evaluation/forgetting": 0.1}])
    text = page_of(run).text
    assert "error drift cross term drift, relative t 0.50 t 0.90 4 0.5 0.1 0.04 0.125 -0.025 0.2 0.25 0.75" in text
    assert (
        "kind, after step 4 loss difference standard error drift standard error "
        "an artist_stderr -0.1 text 0.75 0.3 0.02 0.5 0.25 "
    ) in text
    assert "Evaluation on known " in text
    assert "Evaluation on known/" not in text
    assert "as trained" not in text


def test_an_evaluation_of_a_t_lora_shows_its_loss_as_trained_beside_the_files(run):
    levels = {"known/loss_sigma_0.50": 0.25, "known/loss_as_trained_sigma_0.50": 0.125}
    jsonl(run / "evaluations.jsonl", [{"step": 4, "known/loss": 0.5, "known/loss_as_trained": 0.375, **levels}])
    page = page_of(run)
    assert "step loss loss as trained difference standard error t 0.50 t 0.50, as trained 4 0.5 0.375 0.25 0.125" in (
        page.text
    )
    assert "loss as trained" in page.text.partition("Evaluation on known")[2].partition("Numbers")[0]


def test_everything_a_run_leaves_is_on_the_page(run):
    page = page_of(run)
    for words in (
        "Run style", "images seen 16", "time 4 s, 4 images/s", "memory at most 2.0 GiB",
        "role averaged, at the end regularization 3 train 2",
        "component at most at the end mlp 0.0001 1.25e-05 self_attn 0.0002 0.0002",
        "Warnings of the run: 2 dull data step 3: no gradient",
        "96x96@96 7", "1 times 1 3 times 2", "Seen least sample times 0/b.png@96 1",
        "Seen most sample times 0/c.png@96 3",
        'max_steps = 8 [model] type = "anima"', "seed 5 trained mlp, mod", "torch 2.99",
        "name bytes sha256 vae vae.safetensors 1,234 abc", "component lr mlp 0.0001",
    ):  # fmt: skip
        assert words in page.text, words
    assert "Notes" not in page.text
    labels = [svg["aria-label"] for svg in page.all("svg")]
    assert labels == [
        "loss", "loss, averaged", "loss by role", "loss on held", "difference from base on held", "learning rate",
        "gradient norm", "images per second", "memory in GiB",
    ]  # fmt: skip


def test_a_run_that_was_stopped_is_shown_as_far_as_it_came(run):
    jsonl(run / "metrics.jsonl", map(full_line, range(1, 4)))
    (run / "seen.json").unlink()
    text = page_of(run).text
    assert "3 of 8 steps are done: the run is not at its end" in text
    assert "seen.json is missing; the end of a run writes it" in text
    (run / "metrics.jsonl").unlink()
    assert "No step was logged" in page_of(run).text


def test_seen_counts_of_many_kinds_are_shown_in_ranges():
    assert histogram([3, 3, 5]) == [("3 times", 2), ("5 times", 1)]
    rows = histogram([number for number in range(100, 150) for _ in range(number)])
    assert rows[0] == ("100 to 102 times", 303)
    assert rows[-1] == ("148 to 150 times", 297)
    assert len(rows) <= 20
    assert sum(number for _, number in rows) == sum(range(100, 150))


# Previews


def test_previews_are_small_pictures_in_order(run):
    picture(run / "samples" / "s000002_girl.png", (100, 60))
    for other in ("girl.png", "s000002_girl.jpg", "s12_girl.png"):
        (run / "samples" / other).write_bytes(b"not one of them")
    page = page_of(run)
    assert [figure["data-step"] for figure in page.all("figure")] == ["0", "2", "4", "8"]
    sizes = []
    for image in page.all("img"):
        kind, _, data = image["src"].partition(",")
        assert kind == "data:image/jpeg;base64"
        sizes.append(Image.open(io.BytesIO(base64.b64decode(data))).size)
    whole = (PREVIEW_SIDE, PREVIEW_SIDE // 2)
    assert sizes == [whole, (100, 60), whole, whole]
    assert not any("hidden" in figure for figure in page.all("figure"))


def test_a_damaged_preview_is_noted(run):
    (run / "samples" / "s000005_girl.png").write_bytes(b"nothing")
    page = page_of(run)
    assert "samples/s000005_girl.png cannot be shown: " in page.text
    assert "3 of 4 are shown" in page.text


def test_many_previews_are_thinned_to_the_last(run):
    for step in range(1000, 1000 + MAX_PREVIEWS):
        for name in ("girl", "boy"):
            picture(run / "samples" / f"s{step:06d}_{name}.png", (8, 8))
    report = collect_run(run)
    assert report.num_previews == 2 * MAX_PREVIEWS + 3
    steps = [preview.step for preview in report.previews if preview.name == "girl"]
    assert len(report.previews) <= MAX_PREVIEWS
    assert len(steps) == MAX_PREVIEWS // 2
    assert (steps[0], steps[-1]) == (0, 1000 + MAX_PREVIEWS - 1)


def drawn(path, prompt, **settings):
    """A preview as a run writes it."""
    path.parent.mkdir(exist_ok=True)
    request = Request(prompt=prompt, width=64, height=32, steps=7, **settings)
    Image.new("RGB", (64, 32)).save(path, pnginfo=png_info(request, UsedWeights("model")))


def test_previews_come_with_the_prompt_and_settings_that_they_were_drawn_with(run):
    shutil.rmtree(run / "samples")
    for step in (3, 6):
        drawn(run / "samples" / f"s{step:06d}_00.png", "a cat,\non a mat", seed=11, negative_prompt="a dog")
    drawn(run / "samples" / "s000009_00.png", "a cow", cfg=1)  # changed before a resume
    drawn(run / "samples" / "s000006_01.png", "a hen", cfg=1)
    picture(run / "samples" / "s000006_02.png")  # tells nothing
    rows = [[preview.step for preview in row] for row in preview_rows(collect_run(run).previews)]
    assert rows == [[3, 6], [9], [6], [6]]
    previews = page_of(run).text.partition("A row for each prompt")[2].partition(" Loss ")[0]
    for words in (
        "a cat, on a mat 64x32, seed 11, steps 7, cfg 4, shift 3, er_sde, simple; negative prompt: a dog step 3 step 6",
        "a cow 64x32, seed 0, steps 7, cfg 1, shift 3, er_sde, simple step 9",
        "a hen 64x32", "02 step 6",
    ):  # fmt: skip
        assert words in previews, words


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"prompt": {"a": [1]}, "cfg": "x", "sampler": 3}'])
def test_a_preview_that_tells_nonsense_is_shown(run, text):
    info = PngInfo()
    info.add_text("anima_train", text)
    Image.new("RGB", (8, 8)).save(run / "samples" / "s000009_girl.png", pnginfo=info)
    assert len(page_of(run).all("img")) == 4


def test_warnings_settings_and_previews_come_before_the_curves(run):
    (run / "config.toml").write_text(
        'warmup_steps = 5\n[adapter]\ntype = "lora"\nrank = 24\n[optimizer]\ntype = "lion"\nlr = 3e-4\n'
    )
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["groups"] = [{"component": name, "parameters": number} for name, number in (("mlp", 1200), ("mod", 0))]
    manifest["model_files"]["transformer"] = {"name": "anima.safetensors"}
    manifest["memory"] = {"activation_checkpointing": True, "blocks_to_swap": 7}
    (run / "manifest.json").write_text(json.dumps(manifest))
    text = page_of(run).text
    order = [
        "Warnings of the run: 2", "Overview steps 8",
        "Settings model anima.safetensors trained LoRA, rank 24, alpha 24 parameters 1,200 in mlp learning rate 0.0003",
        "optimizer lion", "chosen by memory activation_checkpointing true, blocks_to_swap 7",
        "Previews", "step 4", "Loss", "Manifest",
    ]  # fmt: skip
    places = [text.index(words) for words in order]
    assert places == sorted(places)


# The page is harmless


@pytest.fixture
def hostile(run):
    """A run whose every name and text is an attack."""
    evil = run.parent / HOSTILE.replace("/", "%")
    run.rename(evil)
    jsonl(evil / "metrics.jsonl", [metric(1, **{f"lr/{HOSTILE}": 1.0, f"loss/{HOSTILE}": 2.0, "grad_norm": HOSTILE})])
    jsonl(evil / "evaluations.jsonl", [{"step": 1, f"{HOSTILE}/loss": 1.0, f"{HOSTILE}/loss_quantile_{HOSTILE}": 1.0}])
    jsonl(evil / "warnings.jsonl", [{"step": 1, "text": HOSTILE}])
    (evil / "seen.json").write_text(json.dumps({"samples": {HOSTILE: 1}, "buckets": {HOSTILE: 1}}))
    (evil / "config.toml").write_text(f"# {HOSTILE}\n")
    manifest = {HOSTILE: HOSTILE, "a": {HOSTILE: {HOSTILE: HOSTILE}}, "b": [{HOSTILE: HOSTILE}], "c": {HOSTILE: 1}}
    (evil / "manifest.json").write_text(json.dumps(manifest))
    picture(evil / "samples" / f"s000001_{HOSTILE.replace('/', '%')}.png")
    return evil


def test_names_and_texts_are_text_and_not_markup(hostile):
    html = render_run(collect_run(hostile))
    page = Page(html)
    assert len(page.all("script")) == html.count("<script") == 1
    assert "alert" not in html.partition("<script>")[2]
    assert all(letter.isprintable() or letter == "\n" for letter in html)
    assert page.text.count("<script>alert(1)</script>\\x1b[31m\\u202e\"'&") >= 15
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]


def test_page_needs_nothing_from_elsewhere(hostile):
    html = render_run(collect_run(hostile))
    assert not re.search(r"https?://|<link|<iframe|@import|url\(|import\(|fetch\(", html, re.IGNORECASE)
    for _, attrs in Page(html).elements:
        assert "href" not in attrs
        assert attrs.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
    assert "default-src 'none'" in Page(html).all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]


def test_same_run_gives_the_same_bytes(run):
    assert write_run_report(run).read_bytes() == write_run_report(run).read_bytes()


# The command


def test_report_writes_a_page_where_it_is_told(run, tmp_path):
    assert anima("report", run) == f"page: {run / 'report.html'}\n"
    anima("report", run, "--html", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes() == (run / "report.html").read_bytes()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be read or written"):
        anima("report", run, "--html", tmp_path / "file" / "page.html")


def test_a_folder_that_is_no_run_is_refused_with_the_nearest_that_is(run, tmp_path):
    shutil.copytree(run, run.parent / "other")
    cases = {
        run.parent / "stile": f"does not exist; did you mean {run}\\?",
        run / "metrics.jsonl": f"is no folder; did you mean {run}\\?",
        run.parent: f"holds no run .*; expected one of {run.parent / 'other'}, {run}$",
        tmp_path / "nowhere" / "run": "does not exist; expected output_dir/run_name",
    }
    for path, problem in cases.items():
        with pytest.raises(ConfigError, match=problem):
            anima("report", path)


# In a browser

MOVE_AND_SLIDE = """
for (const svg of document.querySelectorAll("svg.chart")) {
  const box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2 }));
}
const range = document.querySelector("input[type=range]");
range.value = 1;
range.dispatchEvent(new Event("input"));
"""


def document(body, script):
    """A page with this body and this script as its own."""
    source = (
        f'{{% extends "base.html" %}}{{% set script %}}{script}{{% endset %}}{{% block body %}}{body}{{% endblock %}}'
    )
    return TEMPLATES.from_string(source).render(title="x")


def test_a_script_that_throws_would_be_seen(opened):
    dom, complaints = opened(document("", "document.title = 'ran'; throw new Error('on purpose')"))
    assert "<title>ran</title>" in dom
    assert len(complaints) == 1
    assert "on purpose" in complaints[0]


def test_no_script_but_ours_runs(opened):
    dom, complaints = opened(document("<script>document.title = 'ran'</script>", "'ours'"))
    assert "<title>x</title>" in dom
    assert "Content Security Policy" in complaints[0]


def test_cursor_and_slider_work_without_complaint(run, opened, monkeypatch):
    script = TEMPLATES.loader.get_source(TEMPLATES, "run.js")[0] + MOVE_AND_SLIDE
    monkeypatch.setattr(TEMPLATES, "loader", ChoiceLoader([DictLoader({"run.js": script}), TEMPLATES.loader]))
    norms = [0.1, 0.2, 0.2, 0.4, 0.4, 0.4, 40.0]
    jsonl(run / "metrics.jsonl", [metric(step, grad_norm=norm) for step, norm in enumerate(norms, 1)])
    average = ExponentialAverage(1 - 1 / MIN_WINDOW)
    for norm in norms[:4]:
        average.add(norm)
    html = render_run(collect_run(run))
    dom, complaints = opened(html)
    assert complaints == []
    shown = re.findall(r'<p class="note readout">(.*?)</p>', dom)
    assert len(shown) == html.count("<svg")
    assert "loss: 1.25 at step 4" in shown
    (norm,) = re.findall(r"gradient norm: (\S+) at step 4", " ".join(shown))
    assert "logarithmic" in html
    assert float(norm) == pytest.approx(average.value, rel=2e-3)
    assert "difference: -0.25 at step 4" in shown
    assert "<span>step 4</span>" in dom
    figures = re.findall(r"<figure ([^>]*)>", dom)
    assert ["hidden" in figure for figure in figures] == [True, False, True]


def test_a_hostile_run_does_nothing_in_a_browser(hostile, opened):
    dom, complaints = opened(render_run(collect_run(hostile)))
    assert complaints == []
    assert dom.count("<script") == 1


LONG = "x" * 300


def test_a_run_with_the_longest_names_fits_a_telephone_and_a_desktop(run, laid_out):
    long_run = run.parent / LONG[:200]
    run.rename(long_run)
    words = f"{LONG} مرحبا بالعالم 😀"
    jsonl(long_run / "warnings.jsonl", [{"step": 3, "text": f"{words} {number}"} for number in range(30)])
    values = {f"loss/{LONG}": 0.1, f"lr/{LONG}": 1e-7, "grad_norm": 1e-5, "memory_bytes": 7 << 30, "loss": 1.999}
    jsonl(long_run / "metrics.jsonl", [metric(step, **{**values, "loss": 1.999 + step * 1e-5}) for step in range(1, 9)])
    jsonl(long_run / "evaluations.jsonl", [{"step": step, f"{LONG}/loss": 1e-3 * step} for step in (1, 1_000_000)])
    seen = {"samples": {f"0/{words}{number}@96": number for number in range(30)}, "buckets": {words: 7}}
    (long_run / "seen.json").write_text(json.dumps(seen))
    (long_run / "config.toml").write_text(f'seed = 1\n[optimizer]\ntype = "{words}"\n')
    (long_run / "manifest.json").write_text(json.dumps({LONG: words, "a": {words: {words: words}}}))
    for step in (0, 1_000_000):
        drawn(long_run / "samples" / f"s{step:06d}_00.png", words * 3, negative_prompt=words)
        picture(long_run / "samples" / f"s{step:06d}_{LONG[:200]}.png", (900, 300))
    for width, found in laid_out(render_run(collect_run(long_run))).items():
        assert found["scroll"] == found["width"] == int(width), width
        assert found["cut"] == [], width
        assert found["smallest"] > 9, width  # pixels


def test_what_does_not_fit_would_be_seen(laid_out):
    graph = str(chart("y", [Line("y", [(1, 2.0)])]))
    wide = document(f"<p style='width: 700px'>wide</p><div class='graph'>{graph}</div>", "0")
    assert laid_out(wide, [420])["420"] | {"smallest": 0} == {
        "width": 420, "scroll": 716, "cut": ["wide"], "smallest": 0,
    }  # fmt: skip
