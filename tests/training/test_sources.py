"""Runs on images that are no files of their own, against the run on the folder that they were made from."""

import io
import json
import shutil
import tarfile

import datasets
import pytest
import torch
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


@pytest.mark.parametrize(
    "source",
    [a_parquet, *(pytest.param(each, marks=pytest.mark.slow) for each in (a_tar, a_saved_table, an_image_folder))],
)
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


def everything(tmp_path, plain, images_drawer):
    """Every key of a dataset that can be set together with others, over every kind of source."""
    tree = images_drawer(tmp_path / "tree" / "2_girls", [(96, 96), (300, 100), (100, 140)])
    images_drawer(tmp_path / "tree" / "1_boys", [(90, 90), (100, 100)], captions=False)
    captions = {"image0.png": [r"1girl, long_hair, saber_\(fate\)", "1girl, solo, smile"]}
    (tree / "captions.json").write_text(json.dumps(captions))
    (tree / "image1_nl.txt").write_text("Two circles.\nA wide picture.")
    Image.new("RGBA", (96, 96), (200, 100, 50, 128)).save(tree / "veil.png")
    tables = [
        {"path": str(tmp_path / "tree"), "kohya_folders": True, "weight": 3, "trigger_word": "sks", "tag_dropout": 0.3},
        {**a_tar(plain), "weight": 1, "role": "regularization", "cache_shuffle_num": 2, "resolutions": [64, 128]},
        {**a_parquet(plain), "weight": 0.5, "size_buckets": [[96, 96], [128, 80]]},
    ]
    return {
        "resolutions": [96],
        "ar_buckets": [0.7, 1.0, [8, 5]],
        "num_repeats": 1.5,
        "subsample_ratio": 0.9,
        "no_upscale": True,
        "crop_position": "top",
        "horizontal_flip": True,
        "alpha_as_mask": True,
        "shuffle_tags": True,
        "keep_first_n_tags": 1,
        "protected_tags": ["smile"],
        "caption_prefix": "masterpiece, ",
        "replace_underscores": True,
        "unescape_parentheses": True,
        "captions_per_line": True,
        "caption_mode": "mixed",
        "nl_weight": 0.4,
        "max_bad_fraction": 0.2,
        "min_kept": 0.2,
        "directory": tables,
    }


@pytest.mark.slow
def test_all_keys_work_together_resume_bitwise_and_on_two_processes(
    trainer, tmp_path, plain, images_drawer, error, capsys
):
    keys = {
        "dataset": {"num_ar_buckets": None, **everything(tmp_path, plain, images_drawer)},
        "micro_batch_size_per_gpu": [[64, 3], [128, 2]],
        "uncond_fraction": 0.2,
        "normalize_masked_loss": True,
        "checkpoint_every_n_steps": 3,
        "cache_dir": str(tmp_path / "cache"),
    }
    whole = trainer("whole", max_steps=8, gradient_accumulation_steps=2, **keys)
    output = capsys.readouterr().out
    assert "captions are encoded during training" in output
    trainer("halves", max_steps=5, gradient_accumulation_steps=2, **keys)
    halves = trainer("halves", max_steps=8, gradient_accumulation_steps=2, resume=True, **keys)
    assert halves.losses == whole.losses
    two = trainer.processes(2, "two", max_steps=8, **keys)
    assert error(torch.tensor(two.losses), torch.tensor(whole.losses)) < 1e-5
    assert any("loss/regularization" in line for line in whole.metrics)
    assert "cache: 0 latents, 0 masks and 0 texts added" in capsys.readouterr().out
