"""A dataset that is not the one of the training state is refused before anything is cached, with both ways on."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from anima_train.caching import fill as fill_module
from anima_train.checkpoint.samples import SampleRecords, name_differences, records_bytes, sample_records
from anima_train.config.load import load_config
from anima_train.core.errors import DataError
from anima_train.model.tiny import tiny_paths
from anima_train.training.prepare import scan_all
from tests.resuming import STATES, run_until


@pytest.fixture
def own(trainer, images_drawer, tmp_path):
    """A trainer with seven pictures of its own, and their folder."""
    folder = images_drawer(tmp_path / "own", [(96, 96)] * 7)
    trainer.base["dataset"]["directory"] = [{"path": str(folder)}]
    return trainer, folder


def draw(path, colour):
    Image.new("RGB", (96, 96), colour).save(path)


def refusal(trainer, **changes):
    with pytest.raises(DataError) as caught:
        trainer("run", **STATES, **changes)
    assert caught.value.exit_code == 3
    (problem,) = caught.value.problems
    first, *others = problem.split("\n")
    assert all(line.startswith("  ") for line in others)
    return [first, *(line[2:] for line in others)]


def test_all_that_was_added_removed_and_changed_is_named_and_nothing_is_encoded(own, monkeypatch):
    trainer, folder = own
    run = run_until(trainer, 2)
    shutil.copytree(folder, folder.with_name("before"))
    draw(folder / "new.png", (1, 2, 3))
    (folder / "image0.png").unlink()
    draw(folder / "image1.png", (9, 9, 9))
    (folder / "image2.txt").write_text("something else")
    Image.new("RGB", (128, 64)).save(folder / "image3.png")
    with monkeypatch.context() as patch:
        patch.delattr(fill_module, "load_vae")
        first, second, third = refusal(trainer)
    assert first == (
        f"{run}/checkpoints/step-000002: cannot resume: the dataset has changed since: 1 added: new.png; "
        "1 removed: image0.png; 3 changed: image1.png (image), image2.png (captions), image3.png (image, size)"
    )
    assert second == (
        "put it back, and resume; or start another run, of another run_name, from these weights; write in [adapter]:"
    )
    assert tomllib.loads(third) == {"init_from_existing": f"{run}/checkpoints/step-000002/weights.safetensors"}

    # Both ways on.
    begun = trainer("other", **STATES, adapter={"type": "lora", "rank": 4, **tomllib.loads(third)}, max_steps=1)
    assert begun.metrics[0]["step"] == 1
    shutil.rmtree(folder)
    folder.with_name("before").rename(folder)
    assert [line["step"] for line in trainer("run", **STATES).metrics] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_mask_that_appears_is_a_change(own):
    trainer, folder = own
    masks = folder.with_name("masks")
    masks.mkdir()
    trainer.base["dataset"]["directory"][0]["mask_path"] = str(masks)
    run_until(trainer, 1)
    Image.new("L", (96, 96), 255).save(masks / "image5.png")
    assert "1 changed: image5.png (mask)" in refusal(trainer)[0]


def test_of_many_the_first_five_are_named():
    before = SampleRecords(trained={f"0/{number}.png@96": "a 96x96 b none" for number in range(9)})
    (text,) = name_differences(before, {})
    assert text == "9 removed: " + ", ".join(f"{number}.png" for number in range(5)) + ", ..."
    assert not list(name_differences(before, dict(before.trained)))


def at(*resolutions, **files):
    """Records of files at some resolutions, d0_a="x": a.png in directory 0 with the image x."""
    return {
        f"{name[1:].replace('_', '/')}.png@{resolution}": f"{image} {resolution}x{resolution} text none"
        for name, image in files.items()
        for resolution in resolutions
    }


def test_files_are_named_and_counted_whatever_the_number_of_their_resolutions():
    before = SampleRecords(trained={"0/a b@2.png@128": "x 128x128 text none", **at(128, 192, d0_old="o", d0_kept="k")})
    now = at(128, 192, d0_new="n", d0_kept="other") | {"0/a b@2.png@160x96": "x 160x96 text none"}
    assert list(name_differences(before, now)) == [
        "1 added: new.png", "1 removed: old.png", "2 changed: kept.png (image), a b@2.png (size)",
    ]  # fmt: skip


def test_directories_are_named_where_there_are_several():
    before = SampleRecords(trained=at(128, 192, d0_sub_a="a", d1_a="a"))
    (text,) = name_differences(before, at(128, 192, d0_sub_a="a"))
    assert text == "1 removed: directory[1]/a.png"


def test_a_resolution_that_could_not_be_used_then_is_no_change():
    before = SampleRecords(trained=at(128, d0_a="a"), unusable=at(192, d0_a="a"))
    assert not list(name_differences(before, at(128, 192, d0_a="a")))
    assert list(name_differences(before, at(128, 256, d0_a="a"))) == ["1 changed: a.png (size)"]


@pytest.mark.slow
def test_an_image_that_could_not_be_used_then_is_no_change_now_unless_it_is_another(own):
    trainer, folder = own
    trainer.base["dataset"]["max_bad_fraction"] = 0.5
    content = (folder / "image6.png").read_bytes()
    (folder / "image6.png").write_bytes(content[:-60] + bytes(48) + content[-12:])  # seen when it is decoded
    run = run_until(trainer, 1)
    records = json.loads((run / "checkpoints" / "step-000001" / "samples.json").read_text())
    assert records["unusable"].keys() == {"0/image6.png@96"}
    shutil.rmtree(folder / ".anima_cache")  # nothing knows of it before it is decoded again
    run_until(trainer, 1)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    (folder / "image6.png").write_bytes(content)
    assert "1 added: image6.png" in refusal(trainer)[0]


@pytest.mark.slow
def test_weights_saved_after_the_same_step_are_those_to_begin_with(own):
    trainer, folder = own
    run = run_until(trainer, 2, save_every_n_steps=2)
    (folder / "image0.txt").write_text("another")
    saved = f"{run}/weights/run-s000002.safetensors"
    assert refusal(trainer, save_every_n_steps=2)[2] == f'init_from_existing = "{saved}"'


@pytest.mark.slow
def test_a_whole_model_is_offered_with_its_llm_adapter(own):
    trainer, folder = own
    full = {"adapter": None, "optimizer": {"type": "adamw_optimi", "lr": 1e-4}, "model": {"dtype": "bfloat16"}}
    run = run_until(trainer, 1, **full)
    (folder / "image0.txt").write_text("another")
    *_, place, first, second = refusal(trainer, **full)
    assert place.endswith("write in [model]:")
    lines = tomllib.loads(f"{first}\n{second}")
    assert lines["transformer_path"] == f"{run}/checkpoints/step-000001/weights.safetensors"
    tiny = trainer.base["model"]["tiny_path"]
    files = {key: value for key, value in find_paths(tiny).items() if key != "transformer_path"}
    model = {"tiny_path": None, **files, **lines}
    begun = trainer("other", **{**full, "model": full["model"] | model}, max_steps=1)
    assert len(begun.metrics) == 1


def find_paths(folder):
    files = tiny_paths(Path(folder))
    return {
        "transformer_path": str(files.transformer), "vae_path": str(files.vae), "llm_path": str(files.llm),
        "tokenizer_path": str(files.tokenizer), "t5_tokenizer_path": str(files.t5_tokenizer),
    }  # fmt: skip


@pytest.mark.slow
def test_parts_of_a_model_are_not_offered(own):
    trainer, folder = own
    part = {"adapter": None, "model": {"mlp_lr": 0}}
    run_until(trainer, 1, **part)
    (folder / "image0.txt").write_text("another")
    assert refusal(trainer, **part)[1].endswith(
        "this one has no saved weights to begin with (save_every_n_steps saves them)"
    )


@pytest.mark.slow
def test_a_state_of_an_earlier_version_is_refused_without_names(own):
    trainer, folder = own
    run = run_until(trainer, 1)
    state = run / "checkpoints" / "step-000001"
    values = json.loads((state / "state.json").read_text())
    del values["checksum"], values["records"], values["files"]["samples.json"]
    (state / "state.json").write_text(json.dumps(values | {"version": 2}))
    (folder / "image0.txt").write_text("another")
    assert re.search("the dataset has changed since: its hash is another one$", refusal(trainer)[0])


def test_the_room_for_the_records_is_known_before(own):
    trainer, _ = own
    loaded = load_config(trainer.config())
    samples = scan_all((loaded.train,), 0, write=False)["train"].samples
    real = len(sample_records(samples[:3], samples[3:]))
    assert real <= records_bytes(samples) <= 1.5 * real
