"""The form of docstrings: a verb in the imperative or a noun, a docstring in every module, one line for every room."""

import ast
import re
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PACKAGE = REPO / "anima_train"
ROOMS = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file())
QUESTION = re.compile(r"(what|whether|where|how)\b", re.IGNORECASE)


def docstrings(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, text) of each docstring: of the module, its classes and functions, and of fields of settings."""
    return [
        (node.lineno, node.value.value.strip())
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]


def asked(source: str) -> list[str]:
    """The docstrings that begin like a question."""
    return [f"{line}: {text[:60]}" for line, text in docstrings(ast.parse(source)) if QUESTION.match(text)]


@pytest.mark.parametrize("room", ROOMS)
def test_no_docstring_begins_like_a_question(room):
    sources = sorted((PACKAGE / room).rglob("*.py"))
    assert sources
    found = {str(path.relative_to(REPO)): asked(path.read_text(encoding="utf-8")) for path in sources}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize("word", ["What", "Whether", "Where", "How"])
def test_each_of_these_would_be_found(word):
    assert asked(f'"""{word} it is."""') == [f"1: {word} it is."]
    assert asked(f'class A:\n    def f(self):\n        """{word} it is."""') == [f"3: {word} it is."]
    assert asked(f'class A:\n    field: int = 0\n    """{word} it is."""') == [f"3: {word} it is."]
    assert asked(f'def f():\n    """Return it, {word.lower()} or not."""') == []


def test_every_module_has_a_docstring():
    modules = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]
    assert len(modules) > 80
    without = [path for path in modules if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert without == []


def test_every_room_says_its_purpose_in_one_line():
    rooms = sorted(PACKAGE.rglob("__init__.py"))
    assert {path.parent.name for path in rooms} >= set(ROOMS)
    purposes = [ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) for path in rooms]
    assert [str(path) for path, text in zip(rooms, purposes, strict=True) if not text or "\n" in text] == []
