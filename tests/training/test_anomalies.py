"""Numbers that are wrong: skipped updates, named images, and warnings of spikes that do not cry wolf."""

import json
import math
import random
from types import SimpleNamespace

import pytest

from anima_train.core.errors import NumericError
from anima_train.data.buckets import Size
from anima_train.data.plan import MicroBatch, SampleRef, Step
from anima_train.training.anomalies import (
    ENOUGH,
    MAX_NAMED,
    MAX_SKIPPED,
    SPIKE_FACTOR,
    START_FACTOR,
    WINDOW,
    SkippedUpdates,
    SpikeDetector,
    naming,
    replay,
    step_names,
)

INF, NAN = math.inf, math.nan


def ordinary(number, seed, spread=0.7):
    """Steps as (step, loss, gradient norm): two kinds of images, and what t does to a loss."""
    draw = random.Random(seed)
    for step in range(1, number + 1):
        loss = draw.choice([0.1, 0.1, 0.3]) * math.exp(draw.gauss(0, spread))
        yield step, loss, math.sqrt(loss) * math.exp(draw.gauss(0, spread))


def warnings(steps, detector=None):
    """(step, warning) of each warning."""
    detector = detector or SpikeDetector()
    return [(step, text) for step, _, norm in steps if (text := detector.after(step, norm))]


def with_norms(steps, norms):
    """The steps, those of some numbers with other norms."""
    return [(step, loss, norms.get(step, norm)) for step, loss, norm in steps]


# Spikes


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [0.0, 0.1, 0.7])
def test_ordinary_steps_are_no_spikes(seed, spread):
    """Two kinds of images, threefold apart: the deviation of one kind says nothing about the other."""
    assert warnings(ordinary(5000, seed, spread)) == []


@pytest.mark.parametrize("seed", range(3))
def test_high_gradient_is_told_at_once_and_then_not_for_a_window(seed):
    steps = list(ordinary(700, seed, 0.3))
    largest = max(norm for _, _, norm in steps)
    norms = {step: largest * (2 * SPIKE_FACTOR) ** (step - 299) for step in range(300, 310)}
    found = warnings(with_norms(steps, norms | {600: 2 * SPIKE_FACTOR * largest}))
    assert [step for step, _ in found] == [300, 600]
    assert f"the gradient norm is {norms[300]:.3g}, that of the 100 steps before at most" in found[0][1]
    assert "lower the learning rate" in found[0][1]


def test_a_gradient_is_compared_with_the_largest_before_it():
    """The rule itself, on norms whose largest is known."""
    norms = [1.0] * 60 + [5.0] + [1.0] * 39
    for factor, expected in ((1.01, [101]), (0.99, [])):
        steps = [(step, 0.1, norm) for step, norm in enumerate([*norms, 5.0 * factor * SPIKE_FACTOR], 1)]
        assert [step for step, _ in warnings(steps)] == expected


def test_a_gradient_that_stays_high_is_told_once():
    steps = [(step, 0.1, 1.0 if step < 400 else 50.0) for step in range(1, 1000)]
    assert [step for step, _ in warnings(steps)] == [400]


def test_runaway_start_is_told_before_there_is_a_window():
    steps = [(1, 1.0, 1.0), (2, 50.0, 0.9 * START_FACTOR), (3, 60.0, 1.1 * 0.9 * START_FACTOR**2)]
    [(step, text)] = warnings(steps)
    assert step == 3
    assert "of the 2 steps before at most 900" in text


@pytest.mark.parametrize(("num_known", "expected"), [(ENOUGH - 1, []), (ENOUGH, [ENOUGH + 1])])
def test_few_steps_are_not_enough_to_judge_by(num_known, expected):
    steps = [(step, 0.1, 1.0) for step in range(1, num_known + 1)]
    assert [step for step, _ in warnings([*steps, (num_known + 1, 0.1, 2 * SPIKE_FACTOR)])] == expected


def test_steps_that_are_not_finite_are_passed_over():
    steps = list(ordinary(600, 3, 0.3))
    broken = list(steps)
    for step in range(100, 600, 50):
        broken.insert(step, (step, NAN, INF))
    one, other = SpikeDetector(), SpikeDetector()
    assert warnings(steps, one) == warnings(broken, other) == []
    assert one == other


@pytest.mark.parametrize("cut", [0, 1, 20, 299, 300, 301, 350, 405, 699])
def test_a_detector_and_a_count_that_are_fed_again_are_those_of_a_run_that_was_not_stopped(tmp_path, cut):
    steps = with_norms(ordinary(700, 1, 0.3), dict.fromkeys([*range(300, 320), *range(600, 640)], 100.0))
    steps[403:408] = [(step, NAN, NAN) for step, *_ in steps[403:408]]
    whole, counted = SpikeDetector(), SkippedUpdates()
    expected = warnings(steps, whole)
    assert [step for step, _ in expected] == [300, 600]
    path = tmp_path / "metrics.jsonl"
    keys = ("step", "loss", "grad_norm")
    lines = [json.dumps({"epoch": 0, **dict(zip(keys, step, strict=True))}) for step in steps[: cut + 30]]
    path.write_text("\n".join([*lines, '{"step": 9']))  # more than the steps that count, and a line cut off by a kill
    skipped, spikes = replay(path, cut)
    for _, *values in steps[:cut]:
        counted.after(*values)
    assert skipped == counted
    assert (skipped.in_a_row > 0) == (cut == 405)
    assert warnings(steps[cut:], spikes) == [each for each in expected if each[0] > cut]
    assert spikes == whole


def test_run_without_metrics_begins_anew(tmp_path):
    assert replay(tmp_path / "metrics.jsonl", 0) == (SkippedUpdates(), SpikeDetector())


def spikes_of(run):
    return warnings((line["step"], line["loss"], line["grad_norm"]) for line in run.metrics)


def test_absurd_learning_rate_of_a_run_is_told(trainer):
    run = trainer(adapter=None, optimizer={"lr": 1.0}, max_steps=5)
    lines = [json.loads(line) for line in (run.path / "warnings.jsonl").read_text().splitlines()]
    [(step, text)] = spikes_of(run)
    assert step <= 5
    assert {"step": step, "text": text} in lines


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_ordinary_runs_have_no_spikes(trainer, batch_size, seed):
    run = trainer(seed=seed, max_steps=3 * WINDOW, micro_batch_size_per_gpu=batch_size)
    assert len(run.metrics) == 3 * WINDOW
    assert spikes_of(run) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_learning_rate_that_is_raised_until_it_harms_is_told_then(trainer, seed):
    changes = {"seed": seed, "adapter": None, "checkpoint_every_n_steps": WINDOW}
    trainer(**changes, max_steps=WINDOW, optimizer={"lr": 1e-4})
    run = trainer(**changes, max_steps=2 * WINDOW, optimizer={"lr": 1.0}, resume=True)
    (step, _), *more = spikes_of(run)
    assert WINDOW < step <= WINDOW + 16
    assert len(more) <= 1


# Skipped updates


def test_updates_skipped_in_a_row_are_counted_and_end_the_run():
    skipped = SkippedUpdates()
    assert skipped.after(0.1, 1.0) is None
    assert "the gradient is not finite (its norm is inf): update skipped, 1 in a row" in skipped.after(0.1, INF)
    assert "the loss is not finite (it is nan): update skipped, 2 in a row" in skipped.after(NAN, NAN)
    assert skipped.after(0.1, 1.0) is None
    for number in range(1, MAX_SKIPPED + 1):
        skipped.check()
        assert f"{number} in a row" in skipped.after(INF, 1.0)
    with pytest.raises(NumericError, match=f"{MAX_SKIPPED} updates in a row"):
        skipped.check()


def test_step_names_every_image_of_all_micro_batches_once():
    samples = [SimpleNamespace(id=f"0/{letter}.png") for letter in "abcdefghijkl"]

    def micro_batch(*indices):
        return MicroBatch(Size(64, 64), tuple(SampleRef(index, 0) for index in indices))

    step = Step((micro_batch(3, 1), micro_batch(5), micro_batch(1, 0)))
    assert step_names(step, samples) == ["0/d.png", "0/b.png", "0/f.png", "0/a.png"]
    assert naming("wrong", ["a\x1b.png", "b.png"]) == r"wrong; images: a\x1b.png, b.png"
    many = naming("wrong", step_names(Step((micro_batch(*range(12)),)), samples))
    assert f"h.png, ... and {12 - MAX_NAMED} more" in many
    assert "i.png" not in many


def test_run_that_gets_nowhere_ends_and_names_the_images(trainer):
    """A learning rate that makes the weights overflow with the first update."""
    with pytest.raises(NumericError, match=f"{MAX_SKIPPED} updates in a row skipped"):
        trainer(optimizer={"lr": 1e25}, max_steps=30, micro_batch_size_per_gpu=2, gradient_accumulation_steps=2)
    path = trainer.folder / "runs" / "run"
    lines = [json.loads(line) for line in (path / "warnings.jsonl").read_text().splitlines()]
    texts = {line["step"]: line["text"] for line in lines if "skipped" in line["text"]}
    assert list(texts) == list(range(2, 2 + MAX_SKIPPED))
    named = [texts[step].count(".png") for step in (2, 3)]
    assert all(1 < number <= 4 for number in named)
    assert not list((path / "weights").glob("*"))


@pytest.mark.slow
def test_processes_skip_together_and_name_the_images_of_all(trainer):
    run = trainer.processes(2, optimizer={"lr": 1e25}, max_steps=4, micro_batch_size_per_gpu=1)
    assert [math.isfinite(line["loss"]) for line in run.metrics] == [True, False, False, False]
    lines = [json.loads(line)["text"] for line in (run.path / "warnings.jsonl").read_text().splitlines()]
    assert [line.count(".png") for line in lines if "skipped" in line] == [2, 2, 2]
