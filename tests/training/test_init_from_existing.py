"""Runs that begin with a LoRA: from the first step on, and when they are stopped and go on without its file."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from anima_train.checkpoint.manifest import entry_of
from anima_train.checkpoint.training_state import check_state
from anima_train.config.load import load_config
from anima_train.config.model_files import build_model_spec
from anima_train.core.errors import ConfigError
from anima_train.training.build import initial_lora
from anima_train.training.dry_run import describe_run
from anima_train.training.prepare import scan_all
from tests.resuming import STATES, numbers, run_until


def lora(path, **changes):
    return {"adapter": {"type": "lora", "rank": 4, "init_from_existing": str(path), **changes}}


def held_out(pictures):
    return {
        "eval_datasets": [{"name": "held", "config": {"resolutions": [64], "directory": [{"path": str(pictures)}]}}],
        "eval_every_n_steps": 4,
    }


def test_a_run_begins_where_the_file_ends_and_goes_on_bitwise_without_it(trainer, pictures, capsys):
    first = trainer("first", adapter={"alpha": 2.0}, **held_out(pictures))
    file = first.path / "weights" / "first.safetensors"
    keys = {**lora(file, rank=6, alpha=3.0), **held_out(pictures), **STATES}
    whole = trainer("whole", **keys)
    text = capsys.readouterr().out
    assert "adapter.init_from_existing: begins with first.safetensors, rank 4 of 6, 32 modules; its scale of 1" in text
    assert whole.evaluations[0]["held/loss"] == pytest.approx(first.evaluations[-1]["held/loss"], rel=1e-6)
    assert whole.evaluations[0]["held/loss"] != pytest.approx(first.evaluations[0]["held/loss"], rel=1e-4)
    assert whole.manifest["began_with"]["name"] == "first.safetensors"

    run_until(trainer, 2, **keys)
    file.unlink()
    resumed = trainer("run", **keys)
    assert "init_from_existing: not read again, as the weights come from the training state" in capsys.readouterr().out
    assert numbers(resumed) == numbers(whole)  # the share of weights that have moved since the start, too
    assert all(torch.equal(tensor, resumed.weights[key]) for key, tensor in whole.weights.items())
    assert resumed.manifest["began_with"] == whole.manifest["began_with"]
    with pytest.raises(ConfigError, match=r'adapter\.init_from_existing: "\S+first\.safetensors" does not exist'):
        trainer("another", **keys)


@pytest.mark.slow
def test_a_state_is_a_lora_to_begin_with(trainer, pictures):
    first = trainer("first", adapter={"alpha": 1.0}, **held_out(pictures), checkpoint_every_n_steps=4)
    second = trainer("second", **lora(first.path / "checkpoints" / "step-000004"), **held_out(pictures), max_steps=1)
    assert second.evaluations[0]["held/loss"] == pytest.approx(first.evaluations[-1]["held/loss"], rel=1e-6)


def test_what_is_wrong_with_the_file_is_told_before_images_are_looked_at(trainer, monkeypatch):
    file = trainer("first").path / "weights" / "first.safetensors"
    monkeypatch.delattr("anima_train.training.prepare.scan_all")
    with pytest.raises(ConfigError, match=r"has rank 4, and adapter\.rank is 2, which cannot hold it; write rank = 4"):
        trainer("second", **lora(file, rank=2))
    with pytest.raises(ConfigError, match=r'firsd\.safetensors" does not exist; did you mean "\S+first\.safetensors"'):
        trainer("third", **lora(file.with_name("firsd.safetensors")))
    assert not (trainer.folder / "runs" / "third").exists()


@pytest.mark.slow
def test_a_check_says_what_the_run_would_begin_with(trainer):
    file = trainer("first").path / "weights" / "first.safetensors"

    def lines(**changes):
        loaded = load_config(trainer.config("second", **changes))
        spec = build_model_spec(loaded.config, torch.device("cpu"))
        scans = scan_all((loaded.train,), 0, write=False)
        return describe_run(loaded, spec, scans, num_processes=1)

    assert any("begins with first.safetensors, rank 4 of 8" in line for line in lines(**lora(file, rank=8)))
    frozen = {**lora(file), "model": {"mlp_lr": 0}}
    assert any(re.match(r"warning: .*4 modules of first\.safetensors not trained here", li) for li in lines(**frozen))
    with pytest.raises(ConfigError, match="does not exist"):
        lines(**lora(file.with_name("gone.safetensors")))


@pytest.mark.slow
def test_the_file_may_not_become_another_one_and_a_whole_model_has_none(trainer, tmp_path):
    file = trainer("first").path / "weights" / "first.safetensors"
    other = tmp_path / "other.safetensors"
    other.write_bytes(file.read_bytes())
    run_until(trainer, 2, **lora(file), **STATES)
    with pytest.raises(ConfigError, match=r"the run has begun; leave it as it was, the file is not read any more"):
        trainer("run", resume=True, **lora(other), **STATES)
    with pytest.raises(ConfigError, match="adapter: init_from_existing is a LoRA, with which the training of a whole"):
        load_config(trainer.config("full", adapter={"type": "full", "init_from_existing": str(file)}))
    empty = load_config(trainer.config("none", **lora(""))).config
    assert empty.adapter.init_from_existing is None
    assert initial_lora(empty.adapter, None, None) is None


@pytest.mark.parametrize(
    ("adapter", "line"),
    [
        ({}, r"write, in \[adapter\], init_from_existing = "),
        ({"type": "full", "rank": None}, r"write, in \[model\], transformer_path = "),
    ],
)
def test_weights_given_to_resume_are_answered_with_the_line_to_write(trainer, tmp_path, adapter, line):
    file = tmp_path / "my lora.safetensors"
    with pytest.raises(ConfigError, match=r'--resume: "\S+ lora\.safetensors" does not exist'):
        trainer("run", resume=file, adapter=adapter)
    file.write_bytes(b"")
    with pytest.raises(ConfigError, match=rf'weights are no training state .* {line}"{re.escape(str(file))}"$'):
        trainer("run", resume=file, adapter=adapter)
    state = tmp_path / "run" / "checkpoints" / "step-000002" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text("{}")
    with pytest.raises(ConfigError, match=rf"a file of a training state; give its folder: --resume {state.parent}$"):
        trainer("run", resume=state, adapter=adapter)


def test_a_sample_of_rows_that_were_divided_otherwise_is_not_compared_with(trainer):
    file = trainer("first", max_steps=1).path / "weights" / "first.safetensors"
    run = trainer("run", **lora(file), checkpoint_every_n_steps=1, max_steps=1)
    folder = run.path / "checkpoints" / "step-000001"
    start, saved = folder / "start.safetensors", check_state(folder)
    (sample,) = load_file(start).values()
    for name, is_known in (("sample_of_3", False), ("sample_of_1", True)):  # of the same shape
        save_file({name: sample}, start)
        files = {**saved.manifest.files, start.name: entry_of(start)}
        (folder / "state.json").write_text(saved.manifest.model_copy(update={"files": files}).text())
        resumed = trainer("run", resume=folder, **lora(file), checkpoint_every_n_steps=1, max_steps=2)
        share = resumed.metrics[-1]["share_moved_in_run"]
        assert 0 < share <= 1 if is_known else math.isnan(share)
        assert (resumed.path / "checkpoints" / "step-000002" / "start.safetensors").exists() == is_known


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"sharding": "fsdp2"}], ids=str)
def test_processes_begin_together_with_the_file(trainer, changes):
    file = trainer("first").path / "weights" / "first.safetensors"
    keys = {**lora(file, rank=6), **STATES}
    alone = trainer("alone", **keys, gradient_accumulation_steps=2)
    many = trainer.processes(2, "many", **keys, **changes)
    assert many.losses == pytest.approx(alone.losses, rel=1e-5)
    state = load_file(many.path / "checkpoints" / "step-000002" / "start.safetensors")
    assert state.keys() == {"sample_of_2" if changes else "sample_of_1"}
    assert json.loads((many.path / "manifest.json").read_text())["began_with"]["name"] == "first.safetensors"
