"""Several processes compute what one does: with a copy of the model each (DDP), and divided among them (FSDP2)."""

import contextlib
import json
import socket

import pytest
import torch

# Trains one configuration after the other in the same processes, whose start takes longer than these runs; counts the
# collective operations of the second and third step of each. In those that are called broken no preview can be saved.
PROGRAM = """
import json, os, signal, sys
from collections import Counter
from pathlib import Path
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.profiler import ProfilerActivity, profile
from anima_train.config.load import load_config
from anima_train.distributed.failures import run_program
from anima_train.distributed.launcher import rank
from anima_train.evaluation import previews
from anima_train.training import train

torch.set_num_threads(1)
counts = {}
real_step, real_decode = train.train_step, previews.decode

def step(run, state, step, *others):
    if step.index not in (1, 2):
        return real_step(run, state, step, *others)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        made = real_step(run, state, step, *others)
    names = Counter(event.name for event in profiled.events() if event.name.startswith("c10d::"))
    counts.setdefault(run.folder.name, []).append((len(step.micro_batches), names))
    return made

def decode(*arguments):
    if os.path.exists("break_previews"):
        raise OSError("a broken preview")
    return real_decode(*arguments)

train.train_step, previews.decode = step, decode

def work():
    for config, resume, port in json.loads(sys.argv[1]):
        # A store of its own for each: what the one before has left in the launcher's would be taken for its own.
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        if rank() == 0 and "broken" in config:
            Path("break_previews").touch()
        train.run_training(load_config(Path(config), []), resume=resume)
    if rank() == 0:
        Path("counts.json").write_text(json.dumps(counts))

run_program(work)
"""

STEPS = 4
FULL = {
    "adapter": None,
    "model": {"llm_adapter_lr": 1e-3, "cache_text_embeddings": True},
    "optimizer": {"type": "adamw_optimi", "lr": 1e-3},
    "ema": {"decay": 0.5},
    "gradient_clipping": 0.5,
    "activation_checkpointing": True,
    "checkpoint_every_n_steps": 2,
    "eval_every_n_steps": 2,
}
LORA = {"adapter": {"type": "lora", "rank": 3}, "activation_checkpointing": "selective"}  # 3 rows: not even
DRAWN = {"sampling": {"prompts": ["a cat"], "steps": 2, "width": 64, "height": 64, "every_n_steps": 2}}


@pytest.fixture
def train_all(trainer, forks):
    """Trains configurations, by name, on several processes; returns how often each collective was called in a step."""
    script = trainer.folder / "program.py"
    script.write_text(f"import os\nos.chdir({str(trainer.folder)!r})\n{PROGRAM}")

    def run(number, *runs):
        configs = []
        for index, ((name, keys, resume), port) in enumerate(zip(runs, free_ports(len(runs)), strict=True)):
            config = trainer.config(name, gradient_accumulation_steps=4 // number, **keys)
            own = config.rename(config.with_name(f"{index}_{name}.toml"))  # a run may come twice, with other keys
            configs.append((str(own), resume, port))
        results = forks(number, str(script), json.dumps(configs))
        assert [result.returncode for result in results] == [0] * number, results
        output = "".join(result.stdout + result.stderr for result in results)
        return json.loads((trainer.folder / "counts.json").read_text()), output

    return run


def free_ports(number):
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def numbers(trainer, name):
    """The losses and norms of a run, and its evaluations."""
    folder = trainer.folder / "runs" / name
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = folder / "evaluations.jsonl"
    evaluated = [json.loads(line) for line in evaluations.read_text().splitlines()] if evaluations.exists() else []
    return [line[key] for line in lines for key in ("loss", "grad_norm")] + [line["held/loss"] for line in evaluated]


def weights(trainer, name):
    from safetensors.torch import load_file

    return load_file(trainer.folder / "runs" / name / "weights" / f"{name}.safetensors")


@pytest.mark.slow
def test_any_number_of_processes_gives_the_numbers_of_one_and_resumes_from_any(trainer, train_all, images_drawer):
    """In float32 to 1e-5: losses, norms, evaluations, weights; bit for bit where the number is the same."""
    held = images_drawer(trainer.folder / "held", [(96, 96)])  # a batch for one process: the others have none
    evaluated = {
        "eval_datasets": [{"name": "held", "config": {"resolutions": [96], "directory": [{"path": str(held)}]}}]
    }
    full, lora = {**FULL, **evaluated, "max_steps": STEPS}, {**LORA, "max_steps": STEPS}
    divided = {"sharding": "fsdp2"}
    for name, keys in (("full", full), ("lora", lora)):
        trainer(f"{name}1", gradient_accumulation_steps=4, **keys)
    counts, output = train_all(
        2,
        ("lora2", lora, False), ("full2", full, False), ("lora2d", {**lora, **divided}, False),
        ("full2d", {**full, **divided, **DRAWN}, False),
        ("broken2d", {**full, **divided, **DRAWN, "max_steps": 1}, False),
        ("again2d", {**full, **divided, "max_steps": 2}, False), ("again2d", {**full, **divided}, True),
        ("moved", {**full, **divided, "max_steps": 2}, False),
    )  # fmt: skip
    assert output.count("no preview (a broken preview)") == 1
    more, _ = train_all(
        4,
        ("lora4", lora, False),
        ("full4", full, False),
        ("lora4d", {**lora, **divided}, False),
        ("full4d", {**full, **divided}, False),
        ("moved", {**full, **divided}, True),
    )
    trainer("moved", resume=True, gradient_accumulation_steps=4, **{**full, "max_steps": STEPS + 2})
    trainer("whole", gradient_accumulation_steps=4, **{**full, "max_steps": STEPS + 2})

    for kind, names in (
        ("full", ("full2", "full4", "full2d", "full4d", "again2d")),
        ("lora", ("lora2", "lora4", "lora2d", "lora4d")),
    ):
        expected, tensors = numbers(trainer, f"{kind}1"), weights(trainer, f"{kind}1")
        for name in names:
            assert numbers(trainer, name) == pytest.approx(expected, rel=1e-5), name
            for key, tensor in weights(trainer, name).items():
                torch.testing.assert_close(tensor, tensors[key], rtol=1e-3, atol=1e-5, msg=f"{name} {key}")
    assert numbers(trainer, "again2d") == numbers(trainer, "full2d")
    assert all(
        torch.equal(tensor, weights(trainer, "full2d")[key]) for key, tensor in weights(trainer, "again2d").items()
    )
    assert numbers(trainer, "moved") == pytest.approx(numbers(trainer, "whole"), rel=1e-5)
    drawn = sorted(path.name for path in (trainer.folder / "runs" / "full2d" / "samples").iterdir())
    assert drawn == ["s000000_00.png", "s000002_00.png", "s000004_00.png"]

    # Of the steps that are counted one has one micro-batch on each process, the other two. DDP exchanges gradients once
    # in both; FSDP2 gathers each of its units for the forward and the backward pass of each, and divides its gradients.
    for name in ("full2", "lora2"):
        (first, few), (second, many) = counts[name]
        assert (first, second) == (1, 2)
        assert few["c10d::allreduce_"] == many["c10d::allreduce_"]
    for name, units in (("full2d", 4), ("lora2d", 3)):  # two blocks, what is around them, and the LLM adapter
        for number, calls in counts[name]:
            assert calls["c10d::_allgather_base_"] == 2 * units * number
            assert calls["c10d::_reduce_scatter_base_"] == (units if name == "full2d" else 2) * number
            assert calls["c10d::allreduce_"] == 2  # the norm, and the sums of the step
    assert [number for number, _ in more["full4d"]] == [1, 1]


@pytest.mark.slow
def test_two_processes_divide_a_lokr_and_a_loha_and_compute_what_one_does(trainer, train_all):
    kinds = [{"type": "lokr", "rank": 3}, {"type": "lokr", "full_matrix": True}, {"type": "loha", "rank": 3}]
    runs = {f"{adapter['type']}{number}": {"adapter": adapter, "max_steps": 3} for number, adapter in enumerate(kinds)}
    for name, keys in runs.items():
        trainer(name, gradient_accumulation_steps=4, **keys)
    train_all(2, *((f"{name}d", {**keys, "sharding": "fsdp2"}, False) for name, keys in runs.items()))
    for name in runs:
        assert numbers(trainer, f"{name}d") == pytest.approx(numbers(trainer, name), rel=1e-5), name
        for key, tensor in weights(trainer, f"{name}d").items():
            torch.testing.assert_close(tensor, weights(trainer, name)[key], rtol=1e-3, atol=1e-5, msg=f"{name} {key}")
