"""Runs whose blocks are compiled; and those that could not be are refused before anything is cached."""

import logging

import pytest
import torch
import torch._inductor.config

from anima_train.cli.check_report import report_check
from anima_train.config.load import load_config
from anima_train.core.errors import ConfigError
from anima_train.model.recompute import runner
from anima_train.training.build import block_runner
from anima_train.training.train import run_training


@pytest.fixture
def without_compiler():
    with torch._inductor.config.patch({"cpp.cxx": (None, "c++-17")}):
        yield


def train(trainer, config):
    trainer.run(config)


def dry_run(trainer, config):
    run_training(load_config(config, []), dry_run=True)


def check(trainer, config):
    report_check(load_config(config, []), "check", measure_steps=None, page=None)


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("command", [train, dry_run, check])
def test_to_compile_without_a_compiler_is_refused_before_anything_is_cached(command, trainer, images_drawer):
    pictures = images_drawer(trainer.folder / "pictures", [(96, 96)])
    dataset = {"directory": [{"path": str(pictures)}]}
    with pytest.raises(ConfigError) as refused:
        command(trainer, trainer.config(compile=True, dataset=dataset))
    assert str(refused.value).startswith("compile: there is no C++ compiler (")
    assert str(refused.value).endswith("; install it, or set compile = false")
    assert list(pictures.rglob("*.safetensors")) == []


def test_caching_is_what_comes_first_otherwise(trainer, images_drawer):
    pictures = images_drawer(trainer.folder / "pictures", [(96, 96)])
    trainer("run", compile=False, dataset={"directory": [{"path": str(pictures)}]}, max_steps=1)
    assert list(pictures.rglob("*.safetensors")) != []


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton may be there")
def test_without_triton_a_gpu_trains_uncompiled_with_one_warning(caplog):
    run = block_runner("nothing", None, torch.device("cuda"))
    assert run.__code__ is runner("nothing").__code__
    [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith("the blocks are not compiled, and run slower: Triton is missing")
    with pytest.raises(ConfigError, match="compile: Triton is missing"):
        block_runner("nothing", True, torch.device("cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton may be there")
def test_the_first_blocks_way_is_without_a_warning_of_its_own(caplog):
    block_runner("selective", None, torch.device("cuda"), checkpointed_blocks=5)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("compiles", "device"), [(None, "cpu"), (False, "cpu"), (False, "cuda"), (None, "mps")])
def test_nothing_is_compiled_unasked_but_on_cuda(compiles, device, caplog):
    assert block_runner("nothing", compiles, torch.device(device)).__code__ is runner("nothing").__code__
    assert caplog.records == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_run_ends_as_eager_does_and_says_so(trainer, error, caplog):
    torch._dynamo.reset()
    pictures = trainer.base["dataset"]["directory"]
    changes = {
        "checkpoint_every_n_steps": 2,
        "eval_every_n_steps": 1,
        "eval_datasets": [{"name": "same", "config": {"resolutions": [96], "directory": pictures}}],
        "sampling": {"every_n_steps": 1, "prompts": [{"prompt": "a circle", "width": 96, "height": 96, "steps": 2}]},
    }
    eager = trainer("eager", max_steps=3, **changes)
    with caplog.at_level(logging.INFO, logger="anima_train"):
        trainer("compiled", max_steps=2, compile=True, **changes)
        compiled = trainer("compiled", max_steps=3, compile=True, resume=True, **changes)
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-4)
    losses = [[evaluation["same/loss"] for evaluation in run.evaluations] for run in (compiled, eager)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert compiled.weights.keys() == eager.weights.keys()
    assert all(error(weight, eager.weights[name]) < 0.01 for name, weight in compiled.weights.items())
    lines = [record.getMessage() for record in caplog.records if "the blocks" in record.getMessage()]
    assert lines[0].startswith("compiling the blocks")
    assert any(line.startswith("compiled the blocks for training") for line in lines)
    assert any(line.startswith("compiled the blocks for evaluation and previews") for line in lines)
    assert not any(line.startswith("the blocks") for line in lines)
