"""The waits for the device in an optimizer step, counted on fake CUDA tensors; and a counter that misses none."""

import importlib
import itertools
import sys
from pathlib import Path

import pytest
import torch

from anima_train.training import train as train_module

REPO = Path(__file__).parents[2]
EVENT = "Event.synchronize in transfers.py"

FULL = {"adapter": None}
KAHAN = {"optimizer": {"type": "adamw_optimi", "lr": 1e-4}}
RELEASED = {
    "optimizer": {
        "type": "adamw_optimi", "lr": 1e-4, "gradient_release": True, "moments_device": "cpu", "rounding": "stochastic",
    },
    "gradient_clipping": 0.0,
}  # fmt: skip
HALF_LORA = {"adapter": {"type": "lora", "rank": 4, "dtype": "bfloat16"}}
KINDS = {
    "LoRA, fused": {},
    "LoRA in bfloat16, Kahan": HALF_LORA | KAHAN,
    "full, fused": FULL,
    "full, Kahan": FULL | KAHAN,
}
AVERAGED = {"ema": {"decay": 0.99}, "gradient_clipping": 1.0}
QUICK = [("LoRA, fused", 1, {}), ("full, Kahan", 3, AVERAGED)]
SLOW = [case for case in itertools.product(KINDS, (1, 3), ({}, AVERAGED)) if case not in QUICK]
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
CASES.append(pytest.param("full, released, moments on the host", 1, {}, marks=pytest.mark.slow))
OTHERS = {
    name: HALF_LORA | {"optimizer": {"type": name, "lr": 1e-4}}
    for name in ("adamw8bit", "schedule_free", "lion", "adafactor", "muon")
}
KINDS |= OTHERS | {"full, released, moments on the host": FULL | RELEASED}
CASES += [pytest.param(name, 1, {}, marks=pytest.mark.slow) for name in OTHERS]


@pytest.fixture(scope="module")
def benchmark():
    """The benchmark as a module."""
    sys.path.insert(0, str(REPO / "scripts"))
    yield importlib.import_module("benchmarks.waits")
    sys.path.remove(str(REPO / "scripts"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for the tiny model, which all tests share."""
    return tmp_path_factory.mktemp("waits")


@pytest.mark.parametrize(("kind", "num_micro_batches", "more"), CASES)
def test_an_optimizer_step_waits_once_for_the_step_before(benchmark, folder, kind, num_micro_batches, more):
    first, *others = benchmark.waits_of_steps(benchmark.Case(num_micro_batches, KINDS[kind] | more), folder)
    assert first == []
    for waits in others:
        assert [wait.rpartition(":")[0] for wait in waits] == [EVENT]


@pytest.mark.slow
def test_a_step_that_trains_the_llm_adapter_or_casts_float32_weights_waits_once_too(benchmark, folder):
    tables = [{"llm_adapter_lr": 1e-4}, {"llm_adapter_lr": 0, "transformer_dtype": "float32"}]
    for table in tables:
        model = {"type": "anima", "tiny_path": str(folder / "tiny"), "dtype": "bfloat16", **table}
        found = benchmark.waits_of_steps(benchmark.Case(1, {"model": model}, num_steps=2), folder)
        assert [len(waits) for waits in found] == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["LoRA, fused", "full, Kahan"])
def test_a_step_with_swapped_blocks_waits_once_too(benchmark, folder, kind, monkeypatch):
    monkeypatch.setattr("anima_train.model.block_swap.MAX_BUFFERS", 1)  # the tiny model has two blocks
    found = benchmark.waits_of_steps(benchmark.Case(1, KINDS[kind] | {"blocks_to_swap": 2}, num_steps=2), folder)
    assert [[wait.rpartition(":")[0] for wait in waits] for waits in found] == [[], [EVENT]]


def test_a_value_that_a_step_reads_is_seen_with_its_line(benchmark, folder, monkeypatch):
    real = train_module.compute_loss

    def reading(*arguments):
        losses = real(*arguments)
        assert float(losses.detach().sum()) == 1.0  # what reading a fake tensor gives
        return losses

    monkeypatch.setattr(train_module, "compute_loss", reading)
    found = benchmark.waits_of_steps(benchmark.Case(3, num_steps=2), folder)
    assert [len(waits) for waits in found] == [3, 4]
    assert found[0][0].startswith("aten._local_scalar_dense.default in train.py:")


def test_a_batch_that_is_not_pinned_is_seen(benchmark, folder, monkeypatch):
    monkeypatch.setattr("anima_train.core.tensor_fields.TensorFields.pin_memory", lambda batch: batch)
    found = benchmark.waits_of_steps(benchmark.Case(1, num_steps=1), folder)
    assert len(found[0]) >= 6  # latents, noise, t, text, mask, roles
    assert all("of pageable memory in tensor_fields.py" in wait for wait in found[0])


WAITING = {
    "item": lambda a, h: a[0].item(),
    "float": lambda a, h: float(a[0]),
    "bool": lambda a, h: bool(a[0]),
    "if": lambda a, h: 1 if a.isnan().any() else 2,
    "an index of a list": lambda a, h: [1, 2][int(a[0])],
    "tolist": lambda a, h: a.tolist(),
    "cpu": lambda a, h: a.cpu(),
    "to": lambda a, h: h.to("cuda"),
    "pageable": lambda a, h: h.to("cuda", non_blocking=True),
    "pinned but blocking": lambda a, h: h.pin_memory().to("cuda"),
    "copy_": lambda a, h: a.copy_(h),
    "copy_ to pageable": lambda a, h: torch.empty(3).copy_(a, non_blocking=True),
    "foreach copy": lambda a, h: torch._foreach_copy_([a], [h]),
    "foreach add of a tensor, which torch reads": lambda a, h: torch._foreach_add_([a], a[0]),
    "numbers": lambda a, h: torch.tensor([1, 2], device="cuda"),
    "new_tensor": lambda a, h: a.new_tensor([1.0]),
    "an index of the host": lambda a, h: a[torch.tensor([0, 1])],
    "Event": lambda a, h: torch.Event(a.device).synchronize(),
    "cuda.synchronize": lambda a, h: torch.cuda.synchronize(),
    "accelerator.synchronize": lambda a, h: torch.accelerator.synchronize(),
}
SHAPED = {
    "nonzero": lambda a, h: a.nonzero(),
    "mask": lambda a, h: a[a > 0],
    "masked_select": lambda a, h: a.masked_select(a > 0),
    "repeat_interleave": lambda a, h: a.repeat_interleave(torch.ones_like(a).long()),
    "equal": lambda a, h: torch.equal(a, a),
}
FREE = {
    "pinned": lambda a, h: h.pin_memory().to("cuda", non_blocking=True),
    "a view of pinned": lambda a, h: h.pin_memory()[1:].to("cuda", non_blocking=True),
    "into pinned": lambda a, h: torch.empty(3, pin_memory=True).copy_(a, non_blocking=True),
    "on the device": lambda a, h: a.bfloat16().copy_(a),
    "on the host": lambda a, h: h.double().sum().item(),
    "full": lambda a, h: torch.full((), 3, device="cuda"),
    "masked_fill": lambda a, h: a.masked_fill_(a > 0, 1.0),
    "where": lambda a, h: torch.where(a > 0, a, 0),
    "a number of the host": lambda a, h: a.mul_(torch.tensor(2.0)),
    "Event": lambda a, h: torch.Event(a.device).record(),
}


@pytest.mark.parametrize("operation", WAITING)
def test_each_wait_is_counted_once(benchmark, operation):
    with benchmark.counted_waits() as counter:
        WAITING[operation](torch.ones(3, device="cuda"), torch.ones(3))
    assert len(counter.found) == 1


@pytest.mark.parametrize("operation", SHAPED)
def test_each_result_that_depends_on_values_is_counted_before_it_fails(benchmark, operation):
    with pytest.raises(Exception, match="aten"), benchmark.counted_waits() as counter:
        SHAPED[operation](torch.ones(3, device="cuda"), torch.ones(3))
    assert len(counter.found) == 1


@pytest.mark.parametrize("operation", FREE)
def test_what_waits_for_nothing_is_not_counted(benchmark, operation):
    with benchmark.counted_waits() as counter:
        FREE[operation](torch.ones(3, device="cuda"), torch.ones(3))
    assert counter.found == []


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, FULL | KAHAN | AVERAGED], ids=["LoRA", "full"])
def test_torchs_own_alarm_hears_no_wait_in_a_step(trainer, monkeypatch, changes):
    """It knows reads and copies, not the event that the loop waits for after a step."""
    real = train_module.train_step

    def alarmed(run, state, step, *arguments):
        torch.cuda.set_sync_debug_mode("error" if step.index else "default")  # not while kernels are chosen
        try:
            return real(run, state, step, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(train_module, "train_step", alarmed)
    model = {"dtype": "bfloat16"}
    assert len(trainer(model=model, gradient_accumulation_steps=2, max_steps=5, **changes).metrics) == 5
