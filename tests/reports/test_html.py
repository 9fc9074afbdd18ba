"""The templates of all pages: what is put into them is text, whatever it is, and they are where the program is."""

import base64
import hashlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from anima_train.core.format import Listing
from anima_train.reports.html import TEMPLATES

REPO = Path(__file__).parents[2]
FOLDER = REPO / "anima_train" / "reports" / "templates"
HOSTILE = "<i>\x1b\u202e\"'&"
HARMLESS = r"&lt;i&gt;\x1b\u202e&#34;&#39;&amp;"


class Pretender:
    """Claims to be markup, as libraries' objects may."""

    def __html__(self):
        return HOSTILE

    def __str__(self):
        return HOSTILE


def render(source, **values):
    return TEMPLATES.from_string(source).render(**values)


@pytest.mark.parametrize(
    "source",
    [
        "{{ x }}", "{{ x ~ '' }}", "{{ '' ~ x }}", "{{ [x]|join }}", "{{ [x]|first }}", "{{ '%s'|format(x) }}",
        "{{ x|string }}", "{{ x[:20] }}", "{% set y = x %}{{ y }}", "{% set y %}{{ x }}{% endset %}{{ y }}",
        "{% macro m(y) %}{{ y }}{% endmacro %}{{ m(x) }}",
        "{% macro m() %}{{ caller() }}{% endmacro %}{% call m() %}{{ x }}{% endcall %}",
        "{% macro m() %}{{ caller(x) }}{% endmacro %}{% call(y) m() %}{{ y }}{% endcall %}",
        "{% for y in [x] %}{{ loop.index and y }}{% endfor %}",
    ],
)  # fmt: skip
def test_a_value_is_printable_text_however_it_is_put_in(source):
    assert render(source, x=HOSTILE) == HARMLESS


def test_an_object_is_text_even_if_it_says_that_it_is_markup():
    assert render("{{ x }}", x=Pretender()) == HARMLESS


def test_our_markup_is_left_as_it_is_and_once_only():
    svg = Markup(f"<svg>\n{HARMLESS}</svg>")
    assert render("{{ x }}{% set y %}{{ x }}{% endset %}{{ y }}", x=svg) == 2 * f"<svg>\n{HARMLESS}</svg>"


def test_numbers_are_formatted_and_absent_names_are_errors():
    assert render("{{ x|grouped }} {{ y|rounded }}{{ z|rounded }}", x=1234567, y=-0.0, z=float("nan")) == "1,234,567 0"
    for source in ("{{ absent }}", "{{ x.absent }}", "{% if absent %}{% endif %}", "{{ absent ~ x }}"):
        with pytest.raises(UndefinedError, match="absent"):
            render(source, x=1)


def test_templates_never_turn_escaping_off():
    """Nor escape by themselves: what is escaped is taken for printable."""
    files = sorted(FOLDER.iterdir())
    assert {"base.html", "macros.html", "check.html", "run.html", "grid.html", "chart.html"} <= {
        file.name for file in files
    }
    wrong = re.compile(r"\|\s*(safe|e|escape|forceescape|xmlattr|tojson|urlize|striptags|pprint)\b|autoescape|Markup")
    assert [file.name for file in files if wrong.search(file.read_text(encoding="utf-8"))] == []


def test_names_in_lists_and_tables_are_escaped_and_long_lists_are_whole():
    macros = TEMPLATES.get_template("macros.html").module
    shown = macros.bulleted("<b>", ["<i>\x1b\u202e"] * (macros.MAX_LINES + 5))
    assert "<b>" not in shown
    assert r"&lt;i&gt;\x1b\u202e" in shown
    assert shown.count("<li>") == macros.MAX_LINES + 5
    assert shown.partition("<summary>... and 5 more</summary>")[2].count("<li>") == 5
    assert "<td>&lt;&amp;</td>" in macros.table(["x"], [["<&"]])
    assert '<td class="n">1,234</td>' in macros.table(["x"], [[1234]])
    assert macros.bulleted("x", []).strip() == ""


def test_the_entries_of_a_message_that_names_the_first_can_be_unfolded():
    files = [f"<{number}>.png" for number in range(30)]
    shown = TEMPLATES.get_template("macros.html").module.bulleted("x", [Listing.naming_first("lost", files), "plain"])
    assert "<li>lost: 30, such as &lt;0&gt;.png<details><summary>all 30</summary>" in "".join(shown.splitlines())
    assert all(f"<li>&lt;{number}&gt;.png</li>" in shown for number in range(30))


def test_bars_are_as_long_as_their_numbers():
    bars = TEMPLATES.get_template("macros.html").module.bars
    assert re.findall("width:(.*?)%", bars([("a", 200), ("b", 50), ("c", 0)])) == ["100.0", "25.0", "0.0"]
    assert re.findall("width:(.*?)%", bars([("a", 0)])) == ["0.0"]
    assert "<tr>" not in bars([])


@pytest.mark.parametrize("script", ["", "f('<b>' + \"&\");\n"])
def test_the_policy_names_the_script_of_the_page_and_no_other(script):
    body = f"{{% set script %}}{script}{{% endset %}}" if script else ""
    html = render(f'{{% extends "base.html" %}}{body}', title="x")
    (policy,) = re.findall('Content-Security-Policy" content="(.*?)"', html)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"'sha256-{digest}'" if script else "'none'"
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    assert re.findall("<script>(.*?)</script>", html, re.DOTALL) == ([script] if script else [])


def test_every_file_beside_the_code_is_installed_with_it():
    package = REPO / "anima_train"
    patterns = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["anima_train"]
    installed = {path for pattern in patterns for path in package.glob(pattern)}
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert len(others) > 10
    assert others == installed


def test_the_page_of_a_run_is_made_without_the_libraries_of_models():
    heavy = {"torch", "transformers", "peft", "diffusers", "datasets", "accelerate"}
    code = f"import sys, anima_train.reports.run_page; print(*{heavy!r} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO)
    assert result.stdout == "\n"
