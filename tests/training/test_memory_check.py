"""Measuring before a run: the same steps as in training, in time and memory, and nothing left behind."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from anima_train.config.load import load_config
from anima_train.config.model_files import build_model_spec
from anima_train.core.text_batch import TextStates, pad_rows
from anima_train.data.buckets import Size
from anima_train.model.dit import run_block
from anima_train.training import memory_check as measure_module
from anima_train.training import train as train_module
from anima_train.training.build import plan_run
from anima_train.training.costs import Measured
from anima_train.training.memory_check import extremes, measure
from anima_train.training.prepare import scan_all

SMALL, LARGE = (Size(96, 96), 2), (Size(128, 128), 3)
CPU = torch.device("cpu")


@pytest.fixture
def measured(trainer):
    """Measure a config of the trainer's."""

    def run(buckets=(SMALL, LARGE), num_steps=1, folds_zeros=True, **changes):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()  # Accelerate keeps one configuration per process
        config = load_config(trainer.config(**changes), []).config
        return measure(config, build_model_spec(config, CPU), buckets, num_steps, False, folds_zeros)

    return run


@pytest.fixture
def losses_spy(monkeypatch):
    """What the loss is computed on, in training and in measuring: (model, batch) for each time."""
    seen = []
    real = measure_module.compute_loss

    def spy(model, batch, loss):
        seen.append((model, batch))
        return real(model, batch, loss)

    monkeypatch.setattr(measure_module, "compute_loss", spy)
    monkeypatch.setattr(train_module, "compute_loss", spy)
    return seen


def facts(batch):
    """Shapes and dtypes of a batch, without the captions' lengths."""
    tensors = [batch.latents, batch.noise, batch.t]
    text = batch.text
    if not isinstance(text, TextStates):
        return [(tensor.shape, tensor.dtype) for tensor in (*tensors, pad_rows(text.rows))]
    widths = [(part.dtype, part.shape[0], part.shape[2:]) for part in vars(text).values() if part is not None]
    return [(tensor.shape, tensor.dtype) for tensor in tensors] + widths


def files_in(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": {"dtype": "bfloat16"}, "adapter": {"dropout": 0.1}},
        {"model": {"dtype": "bfloat16", "transformer_dtype": "float32"}, "adapter": None},
        {"adapter": None, "model": {"dtype": "bfloat16"}, "optimizer": {"type": "adamw_optimi"}},
        {"model": {"llm_adapter_lr": 1e-4}, "activation_checkpointing": True, "gradient_clipping": 0.0},
    ],
    ids=["lora", "bfloat16", "autocast", "full", "llm_adapter"],
)
def test_every_kind_of_run_is_measured_and_nothing_is_written(measured, trainer, tiny, pictures, changes):
    trainer.config(**changes)
    folders = (trainer.folder, tiny, pictures)
    before = [files_in(folder) for folder in folders]
    found = measured(**changes)
    assert [(each.size, each.batch_size) for each in found] == [SMALL, LARGE]
    assert all(0 < each.seconds_per_step < 60 for each in found)
    assert all(each.peak_bytes > 2**26 for each in found)  # Python with torch alone is larger
    after = [{path: time for path, time in files_in(folder).items() if path.name != "run.toml"} for folder in folders]
    assert after == [{path: time for path, time in files.items() if path.name != "run.toml"} for files in before]


@pytest.mark.parametrize("adapter_lr", [0, 1e-4])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_batches_are_those_of_training(measured, trainer, losses_spy, adapter_lr, dtype):
    changes = {
        "model": {"dtype": dtype, "llm_adapter_lr": adapter_lr}, "micro_batch_size_per_gpu": 2, "max_steps": 6,
        "activation_checkpointing": True,
    }  # fmt: skip
    trainer(**changes)
    trained = {batch.latents.shape: facts(batch) for _, batch in losses_spy}
    square = trained[2, 16, 1, 12, 12]
    losses_spy.clear()
    measured([SMALL], **changes)
    model, batch = losses_spy[-1]
    assert facts(batch) == square
    assert model.training
    assert model.run_block is not run_block  # the blocks are recomputed


def test_the_rows_of_zeros_are_computed_where_the_device_cannot_count_them(measured, losses_spy):
    for folds_zeros in (True, False):
        measured([SMALL], folds_zeros=folds_zeros)
        assert losses_spy[-1][0].folds_zeros == folds_zeros


def test_a_step_has_all_its_micro_batches_and_updates_the_weights(measured, losses_spy, monkeypatch):
    versions, accumulated = [], []

    def spy(step, batch, device):
        seconds = timed(step, batch, device)
        trained = [weight for weight in losses_spy[0][0].parameters() if weight.requires_grad]
        versions.append([weight.detach().clone() for weight in trained])
        return seconds

    def gradients_spy(model, batch, loss):
        accumulated.append(any(weight.grad is not None for weight in model.parameters()))
        return compute_loss(model, batch, loss)

    timed, compute_loss = measure_module.timed, measure_module.compute_loss
    monkeypatch.setattr(measure_module, "timed", spy)
    monkeypatch.setattr(measure_module, "compute_loss", gradients_spy)
    measured(num_steps=2, gradient_accumulation_steps=3)
    sizes = [batch.latents.shape[0] for _, batch in losses_spy]
    assert sizes == [SMALL[1]] * 9 + [LARGE[1]] * 9
    assert accumulated == [False, True, True] * 6
    for earlier, later in itertools.pairwise(versions):
        assert all(not torch.equal(one, other) for one, other in zip(earlier, later, strict=True))


@pytest.mark.parametrize(("seconds", "median"), [([9.0, 1.0], 1.0), ([9.0, 1.0, 2.0, 6.0], 2.0)])
def test_the_first_step_in_which_blocks_are_compiled_is_not_counted(measured, monkeypatch, seconds, median):
    times = iter(seconds)
    monkeypatch.setattr(measure_module, "timed", lambda *_: next(times))
    [found] = measured([SMALL], len(seconds) - 1)
    assert found.seconds_per_step == median


def test_memory_that_runs_out_is_reported_and_the_next_bucket_measured(measured, monkeypatch):
    real = measure_module.compute_loss

    def full(model, batch, loss):
        losses = real(model, batch, loss)
        if batch.size == LARGE[1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses

    monkeypatch.setattr(measure_module, "compute_loss", full)
    small, large, again = measured([SMALL, LARGE, SMALL])
    assert small.seconds_per_step is not None
    assert large.seconds_per_step is None
    assert large.peak_bytes > 0
    assert again.seconds_per_step is not None


def test_weights_that_do_not_fit_are_reported_for_every_bucket(measured, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measure_module, "load_trained", full)
    assert [each.seconds_per_step for each in measured()] == [None, None]


def test_extremes_are_the_cheapest_and_the_dearest_batch(trainer, images_drawer):
    images_drawer(trainer.folder / "wide", [(96, 96), (256, 128)])
    changes = {
        "dataset": {"resolutions": [96, 192], "directory": [{"path": str(trainer.folder / "wide")}]},
        "micro_batch_size_per_gpu": [[96, 9], [192, 1]],
    }
    loaded = load_config(trainer.config(**changes), [])
    plan, _ = plan_run(
        loaded.config, scan_all((loaded.train, *loaded.evals), loaded.config.seed, write=False)["train"].samples, 1
    )
    # Tokens in a batch: nine small images have more than one large one.
    tokens = {
        (sample.size, {96: 9, 192: 1}[sample.resolution]): sample.size.num_tokens * {96: 9, 192: 1}[sample.resolution]
        for sample in plan.samples
    }
    assert len(tokens) == 4
    assert extremes(plan) == [min(tokens, key=tokens.get), max(tokens, key=tokens.get)]
    alone, _ = plan_run(loaded.config, plan.samples[:1], 1)
    assert extremes(alone) == [(plan.samples[0].size, 9)]


@pytest.mark.skipif(sys.platform == "win32", reason="other processes have their peak counted otherwise")
def test_peak_of_the_cpu_is_that_of_the_process(command):
    """In a process of its own: this one's peak may lie far above what it holds."""
    script = (
        "import numpy, torch; from anima_train.training.memory import peak_bytes; cpu = torch.device('cpu')\n"
        "before = peak_bytes(cpu); held = numpy.ones(2**25); print(peak_bytes(cpu) - before)"
    )
    assert int(command([sys.executable, "-c", script]).stdout) == pytest.approx(2**28, rel=0.1)


@pytest.mark.gpu
def test_peak_of_the_gpu_is_the_buckets_own(measured):
    large, small = measured([(Size(256, 256), 8), SMALL], num_steps=2)
    assert isinstance(large, Measured)
    assert small.peak_bytes < large.peak_bytes
    assert small.peak_bytes <= torch.cuda.max_memory_allocated() < large.peak_bytes
