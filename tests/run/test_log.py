"""Lines for people reach the terminal, and warnings the run's folder with the step they are about."""

import json
import logging

from anima_train.run.folder import RunFolder
from anima_train.run.log import PACKAGE, WarningsHandler, logged_to, terminal

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
