"""The page of a grid: whole, harmless, and filtered by its labels."""

import base64
import io
import re

import pytest
from jinja2 import ChoiceLoader, DictLoader
from PIL import Image

from anima_train.reports import grid_page as grid_html
from anima_train.reports.grid_page import render_page, write_page
from anima_train.reports.html import TEMPLATES
from anima_train.sampling.generate import Request
from anima_train.sampling.grids import Axis, Cell, Sheet
from tests.reports.page import Page

HOSTILE = '</td><script>alert(1)</script>"\'><img src="http://x.test/y" onerror=alert(2)>&amp;\u202e'
JPEG = "AAAA"


def parsed(html):
    return Page(html).elements


def grid(columns, rows):
    cells = [Cell(Request(prompt=""))] * (len(columns) * len(rows))
    return Sheet(cells, Axis("x", "prompt", columns, columns), Axis("y", "prompt", rows, rows))


def gallery(captions):
    return Sheet([Cell(Request(prompt=""))] * len(captions), captions=captions)


def page(sheet, names=None):
    names = names or [f"{place}.png" for place in range(len(sheet.cells))]
    return render_page(sheet, names, [JPEG] * len(names))


@pytest.mark.parametrize("sheet", [grid([HOSTILE, "b"], [HOSTILE]), gallery([HOSTILE, "b"])])
def test_labels_are_only_text(sheet):
    html = page(sheet, [HOSTILE, "b.png"])
    tags = parsed(html)
    assert [tag for tag, _ in tags].count("script") == 1
    images = [attributes for tag, attributes in tags if tag == "img"]
    assert len(images) == 2
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in images)
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert not [name for tag, attributes in tags for name in attributes if name == "src" and tag != "img"]
    assert "\u202e" not in html
    shown = HOSTILE.replace("\u202e", "\\u202e")
    assert shown in [attributes.get("data-label", "").removesuffix(f" {shown}") for _, attributes in tags]


def test_without_scripts_everything_is_there_and_nothing_is_hidden():
    html = page(grid(["a", "b"], ["c", "d"]))
    tags = parsed(html)
    assert [attributes["data-label"] for tag, attributes in tags if tag == "td"] == ["c a", "c b", "d a", "d b"]
    assert [attributes["title"] for tag, attributes in tags if tag == "img"] == ["0.png", "1.png", "2.png", "3.png"]
    assert re.findall("<th scope.*?>(.*?)</th>", html) == ["a", "b", "c", "d"]
    assert not [1 for tag, attributes in tags if tag == "input" or "hidden" in attributes]
    assert "script-src 'sha256-" in html


def test_pictures_are_embedded_as_jpeg_and_together_not_too_large(tmp_path, monkeypatch):
    paths = [tmp_path / f"{place}.png" for place in range(4)]
    for place, path in enumerate(paths):
        Image.new("RGB", (400, 200), (60 * place, 0, 0)).save(path)
    for pixels, width in ((grid_html.PAGE_PIXELS, 400), (4 * 300 * 300, 300), (1, grid_html.MIN_SIDE)):
        monkeypatch.setattr(grid_html, "PAGE_PIXELS", pixels)
        write_page(tmp_path / "grid.html", gallery(list("abcd")), paths)
        sources = [
            attributes["src"] for tag, attributes in parsed((tmp_path / "grid.html").read_text()) if tag == "img"
        ]
        for place, source in enumerate(sources):
            image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
            assert (image.format, image.width, image.height) == ("JPEG", width, width // 2)
            assert abs(image.getpixel((5, 5))[0] - 60 * place) < 4


# In a browser

REPORT = """
const out = document.createElement("pre");
for (const words of %s) {
  field.value = words;
  field.dispatchEvent(new Event("input"));
  const seen = pictures.filter((picture) => getComputedStyle(picture).visibility === "visible" && picture.offsetWidth);
  const heads = [...document.querySelectorAll("th[scope]")].filter((head) => head.offsetWidth);
  out.textContent += [seen.map((picture) => picture.dataset.label), heads.map((head) => head.textContent)]
    .map((labels) => labels.join(",")).join("|") + "|" + found.textContent + "\\n";
}
document.body.append(out);
"""


def filtered(sheet, words, opened, monkeypatch):
    """[labels of pictures, heads, note] as the browser shows them for each content of the field."""
    script = TEMPLATES.loader.get_source(TEMPLATES, "grid.js")[0] + REPORT % words
    monkeypatch.setattr(TEMPLATES, "loader", ChoiceLoader([DictLoader({"grid.js": script}), TEMPLATES.loader]))
    dom, complaints = opened(page(sheet))
    assert complaints == []
    (report,) = re.findall(r"<pre>(.*?)</pre>", dom, re.DOTALL)
    return [tuple(line.split("|")) for line in report.splitlines()]


def test_the_field_filters_rows_columns_and_cells(opened, monkeypatch):
    sheet = grid(["Cat", "dog"], ["day", "night"])
    whole = ("day Cat,day dog,night Cat,night dog", "Cat,dog,day,night")
    assert filtered(sheet, ["", "cat", "NIGHT", "dog  nig", "none", "d", ""], opened, monkeypatch) == [
        (*whole, ""),
        ("day Cat,night Cat", "Cat,day,night", "2 of 4"),
        ("night Cat,night dog", "Cat,dog,night", "2 of 4"),
        ("night dog", "dog,night", "1 of 4"),
        ("", "", "0 of 4"),
        ("day Cat,day dog,night dog", "Cat,dog,day,night", "3 of 4"),
        (*whole, ""),
    ]


def test_the_field_filters_the_entries_of_a_gallery(opened, monkeypatch):
    found = filtered(gallery(["@one", "@Two", "<b>"]), ["tw", "@", "<b>", ""], opened, monkeypatch)
    assert found == [
        ("@Two", "", "1 of 3"),
        ("@one,@Two", "", "2 of 3"),
        ("&lt;b&gt;", "", "1 of 3"),
        ("@one,@Two,&lt;b&gt;", "", ""),
    ]
