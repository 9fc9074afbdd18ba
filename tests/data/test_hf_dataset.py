"""Hugging Face datasets on this machine, read with the real library, against the folder that they were made from."""

import concurrent.futures
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets.packaged_modules.parquet.parquet import Parquet
from PIL import Image

from anima_train.core.errors import DataError
from anima_train.data.cache import Cache
from anima_train.data.image_headers import Unreadable
from anima_train.data.samples import Sample
from anima_train.data.scan import Scan, scan
from anima_train.data.settings import DatasetSettings
from anima_train.data.sources import archive as archives
from anima_train.data.sources.archive import content_of
from anima_train.data.sources.folder import Files
from anima_train.data.sources.hf_dataset import hf_dataset_files, row_names

REPO = Path(__file__).parents[2]
COMMIT = "c0ffee" + "0" * 34

SOCKETS: list[str] = []  # what was done with sockets while a test listens
LISTENING = threading.Event()


def note_socket(event: str, arguments: tuple) -> None:
    if event.startswith("socket.") and LISTENING.is_set():
        SOCKETS.append(event)


sys.addaudithook(note_socket)  # there is no way to remove one


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where datasets keeps its copies: not at home."""
    folder = tmp_path / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", folder / "downloads")
    return folder


@pytest.fixture
def sockets() -> Iterator[list[str]]:
    """What the test does with sockets."""
    SOCKETS.clear()
    LISTENING.set()
    yield SOCKETS
    LISTENING.clear()


def encoded(name: str, side: int = 80, kind: str = "PNG") -> bytes:
    """An image whose pixels depend on its name."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    file = io.BytesIO()
    Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


NAMES = ["a.png", "b.png", "c.png"]
TEXTS = ["one", "two, 2", "\u4e09"]
ROWS = [{"bytes": encoded(name), "path": name} for name in NAMES]


def table(images: list | None = None, **columns: list) -> Dataset:
    """A table with a column of images and others."""
    images = ROWS if images is None else images
    made = Dataset.from_dict({"image": images, **columns})
    return made.cast_column("image", datasets.Image())


def parquet(path: Path, images: list | None = None, **columns: list) -> Path:
    table(images, **columns).to_parquet(path)
    return path


def image_folder(path: Path, names: list[str], texts: list[str] | None = None) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(encoded(name))
    if texts is not None:
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in zip(names, texts, strict=True)]
        (path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return path


def load(place: Path, offline: bool = True, **keys: object) -> Files:
    dataset = DatasetSettings.model_validate({"directory": [{"hf_dataset": str(place), **keys}]})
    return hf_dataset_files(dataset.directory[0], place, offline)


def look(place: Path, options: dict | None = None, **keys: object) -> Scan:
    """Scan one dataset, its cache beside it."""
    dataset = DatasetSettings.model_validate(
        {
            "resolutions": [64], "enable_ar_bucket": False, **(options or {}),
            "directory": [{"hf_dataset": str(place), **keys}],
        }
    )  # fmt: skip
    return scan(dataset, [place], [None], [Cache(place.parent / "cache")], seed=0, write=True, offline=True)


def contents(files: Files) -> list[bytes]:
    return [content_of(files.file(name)) for name in files.images]


def failure(place: Path, offline: bool = True, **keys: object) -> list[str]:
    """The problems, which are sentences and name the dataset."""
    with pytest.raises(DataError) as caught:
        load(place, offline, **keys)
    for problem in caught.value.problems:
        assert problem.startswith(f"hf_dataset {place}: ")
        assert "\n" not in problem
    return [problem.removeprefix(f"hf_dataset {place}: ") for problem in caught.value.problems]


# Kinds of datasets


def a_parquet(folder: Path) -> Path:
    return parquet(folder / "x.parquet", text=TEXTS)


def a_folder_of_parquets(folder: Path) -> Path:
    (folder / "shards").mkdir()
    parquet(folder / "shards" / "train-0.parquet", ROWS[:2], text=TEXTS[:2])
    parquet(folder / "shards" / "train-1.parquet", ROWS[2:], text=TEXTS[2:])
    return folder / "shards"


def an_image_folder(folder: Path) -> Path:
    return image_folder(folder / "pictures", NAMES, TEXTS)


def a_zipped_image_folder(folder: Path) -> Path:
    image_folder(folder / "loose", NAMES, TEXTS)
    (folder / "zipped").mkdir()
    with zipfile.ZipFile(folder / "zipped" / "x.zip", "w") as archive:
        for file in sorted((folder / "loose").iterdir()):
            archive.write(file, file.name)
    return folder / "zipped"


def a_saved_table(folder: Path) -> Path:
    table(text=TEXTS).save_to_disk(folder / "saved")
    return folder / "saved"


def saved_splits(folder: Path) -> Path:
    DatasetDict({"test": table([None], text=["no"]), "train": table(text=TEXTS)}).save_to_disk(folder / "splits")
    return folder / "splits"


KINDS = [a_parquet, a_folder_of_parquets, an_image_folder, a_zipped_image_folder, a_saved_table, saved_splits]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_dataset_gives_the_samples_of_the_plain_folder(tmp_path: Path, kind, sockets: list[str]) -> None:
    plain = image_folder(tmp_path / "plain", NAMES)
    for name, text in zip(NAMES, TEXTS, strict=True):
        (plain / name).with_suffix(".txt").write_text(text, encoding="utf-8")
    keys = {"resolutions": [64], "enable_ar_bucket": False}
    dataset = DatasetSettings.model_validate({**keys, "directory": [{"path": str(plain)}]})
    expected = scan(dataset, [plain], [None], [Cache(tmp_path / "cache")], seed=0, write=False)
    place = kind(tmp_path)
    sockets.clear()
    found = look(place)
    assert sockets == []

    def facts(sample: Sample) -> tuple:
        picture = sample.picture
        return sample.id, sample.captions(0), sample.size, picture.sha256, content_of(picture.source)

    assert list(map(facts, found.samples)) == list(map(facts, expected.samples))
    assert [str(sample.picture.path) for sample in found.samples] == [str(place / name) for name in NAMES]
    assert (found.num_images, found.bad, found.warnings) == (3, [], [])


def test_images_may_be_bare_bytes_or_written_by_other_programs(tmp_path: Path) -> None:
    bare = [row["bytes"] for row in ROWS]
    for number, kind in enumerate((pa.binary(), pa.large_binary())):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"image": pa.array([*bare, None], kind)}), path)
        files = load(path, caption_column="")
        assert files.images == ["00000000", "00000001", "00000002", "00000003"]
        assert contents(load(path, caption_column="", hf_split="train[:3]")) == bare
    path = tmp_path / "foreign.parquet"
    pq.write_table(pa.table({"picture": [*ROWS, None]}), path)
    files = load(path, image_column="picture", caption_column="")
    assert files.images == [*NAMES, "00000003"]
    assert [content_of(files.file(name)) for name in NAMES] == bare


def test_a_file_that_the_table_names_is_found_beside_it(tmp_path: Path) -> None:
    image_folder(tmp_path, ["sub/a.png"])
    images = [{"bytes": None, "path": "sub/a.png"}, {"bytes": None, "path": "gone.png"}]
    column = pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"image": column}), tmp_path / "x.parquet")
    found = look(tmp_path / "x.parquet", caption_column="")
    assert [content_of(sample.picture.source) for sample in found.samples] == [encoded("sub/a.png")]
    assert found.bad == [f"{tmp_path}/x.parquet/gone.png: not readable (No such file or directory)"]


def referring(folder: Path, *paths: str) -> Path:
    """A table whose rows name files and hold none."""
    images = [{"bytes": None, "path": path} for path in paths]
    column = pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"image": column, "mask": column}), folder / "x.parquet")
    return folder / "x.parquet"


def test_rows_read_no_file_that_is_not_below_the_dataset(tmp_path: Path, opened: list[str]) -> None:
    image_folder(tmp_path / "secret", ["a.png", "b.png", "c.png"])
    with zipfile.ZipFile(tmp_path / "secret" / "d.zip", "w") as archive:
        archive.write(tmp_path / "secret" / "a.png", "e.png")
    place = tmp_path / "data"
    image_folder(place, ["sub/in.png"])
    os.symlink(tmp_path / "secret" / "b.png", place / "link.png")  # whoever has the folder put it there
    outside = [
        f"{tmp_path}/secret/a.png", "../secret/a.png", "sub/../../secret/c.png", "/data/../etc/x.png",
        f"zip://e.png::{tmp_path}/secret/d.zip", "zip://e.png::../secret/d.zip", f"{place}/../secret/a.png",
        f"{tmp_path}/data-2/a.png",
    ]  # fmt: skip
    inside = ["sub/in.png", f"{place}/sub/../sub/in.png", "link.png"]
    path = referring(place, *outside, *inside)
    opened.clear()
    found = look(path, caption_column="", mask_column="mask")
    assert not {"a.png", "c.png", "d.zip"} & set(opened)
    assert [content_of(sample.picture.source) for sample in found.samples] == [
        encoded("sub/in.png"), encoded("sub/in.png"), encoded("b.png"),
    ]  # fmt: skip
    assert len(found.bad) == len(outside) == found.num_images - len(inside)
    assert found.bad[1] == (
        f"{path}/00000001: its row names '../secret/a.png', which is not below the dataset, and never read"
    )


def test_rows_may_name_their_files_by_a_link_to_the_dataset(tmp_path: Path) -> None:
    image_folder(tmp_path / "real" / "data", ["sub/in.png", "b.png", "c.png"])
    image_folder(tmp_path / "real" / "other", ["d.png"])
    os.symlink(tmp_path / "real", tmp_path / "link")
    place = tmp_path / "link" / "data"
    paths = [f"{place}/sub/in.png", f"{tmp_path}/real/data/b.png", f"{place}/c.png", f"{place}/../other/d.png"]
    found = look(referring(place, *paths), caption_column="", mask_column="mask")
    assert {content_of(sample.picture.source) for sample in found.samples} == {
        encoded(name) for name in ("sub/in.png", "b.png", "c.png")
    }
    (bad,) = found.bad
    assert "/../other/d.png', which is not below the dataset" in bad
    assert row_names(paths[:3], place) == ["sub/in.png", "b.png", "c.png"]


def test_masks_that_rows_name_elsewhere_are_not_read_either(tmp_path: Path) -> None:
    image_folder(tmp_path, ["m.png"])
    (tmp_path / "data").mkdir()
    mask = pa.array(
        [{"bytes": None, "path": f"{tmp_path}/m.png"}], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    pq.write_table(pa.table({"image": [ROWS[0]], "mask": mask}), tmp_path / "data" / "x.parquet")
    found = look(tmp_path / "data" / "x.parquet", caption_column="", mask_column="mask")
    assert found.samples == []
    assert "its mask mask/" in found.bad[0]
    assert "which is not below the dataset" in found.bad[0]


# Names


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["a.png", "b.jpg"], ["a.png", "b.jpg"]),
        (["/home/me/a.png", "C:\\me\\b.png"], ["a.png", "b.png"]),  # nothing of who made it
        (["a.png", None], ["a.png", "00000001"]),
        (["a.png", "a.jpg"], ["00000000", "00000001"]),  # they would share caption and mask
        (["x/a.png", "y/a.png"], ["00000000", "00000001"]),
        ([None, None], ["00000000", "00000001"]),
        (["00000001.png", None], ["00000000", "00000001"]),
    ],
)
def test_rows_have_the_names_of_their_files_where_those_are_unique(
    tmp_path: Path, paths: list, expected: list[str]
) -> None:
    images = [{"bytes": row["bytes"], "path": path} for row, path in zip(ROWS, paths, strict=False)]
    files = load(parquet(tmp_path / "x.parquet", images, text=["x", "y"]))
    assert files.images == expected
    assert files.listed_captions == {expected[0]: ("x",), expected[1]: ("y",)}
    assert contents(files) == [row["bytes"] for row in ROWS[:2]]


def test_names_in_an_image_folder_are_paths_but_kohya_folders_does_not_read_them(tmp_path: Path) -> None:
    image_folder(tmp_path / "pictures", ["10_cat/1.png", "dog/1.png"])
    os.symlink(tmp_path / "pictures", tmp_path / "link")
    for place in (tmp_path / "pictures", tmp_path / "link"):
        found = look(place, {"kohya_folders": True}, caption_column="")
        assert [sample.id for sample in found.samples] == ["0/10_cat/1.png@64", "0/dog/1.png@64"]
        assert [sample.repeats for sample in found.samples] == [1, 1]


# Columns


def test_captions_are_texts_or_lists_of_texts_or_missing(tmp_path: Path) -> None:
    images = [{"bytes": encoded(f"{number}"), "path": f"{number}.png"} for number in range(6)]
    text = Dataset.from_dict(
        {"tags": [["a", "b\r\nc"], None, [], [None, " d\0 "], [""], ["e"]], "nl": ["A.", None, "", " C.", "D.", "E."]},
        features=Features({"tags": List(Value("string")), "nl": Value("large_string")}),
    )
    path = tmp_path / "x.parquet"
    datasets.concatenate_datasets([table(images), text], axis=1).to_parquet(path)
    files = load(path, caption_column="tags", natural_column="nl")
    assert files.listed_captions == {"0.png": ("a", "b\nc"), "3.png": ("d",), "4.png": ("",), "5.png": ("e",)}
    natural = {"0.png": "A.", "2.png": "", "3.png": "C.", "4.png": "D.", "5.png": "E."}
    assert files.listed_natural == {name: (text,) for name, text in natural.items()}
    found = look(
        path, {"caption_mode": "mixed", "skip_empty_caption": True}, caption_column="tags", natural_column="nl"
    )
    assert [sample.picture.path.name for sample in found.samples] == ["0.png", "3.png", "4.png", "5.png"]
    assert found.samples[0].picture.tags == ("a", "b\nc")
    assert found.samples[0].picture.natural == ("A.",)
    with pytest.raises(DataError, match=re.escape('missing_caption is "error"')):
        look(path, {"missing_caption": "error"}, caption_column="tags")


def test_a_column_of_nothing_is_one_without_captions(tmp_path: Path) -> None:
    files = load(parquet(tmp_path / "x.parquet", text=[None] * 3), natural_column="text")
    assert files.listed_captions == files.listed_natural == {}


def test_columns_that_are_missing_or_hold_something_else_are_all_named(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", label=[1, 2, 3])
    found = "found 'image', 'label'."
    assert failure(path) == [f"no column 'text'; {found} Set caption_column to one of them, or to \"\" for none"]
    assert failure(path, image_column="img", caption_column="label", natural_column="nl", mask_column="label") == [
        f"no column 'img'; {found} Set image_column to one of them",
        "the column 'label' holds Value('int64'), expected texts or lists of texts; "
        'set caption_column to another, or to "" for none',
        f"no column 'nl'; {found} Set natural_column to one of them, or to \"\" for none",
        "the column 'label' holds Value('int64'), expected images; set mask_column to another, or to \"\" for none",
    ]
    (problem,) = failure(path, image_column="label", caption_column="")
    assert problem == "the column 'label' holds Value('int64'), expected images; set image_column to another"


def test_text_that_is_not_utf_8_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    text = pa.array([b"a", b"caf\xe9", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"image": ROWS, "text": text}), path)
    assert failure(path) == ["the column 'text' holds text that is not UTF-8"]


def test_rows_without_an_image_and_damaged_ones_are_skipped(tmp_path: Path) -> None:
    images = [*ROWS, None, {"bytes": ROWS[0]["bytes"][:99], "path": "cut.png"}, {"bytes": b"", "path": "empty.png"}]
    path = parquet(tmp_path / "x.parquet", images, text=[*TEXTS, "", "", ""])
    found = look(path)
    assert [sample.picture.path.name for sample in found.samples] == NAMES
    assert found.num_images == 6
    assert sorted(found.bad) == [
        f"{path}/00000003: no image in this row",
        f"{path}/cut.png: truncated: the PNG ends inside its IDAT chunk",
        f"{path}/empty.png: zero bytes",
    ]


def test_masks_are_those_of_the_row(tmp_path: Path) -> None:
    masks = [{"bytes": encoded("mask"), "path": "other.png"}, None, {"bytes": b"no image", "path": None}]
    made = table(text=TEXTS, mask=masks).cast_column("mask", datasets.Image())
    made.to_parquet(tmp_path / "x.parquet")
    found = look(tmp_path / "x.parquet", mask_column="mask")
    first, second = found.samples
    assert content_of(first.picture.mask) == encoded("mask")
    assert first.has_mask
    assert not second.has_mask
    assert found.bad == [f"{tmp_path}/x.parquet/c.png: its mask mask/c: not an image (text)"]
    assert found.warnings == [f"{tmp_path}/x.parquet: images without a mask, trained whole: 1, such as b.png"]
    assert not any(sample.has_mask for sample in look(tmp_path / "x.parquet").samples)


# Splits and subsets


@pytest.mark.parametrize("kind", [a_parquet, an_image_folder, a_saved_table, saved_splits])
def test_splits_can_be_cut(tmp_path: Path, kind) -> None:
    place = kind(tmp_path)
    assert load(place, hf_split="train[:2]").images == NAMES[:2]
    assert load(place, hf_split="train[-1:]").images == NAMES[2:]
    files = load(place, hf_split="train[:1]+train[2:]")
    assert files.images == ["a.png", "c.png"]
    assert files.listed_captions == {"a.png": ("one",), "c.png": ("\u4e09",)}
    assert contents(files) == [encoded("a.png"), encoded("c.png")]
    (problem,) = failure(place, hf_split="nope")
    assert problem.startswith('Unknown split "nope". Should be one of [')
    assert problem.endswith("'train']; set hf_split")
    assert failure(place, hf_split="train[a]") == ["Unrecognized instruction format: train[a]; set hf_split"]


def test_another_split_is_another_identity(tmp_path: Path) -> None:
    place = saved_splits(tmp_path)
    assert load(place, hf_split="test").images == ["00000000"]
    assert load(place, hf_split="test").identity != load(place).identity == load(place).mask_identity


def test_a_subset_is_chosen_by_name(tmp_path: Path) -> None:
    place = tmp_path / "two"
    for name in ("one", "two"):
        (place / name).mkdir(parents=True)
        parquet(place / name / "x.parquet", ROWS[:1] if name == "one" else ROWS[1:], text=["x"] * (1, 2)[name == "two"])
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("one", "two"))
    (place / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert load(place, hf_subset="two").images == NAMES[1:]
    (problem,) = failure(place)
    assert "['one', 'two']" in problem
    assert "hf_subset" in problem
    (problem,) = failure(place, hf_subset="three")
    assert problem == (
        "BuilderConfig 'three' not found. Available: ['one', 'two']; check hf_dataset, hf_subset and hf_revision"
    )


# What cannot be loaded


def test_keys_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    assert failure(a_parquet(tmp_path), hf_subset="x", hf_revision="main") == [
        "has no subsets; remove hf_subset",
        "is not on the Hub, and so has no revisions; remove hf_revision",
    ]
    (tmp_path / "x.csv").write_text("image,text\n")
    assert failure(tmp_path / "x.csv") == ["expected owner/name, a .parquet file or a folder; for a .tar file set path"]


def test_what_is_damaged_or_empty_is_explained(tmp_path: Path, datasets_cache: Path) -> None:
    (tmp_path / "empty").mkdir()
    (problem,) = failure(tmp_path / "empty")
    assert problem.endswith("doesn't contain any data files; check hf_dataset, hf_subset and hf_revision")
    (tmp_path / "bad.parquet").write_bytes(b"not parquet" * 100)
    (problem,) = failure(tmp_path / "bad.parquet")
    assert problem.startswith("Parquet magic bytes not found")
    assert problem.endswith("; repair its files, or download them again")
    whole = parquet(tmp_path / "cut.parquet", text=TEXTS).read_bytes()
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "x.parquet").write_bytes(whole[:-100])
    (problem,) = failure(tmp_path / "shards")
    assert problem.endswith("; repair its files, or download them again")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "state.json").write_text("{")
    (problem,) = failure(tmp_path / "state")
    assert problem.endswith("; write it again with save_to_disk")
    (tmp_path / "state" / "state.json").write_text("[]")
    (tmp_path / "state" / "dataset_info.json").write_text("{}")
    (problem,) = failure(tmp_path / "state")
    assert problem.endswith("; write it again with save_to_disk")
    (tmp_path / "zips").mkdir()
    (tmp_path / "zips" / "x.zip").write_bytes(b"PK\3\4 no archive")
    failure(tmp_path / "zips")
    datasets_cache.rename(tmp_path / "moved")
    datasets_cache.write_text("a file where a folder should be")
    (problem,) = failure(tmp_path / "cut.parquet")
    assert "datasets" in problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (": : [", "while parsing a block mapping"),
        ("configs: 5", "Expected configs to be a list"),
        ("configs:\n- config_name: default\n  data_files: nope.parquet", "Unable to find "),
        ("dataset_info:\n  features:\n  - name: zz\n    dtype: string", "Couldn't cast image: "),
    ],
)
def test_a_readme_that_does_not_fit_is_explained(tmp_path: Path, text: str, expected: str) -> None:
    place = a_folder_of_parquets(tmp_path)
    (place / "README.md").write_text(f"---\n{text}\n---\n")
    (problem,) = failure(place)
    assert problem.startswith(expected)
    assert len(problem) < 400


def test_code_of_a_dataset_is_not_run(tmp_path: Path) -> None:
    place = image_folder(tmp_path / "tricky", NAMES, TEXTS)
    ran = tmp_path / "ran"
    (place / "tricky.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    (problem,) = failure(place)
    assert problem.startswith("Dataset scripts are no longer supported")
    assert not ran.exists()


def test_names_of_the_librarys_own_loaders_mean_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_folder(tmp_path / "imagefolder", NAMES, TEXTS)
    monkeypatch.chdir(tmp_path)
    assert load(Path("imagefolder")).images == NAMES


# The Hub


def test_offline_a_dataset_that_is_not_cached_is_refused_without_any_socket(sockets: list[str]) -> None:
    (problem,) = failure(Path("owner/name"))
    assert problem.startswith("Couldn't find cache for owner/name; offline mode is on, so load it once without")
    (problem,) = failure(Path("owner/name"), hf_subset="x", hf_revision=COMMIT)
    assert problem.startswith("Couldn't find cache for owner/name for config 'x'; offline mode is on")
    assert sockets == []


def test_offline_a_dataset_that_is_cached_is_used_without_any_socket(
    tmp_path: Path, datasets_cache: Path, sockets: list[str]
) -> None:
    """The cache is written by the builder that a dataset of the Hub gets, and then moved to where that would be."""
    builder = Parquet(dataset_name="name", hash=COMMIT, data_files={"train": str(a_parquet(tmp_path))})
    builder.download_and_prepare()
    cached = datasets_cache / "owner___name" / "default" / "0.0.0" / COMMIT
    cached.parent.mkdir(parents=True)
    shutil.move(builder.cache_dir, cached)
    sockets.clear()
    files = load(Path("owner/name"))
    assert files.images == NAMES
    assert contents(files) == [row["bytes"] for row in ROWS]
    assert load(Path("owner/name"), hf_revision=COMMIT, hf_split="train[:1]").images == NAMES[:1]
    (problem,) = failure(Path("owner/name"), hf_revision="v2")
    assert problem == (
        f"revision v2 cannot be looked up; the one in the cache is commit {COMMIT}; "
        "set hf_revision to that, or load it once with a connection"
    )
    assert sockets == []


CARD = "---\nconfigs:\n- config_name: default\n  data_files: {}\n---\n"


@pytest.mark.parametrize(
    "place",
    [
        "http://127.0.0.1:9/train.parquet", "hf://datasets/owner/name/train.parquet", "/etc/*.parquet",
        "../other/*.parquet", "zip://a.parquet::http://127.0.0.1:9/x.zip", "ftp://127.0.0.1/x.parquet",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize("offline", [True, False])
def test_a_folder_that_names_data_elsewhere_is_refused_before_anything_is_fetched(
    tmp_path: Path, sockets: list[str], place: str, name: str, offline: bool
) -> None:
    folder = a_folder_of_parquets(tmp_path)
    card = CARD.format(f"[{{split: train, path: '{place}'}}]")
    (folder / name).write_text(card if name == "README.md" else card.strip("-\n"))
    (problem,) = failure(folder, offline=offline)
    assert problem.startswith(f"its {name} names data outside of the folder, '{place}', which is never fetched")
    assert sockets == []


@pytest.mark.parametrize(
    "keys",
    [
        "data_dir: ../other",
        "data_files: http://127.0.0.1:9/x.parquet",
        "data_files: ['*.parquet', http://127.0.0.1:9/x.parquet]",
        "data_files: [{split: train, path: ['*.parquet', http://127.0.0.1:9/x.parquet]}]",
        "data_files: '*.parquet'\n- config_name: other\n  data_files: http://127.0.0.1:9/x.parquet",
    ],
)
def test_data_elsewhere_is_found_wherever_a_card_can_name_it(tmp_path: Path, sockets: list[str], keys: str) -> None:
    folder = a_folder_of_parquets(tmp_path)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  {keys}\n---\n")
    assert "names data outside" in failure(folder)[0]
    assert sockets == []


def test_a_folder_that_names_its_own_data_is_read(tmp_path: Path, sockets: list[str]) -> None:
    folder = a_folder_of_parquets(tmp_path)
    (folder / "README.md").write_text(CARD.format("'*.parquet'"))
    assert load(folder, offline=False).images == NAMES
    assert sockets == []


@pytest.mark.parametrize(
    ("kind", "content"), [("csv", "image,text\na,b\n"), ("json", '[{"image": "a"}]'), ("txt", "x")]
)
def test_a_folder_that_holds_no_table_of_images_is_refused(tmp_path: Path, kind: str, content: str) -> None:
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / f"train.{kind}").write_text(content)
    (problem,) = failure(tmp_path / "table")
    name = "text" if kind == "txt" else kind
    assert problem.startswith(f"datasets would read it as {name}; expected images in folders or zip files, parquet")


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(1 << 20))
    monkeypatch.setattr(archives, "MAX_BYTES", (1 << 20) - 1)
    with pytest.raises(Unreadable, match="1,048,576 bytes is more than the limit"):
        archives.ReferencedImage(tmp_path / "x.zip", "a.png").read()


def hub_handler(repositories: dict[str, dict[str, bytes]], requests: list[str]) -> type[BaseHTTPRequestHandler]:
    """A Hub with datasets of one commit each."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            requests.append(path)
            file = path.rpartition("/")[2]
            repository = next((files for name, files in repositories.items() if name in path), None)
            if repository is None or "/nope/" in path:
                self.answer(404, **{"X-Error-Code": "RepoNotFound" if repository is None else "RevisionNotFound"})
            elif "/resolve/" in path and file in repository:
                etag = git_hash(repository[file])
                self.answer(200, repository[file], **{"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
            elif "/resolve/" in path:
                self.answer(404, **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            elif "/tree/" in path:
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
                    for name, content in repository.items()
                ]
                self.answer(200, json.dumps(entries).encode())
            else:
                siblings = [{"rfilename": name} for name in repository]
                self.answer(200, json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": siblings}).encode())

        do_HEAD = do_GET

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob " + str(len(content)).encode() + b"\0" + content).hexdigest()


LOAD = """
import sys, urllib.request; from pathlib import Path
from anima_train.core.errors import DataError
from anima_train.data.settings import DatasetSettings
from anima_train.data.sources.hf_dataset import hf_dataset_files
def load(name, offline=False, **keys):
    dataset = DatasetSettings.model_validate({"directory": [{"hf_dataset": name, **keys}]})
    try:
        files = hf_dataset_files(dataset.directory[0], Path(name), offline)
        print(files.images, files.listed_captions, [files.members[name].stamp for name in files.images])
    except DataError as error:
        print(error)
"""


def on_a_hub(
    folder: Path, repositories: dict[str, dict[str, bytes]], code: str
) -> tuple[subprocess.CompletedProcess, list[str]]:
    """What code prints and requests of a Hub on this machine: in a process of its own, as the address is read once."""
    requests: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), hub_handler(repositories, requests)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        result = subprocess.run(
            [sys.executable, "-c", LOAD + code, address],
            capture_output=True, text=True, check=True, cwd=REPO,
            env={**environment, "HF_HOME": str(folder / "hf"), "HF_ENDPOINT": address},
        )  # fmt: skip
        server.shutdown()
    return result, requests


def test_a_dataset_of_the_hub_is_downloaded_once(tmp_path: Path) -> None:
    code = (
        'load("owner/name")\n'
        'load("owner/name", hf_revision="nope")\n'
        'load("owner/gone")\n'
        'urllib.request.urlopen(f"{sys.argv[1]}/owner/name/offline").close()\n'
        'load("owner/name", True)\n'
    )
    result, requests = on_a_hub(tmp_path, {"owner/name": {"train.parquet": a_parquet(tmp_path).read_bytes()}}, code)
    online, revision, gone, offline = result.stdout.splitlines()
    assert online.startswith(f"{NAMES} {dict(zip(NAMES, [(text,) for text in TEXTS], strict=True))} ")
    assert offline == online
    assert requests[-1] == "/owner/name/offline"
    assert "examples" not in result.stderr  # no progress bars in a log
    advice = "; check hf_dataset and hf_revision; for a private one, log in with `hf auth login`"
    assert (
        revision == f"hf_dataset owner/name: Revision 'nope' doesn't exist for dataset 'owner/name' on the Hub{advice}"
    )
    assert gone == f"hf_dataset owner/gone: Dataset 'owner/gone' doesn't exist on the Hub or cannot be accessed{advice}"


def test_a_dataset_of_the_hub_that_is_refused_is_not_downloaded(tmp_path: Path) -> None:
    """Read as something else than images, or from another dataset."""
    card = CARD.format("hf://datasets/owner/name/train.parquet").encode()
    repositories = {
        "owner/name": {"train.parquet": a_parquet(tmp_path).read_bytes()},
        "owner/tars": {"train.tar": b"x" * 1024},
        "owner/tables": {"train.csv": b"image,text\na,b\n"},
        "owner/thief": {"README.md": card, "own.parquet": b"x"},
    }
    code = 'for name in ("tars", "tables", "thief"): load(f"owner/{name}")'
    result, requests = on_a_hub(tmp_path, repositories, code)
    tars, tables, thief = result.stdout.splitlines()
    assert tars.startswith("hf_dataset owner/tars: datasets would read it as webdataset; expected images in folders")
    assert tables.startswith("hf_dataset owner/tables: datasets would read it as csv; expected images in folders")
    assert re.match("hf_dataset owner/thief: (Data files don't belong to|names data outside of itself)", thief)
    assert any("/resolve/" in path and path.endswith("/README.md") for path in requests)  # it would be noticed
    assert [path for path in requests if "/resolve/" in path and path.endswith((".parquet", ".tar", ".csv"))] == []


# Stamps: a second start reads no image


def stamps(files: Files) -> list[tuple[int, int, int]]:
    return [files.members[name].stamp for name in files.images]


@pytest.mark.parametrize("kind", KINDS)
def test_stamps_tell_images_and_contents_apart(tmp_path: Path, kind) -> None:
    place = kind(tmp_path)
    before = stamps(load(place))
    assert before == stamps(load(place))
    assert len(set(before)) == (1 if kind is a_zipped_image_folder else 3)  # one file, of which each knows its name
    for path in [place] if place.is_file() else list(place.rglob("*")):
        if path.is_file():
            path.unlink()
    changed = [{"bytes": encoded(f"new {name}"), "path": name} for name in NAMES]
    if kind in (an_image_folder, a_zipped_image_folder):
        image_folder(tmp_path / "new", NAMES, TEXTS)
        for name in NAMES:
            (tmp_path / "new" / name).write_bytes(encoded(f"new {name}"))
        if kind is an_image_folder:
            shutil.copytree(tmp_path / "new", place, dirs_exist_ok=True)
        else:
            with zipfile.ZipFile(place / "x.zip", "w") as archive:
                for file in (tmp_path / "new").iterdir():
                    archive.write(file, file.name)
    elif kind in (a_parquet, a_folder_of_parquets):
        parquet(place if place.is_file() or place.suffix else place / "train-0.parquet", changed, text=TEXTS)
    else:
        shutil.rmtree(place)
        made = table(changed, text=TEXTS)
        (made if kind is a_saved_table else DatasetDict({"train": made})).save_to_disk(place)
    files = load(place)
    assert not set(before) & set(stamps(files))
    assert contents(files) == [encoded(f"new {name}") for name in NAMES]


def test_stamps_of_two_columns_differ(tmp_path: Path) -> None:
    table(other=ROWS).cast_column("other", datasets.Image()).to_parquet(tmp_path / "x.parquet")
    first = load(tmp_path / "x.parquet", caption_column="")
    second = load(tmp_path / "x.parquet", caption_column="", image_column="other")
    assert not set(stamps(first)) & set(stamps(second))


@pytest.mark.parametrize("kind", [a_parquet, an_image_folder, saved_splits])
def test_a_second_scan_reads_no_image(tmp_path: Path, kind) -> None:
    """What it remembers is changed, and comes back."""
    place = kind(tmp_path)
    look(place)
    (memo,) = (tmp_path / "cache").glob("images_*.json")
    known = json.loads(memo.read_text().partition("\n")[2])  # behind its checksum
    for facts in known.values():
        facts[3] = "remembered"
    content = json.dumps(known)
    memo.write_text(f"{hashlib.sha256(content.encode()).hexdigest()}\n{content}")
    assert [sample.picture.sha256 for sample in look(place).samples] == ["remembered"] * 3


def test_stamps_are_the_same_in_another_process(tmp_path: Path, datasets_cache: Path) -> None:
    places = [kind(tmp_path) for kind in (a_parquet, an_image_folder, saved_splits)]
    found = [stamps(load(place, hf_split="train[:2]")) for place in places]
    code = (
        "import sys; from pathlib import Path; from anima_train.data.settings import DatasetSettings\n"
        "from anima_train.data.sources.hf_dataset import hf_dataset_files\n"
        "for place in sys.argv[1:]:\n"
        "    directory = {'hf_dataset': place, 'hf_split': 'train[:2]'}\n"
        "    dataset = DatasetSettings.model_validate({'directory': [directory]})\n"
        "    files = hf_dataset_files(dataset.directory[0], Path(place), True)\n"
        "    print([files.members[name].stamp for name in files.images])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, places)],
        capture_output=True, text=True, check=True, cwd=REPO,
        env={**os.environ, "HF_DATASETS_CACHE": str(datasets_cache)},
    )  # fmt: skip
    assert result.stdout.splitlines() == list(map(str, found))
    assert result.stderr == ""


def test_threads_read_at_the_same_time(tmp_path: Path) -> None:
    images = [{"bytes": encoded(str(number), 16), "path": f"{number}.png"} for number in range(50)]
    files = load(parquet(tmp_path / "x.parquet", images), caption_column="")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda name: (name, content_of(files.file(name))), files.images * 4))
    assert read == [(row["path"], row["bytes"]) for row in images] * 4
