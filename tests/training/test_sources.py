"""Runs on images that are no files of their own, against the run on the folder that they were made from."""

import io
import json
import shutil
import tarfile

import datasets
import pytest
from PIL import Image

from anima_train.core.errors import DataError


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    """Where datasets keeps its copies: not at home."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def plain(tmp_path, images_drawer):
    """A folder of images with captions, and one of masks."""
    folder = images_drawer(tmp_path / "plain", [(96, 96), (96, 96), (128, 80), (80, 128)])
    (tmp_path / "masks").mkdir()
    for image in folder.glob("*.png"):
        with Image.open(image) as picture:
            mask = Image.new("L", picture.size, "white")
        mask.paste(0, (0, 0, 30, 60))
        mask.save(tmp_path / "masks" / image.name)
    return folder


def rows_of(plain):
    """A table of what is in the folders, from the last image to the first."""
    images = sorted(plain.glob("*.png"), reverse=True)
    table = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": image.read_bytes(), "path": image.name} for image in images],
            "mask": [{"bytes": (plain.parent / "masks" / image.name).read_bytes(), "path": None} for image in images],
            "text": [image.with_suffix(".txt").read_text() for image in images],
        }
    )
    return table.cast_column("image", datasets.Image()).cast_column("mask", datasets.Image())


def a_parquet(plain):
    rows_of(plain).to_parquet(plain.parent / "x.parquet")
    return {"hf_dataset": str(plain.parent / "x.parquet"), "mask_column": "mask"}


def a_saved_table(plain):
    rows_of(plain).save_to_disk(plain.parent / "saved")
    return {"hf_dataset": str(plain.parent / "saved"), "mask_column": "mask"}


def an_image_folder(plain):
    folder = plain.parent / "pictures"
    folder.mkdir()
    lines = []
    for image in sorted(plain.glob("*.png")):
        shutil.copy(image, folder)
        shutil.copy(plain.parent / "masks" / image.name, folder / f"mask_{image.name}")
        text = image.with_suffix(".txt").read_text()
        lines.append({"file_name": image.name, "mask_file_name": f"mask_{image.name}", "text": text})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {"hf_dataset": str(folder), "mask_column": "mask"}


def a_tar(plain):
    for name in ("plain", "masks"):
        with tarfile.open(plain.parent / f"{name}.tar", "w:") as tar:
            tar.add(plain.parent / name, ".")
    return {"path": str(plain.parent / "plain.tar"), "mask_path": str(plain.parent / "masks.tar")}


@pytest.mark.parametrize("source", [a_parquet, a_saved_table, an_image_folder, a_tar])
def test_training_is_the_same_as_on_the_folder(trainer, tmp_path, plain, source):
    """Every source has a cache of its own, so that it is the one that is read."""
    directory = {"path": str(plain), "mask_path": str(tmp_path / "masks")}
    expected = trainer("folder", dataset={"directory": [directory]}, cache_dir=str(tmp_path / "cache"))
    directory = source(plain)
    shutil.rmtree(plain)
    shutil.rmtree(tmp_path / "masks")
    found = trainer("other", dataset={"directory": [directory]}, cache_dir=str(tmp_path / "other_cache"))
    assert found.losses == expected.losses
    for kind, number in (("latent", 4), ("mask", 3), ("text", 4)):  # two masks are equal
        entries = [sorted((tmp_path / name / kind).glob("??/*")) for name in ("cache", "other_cache")]
        assert [entry.name for entry in entries[0]] == [entry.name for entry in entries[1]]
        assert [entry.read_bytes() for entry in entries[0]] == [entry.read_bytes() for entry in entries[1]]
        assert len(entries[0]) == number


def test_masks_of_a_table_count(trainer, plain):
    directory = a_parquet(plain)
    masked = trainer("masked", dataset={"directory": [directory]})
    whole = trainer("whole", dataset={"directory": [{"hf_dataset": directory["hf_dataset"]}]})
    assert masked.losses != whole.losses


def test_shards_and_a_table_are_trained_together(trainer, tmp_path, plain):
    shards = tmp_path / "shards"
    shards.mkdir()
    for number, image in enumerate(sorted(plain.glob("*.png"))):
        with tarfile.open(shards / f"{number % 2}.tar", "a:") as tar:
            for file in (image, image.with_suffix(".txt")):
                member = tarfile.TarInfo(f"{number // 2}{file.suffix}")
                member.size = file.stat().st_size
                tar.addfile(member, io.BytesIO(file.read_bytes()))
    table = {"hf_dataset": a_parquet(plain)["hf_dataset"], "hf_split": "train[:2]"}
    directories = [{"path": str(shards), "tars": True}, table]
    run = trainer(dataset={"directory": directories}, max_steps=None, epochs=1)
    assert len(run.losses) == 4 + 2
    assert all(loss > 0 for loss in run.losses)


def test_a_missing_column_stops_the_run_before_it_starts(trainer, plain):
    with pytest.raises(DataError, match=r"no column 'prompt'; found 'image', 'mask', 'text'\. Set caption_column"):
        trainer(dataset={"directory": [{**a_parquet(plain), "caption_column": "prompt"}]})
