"""Where paths are looked for, and what is said about those that lead nowhere."""

import os
from pathlib import Path

import pytest

from anima_train.config.paths import find_path, path_fault


def test_the_current_folder_comes_first_then_that_of_the_file(project):
    for folder in ("", "configs/"):
        project.write(f"{folder}both.txt", "")
    project.write("configs/beside.txt", "")
    base = Path("configs")
    assert find_path("both.txt", base) == Path("both.txt")
    assert find_path("beside.txt", base) == Path("configs/beside.txt")
    assert find_path("neither.txt", base) == Path("neither.txt")


def test_an_absolute_path_is_taken_as_it_is(project):
    assert find_path(str(project.folder / "nothing"), Path("data")) == project.folder / "nothing"


def test_the_home_folder_is_found(project, monkeypatch):
    monkeypatch.setenv("HOME", str(project.folder))
    assert find_path("~/data", Path()) == project.folder / "data"
    assert path_fault("~/data", Path(), "folder") is None
    assert path_fault("~/dato", Path(), "folder").endswith(f'; did you mean "{project.folder}/data"?')
    assert path_fault("~nobody-of-this-name/data", Path(), "folder").startswith('"~nobody-of-this-name/data" does not')


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data/catz", '; did you mean "data/cats"?'),
        ("data/CATS", '; did you mean "data/cats"?'),
        ("dta/cats", '; did you mean "data/cats"?'),
        ("data/catz/day", '; did you mean "data/cats/day"?'),
        ("data/catz/night", '; did you mean "data/cats"?'),
        ("data/zebras", ""),
        ("zoo/zebras", ' (there is no "zoo")'),
        ("data/cats/day/one.txt/deep", ""),
        ("houses/blu", '; did you mean "houses/blue"?'),
    ],
)
def test_a_missing_path_gets_the_nearest_sibling_of_its_first_missing_part(project, text, said):
    project.write("data/cats/day/one.txt", "")
    project.write("configs/houses/blue/one.txt", "")
    assert path_fault(text, Path("configs"), "file or folder") == f'"{text}" does not exist{said}'


def test_a_link_to_nothing_is_not_suggested_for_itself(project):
    os.symlink("gone", "link")
    assert path_fault("link", Path(), "folder") == '"link" does not exist'


@pytest.mark.parametrize(
    ("text", "wanted", "fault"),
    [
        ("data", "folder", None),
        ("data", "file or folder", None),
        ("a.txt", "file", None),
        ("data", "file", '"data" is a folder, expected a file'),
        ("a.txt", "folder", '"a.txt" is a file, expected a folder'),
        ("pipe", "file or folder", '"pipe" is a special file, expected a file or folder'),
        ("", "folder", 'found "", expected a folder'),
        ("x" * 300, "folder", f'"{"x" * 300}" cannot be used (File name too long)'),
        ("loop/a", "folder", '"loop/a" cannot be used (Too many levels of symbolic links)'),
        ("a\0b", "folder", '"a\\u0000b" cannot be used (embedded null byte)'),
    ],
)
def test_the_kind_is_checked_without_opening_anything(project, text, wanted, fault):
    project.write("a.txt", "")
    os.mkfifo("pipe")
    os.symlink("loop", "loop")
    assert path_fault(text, Path(), wanted) == fault


def test_escapes_for_a_terminal_are_not_printed(project):
    fault = path_fault("\x1b[2Ja\x9b", Path(), "folder")
    assert fault.isprintable()
    assert fault.startswith('"\\u001b[2Ja\\U0000009b" does not exist')
