"""Lines for people reach the terminal, and warnings the run's folder with the step they are about."""

import json
import logging

import pytest

from anima_train.core.errors import DataError
from anima_train.core.format import Listing
from anima_train.run.folder import RunFolder
from anima_train.run.log import PACKAGE, WarningsHandler, lists_kept, logged_to, terminal

logger = logging.getLogger("anima_train.somewhere")


def kept(folder):
    return [json.loads(line) for line in folder.warnings_path.read_text().splitlines()]


def test_information_is_a_line_and_a_warning_says_so(capsys):
    with logged_to(terminal(is_main=True)):
        logger.info("saved %s", "a.safetensors")
        logger.warning("the loss is not finite", extra={"step": 1200})
        logger.warning("two\nlines")
    expected = ["saved a.safetensors", "warning: step 1,200: the loss is not finite", "warning: two", "lines"]
    assert capsys.readouterr().out.splitlines() == expected


def test_one_process_speaks(capsys):
    with logged_to(terminal(is_main=False)):
        logger.info("of another process")
        logger.warning("of another process")
        logger.error("a failure")
    assert capsys.readouterr().out == "error: a failure\n"


def test_nothing_is_shown_before_and_after(capsys):
    level = PACKAGE.level
    with logged_to(terminal(is_main=True)):
        pass
    logger.info("later")
    assert capsys.readouterr().out == ""
    assert PACKAGE.level == level
    assert PACKAGE.handlers == []


def test_escapes_of_a_terminal_are_shown_as_text(capsys):
    with logged_to(terminal(is_main=True)):
        logger.info("%s", "name\x1b[31m.png")
    assert capsys.readouterr().out == "name\\x1b[31m.png\n"


def test_a_list_of_which_the_terminal_shows_the_first_is_whole_in_the_folder(tmp_path, capsys):
    folder, speaker = RunFolder(tmp_path, "run"), terminal(is_main=True)
    folder.open()
    files = [f"shot{number}.png: zero bytes" for number in range(45)]
    speaker.where = folder.where_lists_are
    with logged_to(speaker), lists_kept(folder):
        logger.info(Listing("cannot be used: 45", files))
        logger.info(Listing.naming_first("masks 100% black", [f"m{number}.png\x1b" for number in range(3)]))
        logger.info("no list")
    folder.close()
    *lines, last, warning, plain = capsys.readouterr().out.splitlines()
    assert lines == ["cannot be used: 45", *(f"  {file}" for file in files[:20])]
    assert last == f"  ... and 25 more in {folder.path / 'lists.txt'}"
    assert (warning, plain) == (
        rf"masks 100% black: 3, such as m0.png\x1b; all in {folder.path / 'lists.txt'}", "no list",
    )  # fmt: skip
    kept_lines = folder.lists_path.read_text().splitlines()
    assert kept_lines[:46] == ["cannot be used: 45", *(f"  {file}" for file in files)]
    assert kept_lines[-3:-1] == [r"  m1.png\x1b", r"  m2.png\x1b"]


def test_a_refusal_leaves_its_list_and_says_where_and_the_next_start_begins_anew(tmp_path):
    folder = RunFolder(tmp_path, "run")
    folder.open()
    with pytest.raises(DataError) as caught, lists_kept(folder):
        raise DataError(["one", Listing("25 images have no caption:", map(str, range(25)))])
    assert str(folder.lists_path) in caught.value.where
    assert folder.lists_path.read_text().splitlines() == [
        "25 images have no caption:",
        *(f"  {n}" for n in range(25)),
        "",
    ]
    folder.close()
    folder.open()
    assert not folder.lists_path.exists()
    folder.close()


def test_a_warning_about_files_keeps_all_of_them(tmp_path):
    folder, handler = RunFolder(tmp_path, "run"), WarningsHandler()
    folder.open()
    handler.open(folder)
    with logged_to(handler):
        logger.warning(Listing.naming_first("skipped", ["a", "b"]), extra={"step": 3})
    folder.close()
    assert kept(folder) == [{"step": 3, "text": "skipped: 2, such as a", "entries": ["a", "b"]}]


def test_warnings_wait_for_the_records_and_follow_each_at_once(tmp_path):
    folder = RunFolder(tmp_path, "run")
    folder.open()
    handler = WarningsHandler()
    with logged_to(handler):
        logger.warning("a state is damaged")
        logger.info("not a warning")
        assert not folder.warnings_path.exists()
        handler.keep(0, "an image is skipped")
        handler.open(folder)
        logger.warning("no preview (%s)", "why", extra={"step": 7})
    folder.close()
    assert kept(folder) == [
        {"step": 0, "text": "a state is damaged"},
        {"step": 0, "text": "an image is skipped"},
        {"step": 7, "text": "no preview (why)"},
    ]
