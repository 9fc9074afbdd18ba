"""Cache entries that are damaged after the start: made again, and the run does not notice."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image

from anima_train.core.errors import DataError, SpaceError
from anima_train.training import prepare as prepare_module

KINDS = ("latent", "mask", "text")


@pytest.fixture
def transparent(tmp_path, images_drawer):
    """Six images in two buckets, each with a mask."""
    folder = images_drawer(tmp_path / "transparent", [(96, 96)] * 3 + [(128, 80)] * 3)
    for path in folder.glob("*.png"):
        image = Image.open(path).convert("RGBA")
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(path)
    return folder


@pytest.fixture
def changes(transparent, images_drawer, tmp_path):
    """Dropout of all kinds, masks and an evaluation; one caption at a time, as a damaged one is encoded alone."""
    held = images_drawer(tmp_path / "held", [(96, 96)] * 2)
    return {
        "dataset": {"directory": [{"path": str(transparent)}], "alpha_as_mask": True},
        "eval_datasets": [{"name": "held", "config": {"resolutions": [96], "directory": [{"path": str(held)}]}}],
        "eval_every_n_steps": 6,
        "caching_batch_size": 1,
        "adapter": {"dropout": 0.2},
        "uncond_fraction": 0.3,
        "max_steps": 12,  # two epochs, so that every entry is read
    }


def entries(folder):
    return sorted(path for kind in KINDS for path in (folder / ".anima_cache" / kind).glob("??/*.safetensors"))


def flip_a_bit(path):
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])


def same(first, second):
    assert second.losses == first.losses
    assert second.evaluations == first.evaluations
    assert all(torch.equal(tensor, second.weights[key]) for key, tensor in first.weights.items())
    return True


def warnings(run):
    lines = (json.loads(line) for line in (run.path / "warnings.jsonl").read_text().splitlines())
    return [line["text"] for line in lines if "cache entry damaged" in line["text"]]


@pytest.mark.parametrize(
    ("num_workers", "all_of_them"), [(2, False), *(pytest.param(n, True, marks=pytest.mark.slow) for n in (0, 2))]
)
def test_entries_with_flipped_bits_are_made_again_and_nothing_else_changes(
    trainer, changes, transparent, tmp_path, capsys, num_workers, all_of_them
):
    whole = trainer("whole", **changes)
    contents = {path: path.read_bytes() for folder in (transparent, tmp_path / "held") for path in entries(folder)}
    flipped = list(contents) if all_of_them else list({path.parts[-3]: path for path in contents}.values())
    assert {path.parts[-3] for path in flipped} == set(KINDS)
    for path in flipped:
        flip_a_bit(path)
    capsys.readouterr()
    run = trainer("run", **changes, num_workers=num_workers)
    assert same(whole, run)
    assert {path: path.read_bytes() for path in contents} == contents
    told = warnings(run)
    assert len(told) == len(flipped)
    assert any(re.search(r"its content is not what was written; made again, of '.*image\d\.png", line) for line in told)
    assert any("made again, of 'red circle, number " in line for line in told)
    assert capsys.readouterr().out.count("warning: cache entry damaged") == len(flipped)


@pytest.mark.slow
def test_an_entry_that_is_removed_while_the_run_reads_is_made_again(trainer, changes, transparent, monkeypatch):
    whole = trainer("whole", **changes)
    real = prepare_module.fill_cache

    def fill_and_remove(*arguments):
        found = real(*arguments)
        for path in entries(transparent):
            path.unlink()
        return found

    monkeypatch.setattr(prepare_module, "fill_cache", fill_and_remove)
    run = trainer("run", **changes)
    assert same(whole, run)
    assert len(warnings(run)) == len(entries(transparent))


def test_a_damaged_entry_whose_image_is_gone_ends_the_run_with_both_reasons(trainer, changes, transparent, monkeypatch):
    trainer("whole", **changes)
    real = prepare_module.fill_cache

    def fill_and_remove(*arguments):
        found = real(*arguments)
        for path in (transparent / ".anima_cache" / "latent").glob("??/*.safetensors"):
            flip_a_bit(path)
        for path in transparent.glob("*.png"):
            path.unlink()
        return found

    monkeypatch.setattr(prepare_module, "fill_cache", fill_and_remove)
    with pytest.raises(
        DataError, match=r"its content is not what was written; it cannot be made again: .*png.*: not there"
    ):
        trainer("run", **changes)


def test_a_damaged_entry_in_a_cache_that_cannot_be_written_ends_the_run(trainer, changes, transparent):
    trainer("whole", **changes)
    cache = transparent / ".anima_cache"
    for path in entries(transparent):
        flip_a_bit(path)
    shutil.rmtree(cache / "claims")
    (cache / "claims").write_text("")  # permissions do not stop root
    with pytest.raises(SpaceError, match=re.escape("it cannot be made again: cache folder")):
        trainer("run", **changes)


@pytest.mark.slow
def test_two_processes_make_damaged_entries_again(trainer, changes, transparent, tmp_path):
    changes |= {"gradient_accumulation_steps": 1}
    whole = trainer.processes(2, "whole", **changes)
    contents = {path: path.read_bytes() for folder in (transparent, tmp_path / "held") for path in entries(folder)}
    for path in contents:
        flip_a_bit(path)
    assert same(whole, trainer.processes(2, "run", **changes))
    assert {path: path.read_bytes() for path in contents} == contents
