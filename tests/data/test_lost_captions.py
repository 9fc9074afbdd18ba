"""Captions in a form that is not read stop a run that would train without them, with the one remedy."""

import json
from pathlib import Path

import pytest
from PIL import Image

from anima_train.core.errors import DataError
from anima_train.data.cache import Cache
from anima_train.data.scan import Scan, scan
from anima_train.data.settings import DatasetSettings


def look(folder: Path, **keys: object) -> Scan:
    dataset = DatasetSettings.model_validate({"resolutions": [64], "directory": [{"path": str(folder), **keys}]})
    return scan(dataset, [folder], [None], [Cache(folder / ".anima_cache")], seed=0, write=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images without captions."""
    for number in range(3):
        Image.new("RGB", (80, 80), (number, 0, 0)).save(tmp_path / f"p{number}.webp", lossless=True)
    return tmp_path


def write(folder: Path, pattern: str, text: str = "1girl, hat") -> None:
    """A file for each image, named by its stem."""
    for number in range(3):
        (folder / pattern.format(f"p{number}")).write_text(text)


@pytest.mark.parametrize(
    ("pattern", "remedy"),
    [
        ("{}.webp.txt", "rename them, p0.webp.txt to p0.txt"),
        ("{}.json", 'write them into one captions.json, {"file name": "caption"}'),
        ("{}.tags", "save them as text files that end in .txt"),
        ("{}_nl.txt", 'caption_mode = "nl" reads them'),
    ],
)
def test_files_of_the_same_stem_stop_the_run_with_a_remedy(folder: Path, pattern: str, remedy: str):
    write(folder, pattern)
    with pytest.raises(DataError) as caught:
        look(folder)
    (problem,) = caught.value.problems
    assert f"3 of 3 images would be trained without a caption, while 3 files, such as {pattern.format('p0')}" in problem
    assert remedy in problem
    assert 'missing_caption = "empty"' in problem


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_table_of_hugging_face_names_hf_dataset(folder: Path, name: str):
    (folder / name).write_text("file_name,text\np0.webp,a cat\n")
    with pytest.raises(DataError, match=r"hf_dataset = .* instead of path"):
        look(folder)


def test_another_table_names_captions_json(folder: Path):
    (folder / "meta_cap.json").write_text("{}")
    with pytest.raises(DataError, match=r"meta_cap\.json, may hold them: write them into one captions\.json"):
        look(folder)


@pytest.mark.parametrize(
    ("pattern", "remedy"),
    [
        ("{}_tags.txt", "p0_tags.txt, may hold them: rename them, p0_tags.txt to p0.txt"),
        ("{}.WEBP.txt", "p0.WEBP.txt, may hold them: rename them, p0.WEBP.txt to p0.txt"),
        ("{}-caption.txt", "p0-caption.txt, may hold them: rename them, p0-caption.txt to p0.txt"),
        ("texts/{}.txt", "texts/p0.txt, may hold them: move them beside their images"),
    ],
)
@pytest.mark.parametrize("recursive", [False, True])
def test_texts_with_other_names_or_elsewhere_stop_the_run(folder: Path, pattern: str, remedy: str, recursive: bool):
    (folder / "texts").mkdir()
    write(folder, pattern)
    with pytest.raises(DataError, match=f"while 3 files, such as {remedy}"):
        look(folder, recursive=recursive)


def test_texts_in_other_letters_and_lists_of_captions_stop_the_run_and_a_readme_does_not(folder: Path):
    (folder / "README.txt").write_text("from a camera")
    assert len(look(folder).samples) == 3
    (folder / "captions.txt").write_text("p0.webp a cat")
    with pytest.raises(
        DataError, match=r"1 file, such as captions\.txt, may hold them: write them into one captions\.json"
    ):
        look(folder)
    write(folder, "{}.txt")
    for number in range(3):
        (folder / f"p{number}.txt").rename(folder / f"P{number}.txt")
    with pytest.raises(DataError, match=r"3 files, such as P0\.txt, may hold them: rename them, P0\.txt to p0\.txt"):
        look(folder)


def test_a_captions_json_with_other_names_is_told(folder: Path):
    (folder / "captions.json").write_text(json.dumps({f"p{number}": "a cat" for number in range(3)}))
    with pytest.raises(DataError, match=r"captions\.json has other names than the images"):
        look(folder)


def test_what_is_meant_goes_on(folder: Path):
    write(folder, "{}.json")
    assert len(look(folder, missing_caption="empty").samples) == 3


def test_what_most_images_have_is_enough(folder: Path):
    (folder / "p0.txt").write_text("a cat")
    (folder / "p1.txt").write_text("")  # empty, and so meant
    (folder / "p2.json").write_text("{}")
    assert len(look(folder).samples) == 3


def test_images_without_anything_beside_them_are_trained_with_a_warning(folder: Path):
    found = look(folder)
    assert len(found.samples) == 3
    assert any("images without a .txt caption, trained with the empty one: 3" in warning for warning in found.warnings)
