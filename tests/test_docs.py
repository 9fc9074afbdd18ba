"""What the documentation names is there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
DOCS = sorted([REPO / "README.md", *(REPO / "docs").glob("*.md")])
TEST = re.compile(r"(tests/[\w/]+\.py)::(\w+)")
FILE = re.compile(r"`(tests/[\w/]+\.py)`")
LINK = re.compile(r"\]\(([^)#]+)")


def missing(text: str, folder: Path) -> set[str]:
    """The tests, test files and links in a text for which there is nothing; links start from a folder."""
    found = {name for name in FILE.findall(text) if not (REPO / name).is_file()}
    for name, test in set(TEST.findall(text)):
        if not (REPO / name).is_file() or test not in functions(REPO / name):
            found.add(f"{name}::{test}")
    links = {link for link in LINK.findall(text) if "://" not in link}
    return found | {link for link in links if not (folder / link).exists()}


@cache
def functions(path: Path) -> set[str]:
    """The names of a module's functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("path", DOCS, ids=[path.name for path in DOCS])
def test_every_test_and_file_that_is_named_exists(path):
    assert missing(path.read_text(encoding="utf-8"), path.parent) == set()


def test_what_does_not_exist_would_be_found():
    wrong = {"tests/test_docs.py::test_nothing", "tests/none.py::test_a", "tests/none.py", "none.md"}
    text = "`tests/test_docs.py::test_nothing` `tests/none.py::test_a` `tests/none.py` [a](none.md) [b](https://b.org)"
    assert missing(text, REPO) == wrong


def test_every_section_of_the_faults_names_tests_in_every_row():
    rows = [line for line in (REPO / "docs" / "faults.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| what goes wrong |")]
    assert len(rows) > 70
    assert [row for row in rows if not TEST.search(row)] == []


def test_the_map_names_every_module():
    text = (REPO / "anima_train" / "README.md").read_text(encoding="utf-8")
    drawn = set(re.findall(r"\w+", text.partition("```")[2].partition("```")[0]))
    modules = [path for path in (REPO / "anima_train").glob("[a-z]*/*.py") if path.stem != "__init__"]
    rooms = {path.parent.name for path in modules}
    assert rooms - drawn == set()
    helpers = {"cli", "reports", "data"}  # of these the map names the main ones
    assert {path.stem for path in modules if path.parent.name not in helpers} - drawn == set()
    for path in re.findall(r"`(\w+/\w+\.py)", text):
        assert (REPO / "anima_train" / path).is_file(), path
