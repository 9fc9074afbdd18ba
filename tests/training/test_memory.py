"""Memory: the largest micro-batch is tried first and leaves no trace; too little of it is one message, in order."""

import re
import sys
import tomllib
from typing import get_args

import pytest
import torch
from torch import nn

from anima_train.core.device import is_out_of_memory
from anima_train.core.errors import SpaceError
from anima_train.data.buckets import Size
from anima_train.optim.optimizers import AdamWKahan, AnyOptimizer
from anima_train.training import ladder as ladder_module
from anima_train.training import train as train_module
from anima_train.training.memory import MemoryContext, MicroBatchShape, asked_bytes, memory_errors
from anima_train.training.memory_check import state_like

CPU = torch.device("cpu")
SHAPE = MicroBatchShape(1024, Size(1152, 896), 4)

# Imports all, then lets the process take this many MiB more: what the system refuses is a real failure.
LIMITED = """
import re, resource, sys
import anima_train.reports.run_page, anima_train.training.train, peft
from anima_train.cli.main import train_main
size = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv.pop()) * 2**20,) * 2)
train_main()
"""


def said(fail, doing="step 7", suggestions=("one", "two")):
    """The message about memory that runs out in a function."""
    with pytest.raises(SpaceError) as caught, memory_errors(CPU, MemoryContext(doing, SHAPE), lambda _: suggestions):
        fail()
    assert caught.value.exit_code == 6
    return str(caught.value)


# The message


def test_message_says_what_was_done_what_it_needs_and_what_to_change_in_order():
    text = said(lambda: torch.empty(2**50, dtype=torch.int8))  # a petabyte: the CPU's allocator refuses
    start = r"out of memory in step 7, with 4 images of 1152x896 at once. Needed: more than 104857\d\.\d GiB"
    assert re.match(start, text)  # and what was in use
    assert re.search(r"in use at most until then, 1048576.0 GiB more asked for\); the computer has \d+\.\d GiB", text)
    assert text.endswith("What to change, in order of least cost:\n  1. one\n  2. two")


def test_memory_that_python_cannot_have_is_told_too():
    text = said(lambda: bytearray(2**60))
    assert "Needed: " in text
    assert "asked for" not in text


def test_savings_are_those_of_the_shape_at_that_time():
    attempt = MemoryContext("a trial", SHAPE)

    def later():
        attempt.doing, attempt.shape = "step 3", MicroBatchShape(64, Size(64, 64), 1)
        torch.empty(2**50)

    with pytest.raises(SpaceError) as caught, memory_errors(CPU, attempt, lambda shape: [f"not {shape.resolution}"]):
        later()
    text = str(caught.value)
    assert text.startswith("out of memory in step 3, with 1 image of 64x64 at once.")
    assert text.endswith("\n  1. not 64")


@pytest.mark.parametrize("fail", [lambda: torch.ones(2) @ torch.ones(3), lambda: [][1]])
def test_other_errors_stay_what_they_are(fail):
    with pytest.raises((RuntimeError, IndexError)), memory_errors(CPU, MemoryContext("step 7", SHAPE), lambda _: []):
        fail()


@pytest.mark.parametrize(
    ("message", "num_bytes"),
    [
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.6 GiB", 2.5 * 2**30),
        ("XPU out of memory. Tried to allocate 20.00 MiB", 20 * 2**20),
        ("MPS backend out of memory (MPS allocated: 9 GB). Tried to allocate 512 bytes on private pool.", 512),
        ("DefaultCPUAllocator: not enough memory: you tried to allocate 4096 bytes.", 4096),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", None),
    ],
)
def test_messages_of_all_devices_are_known(message, num_bytes):
    assert is_out_of_memory(RuntimeError(message))
    assert asked_bytes(message) == num_bytes


# The trial


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": {"dropout": 0.3}, "gradient_accumulation_steps": 2},
        pytest.param(
            {"adapter": None, "model": {"dtype": "bfloat16"}, "optimizer": {"type": "adamw_optimi"}},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["lora", "full"],
)
def test_trial_changes_nothing(trainer, pictures, monkeypatch, changes):
    held = {"resolutions": [96], "num_ar_buckets": 3, "directory": [{"path": str(pictures)}]}
    changes = {**changes, "eval_datasets": [{"name": "held", "config": held}], "max_steps": 2}
    tried = trainer("tried", **changes)
    monkeypatch.setattr(ladder_module, "try_shape", lambda *_: None)
    other = trainer("other", **changes)
    assert tried.losses == other.losses
    assert [line["grad_norm"] for line in tried.metrics] == [line["grad_norm"] for line in other.metrics]
    assert tried.evaluations == other.evaluations
    assert all(torch.equal(tensor, other.weights[name]) for name, tensor in tried.weights.items())


@pytest.fixture
def shapes_spy(monkeypatch):
    """Shapes that were tried, what they left, and those that were then trained: ("tried" or "trained", shape)."""
    seen = []
    real = {"try_shape": ladder_module.try_shape, "compute_loss": train_module.compute_loss}

    def try_shape(shape, *rest):
        real["try_shape"](shape, *rest)
        model, optimizer, *_ = rest
        assert all(parameter.grad is None for group in optimizer.param_groups for parameter in group["params"])
        assert model.training
        seen.append(("tried", shape.batch_size * shape.size.num_tokens))

    def compute_loss(model, batch, loss):
        places = batch.latents[:, 0, 0].numel()
        seen.append(("trained", places // 4))
        return real["compute_loss"](model, batch, loss)

    monkeypatch.setattr(ladder_module, "try_shape", try_shape)
    monkeypatch.setattr(train_module, "compute_loss", compute_loss)
    return seen


def test_largest_micro_batch_of_the_run_is_tried_first(trainer, images_drawer, tmp_path, shapes_spy):
    """Not that of the largest images, and no batch that the few images of a bucket never fill."""
    folder = images_drawer(tmp_path / "images", [(96, 96)] * 5 + [(160, 160)])
    held = images_drawer(tmp_path / "held", [(112, 112)] * 3)
    trainer(
        dataset={"resolutions": [96, 160], "directory": [{"path": str(folder), "num_repeats": 1.5}]},
        micro_batch_size_per_gpu=[[96, 12], [160, 2]], epochs=2, max_steps=None, eval_micro_batch_size_per_gpu=2,
        eval_datasets=[
            {"name": "held", "config": {"resolutions": [112], "directory": [{"path": str(held)}]}}
        ],
    )  # fmt: skip
    tried = [tokens for kind, tokens in shapes_spy if kind == "tried"]
    trained = [tokens for kind, tokens in shapes_spy if kind == "trained"]
    assert [kind for kind, _ in shapes_spy[:2]] == ["tried", "tried"]
    assert len(set(trained)) > 1
    assert tried == [max(trained), 2 * 49]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", get_args(get_args(AnyOptimizer)[0]))
def test_optimizer_state_takes_its_memory_and_the_weights_stay(kind, dtype):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((5, 7), (3,), (4, 2))]
    before = [parameter.detach().clone() for parameter in parameters]
    names = [["a", "b"], ["c"]]
    groups = [
        {"params": parameters[:2], "names": names[0], "lr": 0.1, "weight_decay": 0.1},
        {"params": parameters[2:], "names": names[1], "lr": 0.2, "weight_decay": 0.0},
    ]
    settings = kind(lr=0.1, **({"moments_dtype": "bfloat16"} if kind is AdamWKahan else {}))
    held = state_like(settings, parameters, CPU)
    assert all(parameter.grad is None for parameter in parameters)
    assert all(torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True))

    optimizer = settings.build(groups)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    real = [value for parameter in parameters for value in optimizer.state[parameter].values()]
    assert [(tensor.shape, tensor.dtype) for tensor in held] == [(tensor.shape, tensor.dtype) for tensor in real]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit a process's memory")
def test_run_that_cannot_fit_ends_before_its_first_step(trainer, images_drawer, command, tmp_path):
    folder = images_drawer(tmp_path / "images", [(256, 256)] * 2)
    dataset = {"resolutions": [256], "directory": [{"path": str(folder), "num_repeats": 32}]}
    trainer("cached", dataset=dataset, max_steps=1)
    config = trainer.config("big", dataset=dataset, micro_batch_size_per_gpu=64, activation_checkpointing=False)
    assert tomllib.loads(config.read_text())["micro_batch_size_per_gpu"] == 64
    result = command([sys.executable, "-c", LIMITED, str(config), "250"])
    assert result.returncode == 6, result.stderr
    assert "Traceback" not in result.stderr
    error = result.stderr[result.stderr.index("error: ") :]
    assert error.startswith("error: out of memory in a trial before the first step, with 64 images of 256x256 at once.")
    assert "(ulimit -v). What to change, in order of least cost:\n" in error
    selective, *others = [f"activation_checkpointing = {policy}" for policy in ('"selective"', "true", '"offload"')]
    policies = [selective, "checkpointed_blocks = 8 or more", *others]
    keys = ["model.dtype", "micro_batch_size_per_gpu", *policies, "a resolution below 256"]
    assert [line.split(". ")[1][: len(key)] for line, key in zip(error.splitlines()[1:], keys, strict=True)] == keys
    assert not (trainer.folder / "runs" / "big" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit a process's memory")
def test_a_cache_that_cannot_be_filled_says_what_to_change(trainer, images_drawer, command, tmp_path):
    folder = images_drawer(tmp_path / "images", [(1024, 1024)] * 8)
    dataset = {"resolutions": [1024], "directory": [{"path": str(folder)}]}
    config = trainer.config("big", dataset=dataset, caching_batch_size=8)
    result = command([sys.executable, "-c", LIMITED, str(config), "1100"])
    assert result.returncode == 6, result.stderr
    assert "Traceback" not in result.stderr
    assert "error: out of memory in filling the cache. Needed: " in result.stderr
    assert "\n  1. caching_batch_size below 8\n  2. model.text_encoder_device" in result.stderr


@pytest.mark.gpu
def test_memory_of_the_gpu_that_runs_out_is_told(trainer):
    device = torch.device("cuda")
    total = torch.accelerator.get_memory_info(device)[1]
    with (
        pytest.raises(SpaceError, match=r"Needed: more than .* more asked for\); the device has .* GiB"),
        memory_errors(device, MemoryContext("step 7", SHAPE), lambda _: ["one"]),
    ):
        torch.empty(2 * total, dtype=torch.int8, device=device)
