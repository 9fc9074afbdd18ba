"""Axes, cells, and the picture of all pictures."""

import json

import pytest
from PIL import Image, ImageChops, ImageFont

from anima_train.core.errors import ConfigError
from anima_train.reports.contact_sheet import MAX_SHEET_PIXELS, draw_sheet, largest_layout, save_sheet, wrap
from anima_train.sampling.generate import Request
from anima_train.sampling.grids import (
    MAX_CELLS,
    Axis,
    Cell,
    ChosenLora,
    Sheet,
    make_gallery,
    make_grid,
    parse_axis,
    parse_lora,
)
from anima_train.sampling.pictures import UsedWeights, save_picture

TEMPLATE = Request(prompt="", seed=5)
ONE = Request(prompt="one", seed=5, negative_prompt="bad")
TWO = Request(prompt="two", seed=6)


def grid(*texts, given=(ONE,), loras=()):
    return make_grid(texts, given, TEMPLATE, loras, {"size": "it is called width and height"})


def requests(sheet, *keys):
    return [tuple(getattr(cell.request, key) for key in keys) for cell in sheet.cells]


def test_cells_stand_row_by_row():
    sheet = grid("y=cfg:2,3.5", "x=seed:1,2,3")
    assert requests(sheet, "cfg", "seed") == [(cfg, seed) for cfg in (2, 3.5) for seed in (1, 2, 3)]
    assert {cell.request.negative_prompt for cell in sheet.cells} == {"bad"}
    assert sheet.columns == ["seed: 1", "seed: 2", "seed: 3"]
    assert sheet.rows == ["cfg: 2", "cfg: 3.5"]
    assert requests(grid("y=steps:1,2"), "steps") == [(1,), (2,)]
    assert grid("y=steps:1,2").columns == [""]


@pytest.mark.parametrize("after", [":", ":high", ":0,8", ": 0.8x"])
def test_a_strength_that_is_no_number_is_asked_for(tmp_path, after):
    path = tmp_path / "a.safetensors"
    for text in (f"{path}{after}", f"gone.safetensors{after}"):
        with pytest.raises(ConfigError, match=r"expected the strength, such as .*safetensors:0\.8"):
            parse_lora(text)


def test_values_are_a_line_of_csv():
    sheet = grid('x=negative_prompt:"a, b", "say ""c""",,d')
    assert requests(sheet, "negative_prompt") == [("a, b",), ('say "c"',), ("",), ("d",)]


def test_samplers_and_sizes_are_axes():
    sheet = grid("x=sampler:euler,heun", "y=width:32,64")
    found = [(cell.request.sampler.type, cell.request.width) for cell in sheet.cells]
    assert found == [("euler", 32), ("heun", 32), ("euler", 64), ("heun", 64)]


def test_prompts_keep_their_own_settings_where_no_axis_changes_them():
    for texts in (("x=cfg:2,3", "y=prompt"), ("y=prompt", "x=cfg:2,3")):
        assert requests(grid(*texts, given=(ONE, TWO)), "prompt", "seed", "cfg") == [
            ("one", 5, 2), ("one", 5, 3), ("two", 6, 2), ("two", 6, 3)
        ]  # fmt: skip
    assert requests(grid("x=prompt:a,b", given=()), "prompt", "seed") == [("a", 5), ("b", 5)]


def test_a_strength_is_that_of_all_loras_of_the_cell(tmp_path):
    (tmp_path / "b.safetensors").touch()
    always, other = ChosenLora(tmp_path / "a.safetensors"), ChosenLora(tmp_path / "b.safetensors")
    sheet = grid("x=lora_strength:0,-0.5", f"y=lora:none,{other.path}", loras=[always])
    found = [[(lora.path, lora.strength) for lora in cell.loras] for cell in sheet.cells]
    assert found == [
        [(always.path, 0)],
        [(always.path, -0.5)],
        [(always.path, 0), (other.path, 0)],
        [(always.path, -0.5), (other.path, -0.5)],
    ]
    assert sheet.rows == ["no LoRA", "b"]


def test_a_folder_stands_for_its_loras_in_the_order_of_their_steps(tmp_path):
    names = ["r", "r-s000100", "r-s000020", "r-s1000000", "other_step00000300", ".hidden", "v-12"]
    for name in names:
        (tmp_path / f"{name}.safetensors").touch()
    (tmp_path / "notes.txt").touch()
    axis = parse_axis(f"x=lora:{tmp_path},{tmp_path / 'r.safetensors'}:0.5", [ONE], TEMPLATE, {})
    wanted = ["r-s000020", "r-s000100", "other_step00000300", "r-s1000000", "r", "v-12"]
    assert axis.labels == [*wanted, "r at 0.5"]
    assert axis.values[0] == ChosenLora(tmp_path / "r-s000020.safetensors")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["cfg:1,2"], r'found "cfg:1,2", expected x=KEY:V1,V2'),
        (["z=cfg:1"], "expected x=KEY"),
        (["x=sede:1"], r'--grid x: found "sede", expected one of .*; did you mean seed\?'),
        (["x=size:1"], "it is called width and height"),
        (["x=cfg"], r"--grid x=cfg: there are no values; write --grid x=cfg:V1"),
        (["x=cfg: "], "there are no values"),
        (["x=cfg:1,b,-1"], r'(?s)--grid x=cfg: .*"b" \(text\), expected a number\n--grid x=cfg: .*-1 .*at least 0'),
        (["x=cfg:1,,2"], r'--grid x=cfg: .*""'),
        (["x=cfg:inf"], "--grid x=cfg: .*inf.*a finite number"),
        (["x=seed:1.5"], r"--grid x=seed: .*1\.5"),
        (["x=width:100"], "--grid x=width: .*100"),
        (["x=sampler:eular"], '--grid x=sampler: .*did you mean "euler"'),
        (['x=prompt:"a'], "is not a line of CSV"),
        (["x=prompt:a"], "has prompts of its own; leave"),
        (["x=cfg:1,2"], "--grid x=cfg: with the value 1, .*has no effect with cfg 1"),
        (["x=lora:nowhere"], '--grid x=lora: "nowhere" does not exist'),
        (["x=lora_strength:1"], "has no effect without a LoRA"),
        (["x=seed:1", "x=cfg:2"], "both axes are called x"),
        (["x=seed:1", "y=seed:2"], "both axes are seed"),
        (["x=seed:1", "y=cfg:2", "x=steps:3"], "found 3 axes"),
        (["x=seed:" + ",".join("1" * 50), "y=cfg:" + ",".join("2" * 41)], "found 2,050 pictures, .*at most 2,000"),
    ],
)
def test_mistakes_are_sentences(texts, message):
    with pytest.raises(ConfigError, match=message):
        grid(*texts)


def test_mistakes_with_prompts_loras_and_folders_are_sentences(tmp_path):
    with pytest.raises(ConfigError, match="found 2 prompts, expected one; add --grid y=prompt"):
        grid("x=cfg:2", given=(ONE, TWO))
    with pytest.raises(ConfigError, match="found 0 prompts, expected one; give --prompt"):
        grid("x=cfg:2", given=())
    with pytest.raises(ConfigError, match="there is no prompt"):
        grid("x=prompt", given=())
    with pytest.raises(ConfigError, match=r"holds no \.safetensors file"):
        grid(f"x=lora:{tmp_path}")
    with pytest.raises(ConfigError, match=r"--grid x=lora_strength: found .*expected a finite number"):
        grid("x=lora_strength:a", loras=[ChosenLora(tmp_path)])
    with pytest.raises(ConfigError, match=r"--grid x=lora_strength: found .*expected a finite number"):
        grid("x=lora_strength:nan", loras=[ChosenLora(tmp_path)])
    with pytest.raises(ConfigError, match=r'--lora "x:inf": found the strength inf'):
        parse_lora("x:inf")


def test_as_many_cells_as_allowed_are_allowed():
    assert len(grid("x=seed:" + ",".join("1" * 50), "y=cfg:" + ",".join("2" * 40)).cells) == MAX_CELLS


def test_a_gallery_draws_each_line_once():
    lora = ChosenLora("x")
    sheet = make_gallery(["a", "{}", "", " a "], [Request(prompt="by {}, x", seed=2)], [lora])
    assert [cell.request for cell in sheet.cells] == [
        Request(prompt=prompt, seed=2) for prompt in ("by a, x", "by {}, x")
    ]
    assert {cell.loras for cell in sheet.cells} == {(lora,)}
    assert sheet.captions == ["a", "{}"]
    for given in ([], [ONE], [Request(prompt="{} {}")], [Request(prompt="{}")] * 2):
        with pytest.raises(ConfigError, match=r"expected one --prompt with one \{\} in it"):
            make_gallery(["a"], given, [])
    with pytest.raises(ConfigError, match="found 2,001 pictures"):
        make_gallery([str(line) for line in range(2001)], [Request(prompt="{}")], [])


# The picture of all

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)]


def painted(folder, sheet):
    """A file of one colour for each cell."""
    return [
        save_picture(folder, Image.new("RGB", (cell.request.width, cell.request.height), colour), cell.request,
                     UsedWeights("m"))
        for cell, colour in zip(sheet.cells, COLOURS, strict=False)
    ]  # fmt: skip


def areas(image):
    """Colour -> the box of all pixels of exactly this colour, and their number."""
    found = {}
    for colour in COLOURS:
        difference = ImageChops.difference(image, Image.new("RGB", image.size, colour))
        mask = difference.convert("L", (1, 1, 1, 0)).point(lambda value: 255 * (value == 0))
        if box := mask.getbbox():
            found[colour] = (box, mask.histogram()[255])
    return found


def small(prompt, **settings):
    return Request(prompt=prompt, width=96, height=64, **settings)


def test_every_picture_is_whole_and_in_its_row_and_column(tmp_path):
    sheet = grid("x=seed:1,2,3", "y=cfg:2,3", given=[small("a")])
    found = areas(draw_sheet(sheet, painted(tmp_path, sheet)))
    boxes = [found[colour][0] for colour in COLOURS]
    assert all(found[colour][1] == 96 * 64 for colour in COLOURS)
    assert all((right - left, lower - upper) == (96, 64) for left, upper, right, lower in boxes)
    assert [box[0] for box in boxes[:3]] == [box[0] for box in boxes[3:]] == sorted({box[0] for box in boxes})
    assert [box[1] for box in boxes] == sorted(box[1] for box in boxes)
    assert len({box[1] for box in boxes}) == 2


def ink(image, box):
    """Number of dark pixels."""
    return sum(image.crop(box).convert("L").histogram()[:128])


def test_labels_stand_beside_rows_and_over_columns(tmp_path):
    sheet = grid("x=seed:1,2", "y=cfg:2,3", given=[small("a")])
    page = draw_sheet(sheet, painted(tmp_path, sheet))
    left, upper, right, lower = areas(page)[COLOURS[0]][0]
    assert ink(page, (0, 0, left, upper)) == 0
    assert ink(page, (left, 0, right, upper)) > 20
    assert ink(page, (0, upper, left, lower)) > 20
    other = draw_sheet(grid("x=seed:8,2", "y=cfg:2,3", given=[small("a")]), painted(tmp_path, sheet))
    changed = ImageChops.difference(page, other).getbbox()
    assert left <= changed[0] < changed[2] <= right
    assert changed[3] <= upper


def test_a_gallery_has_captions_over_its_pictures_and_is_nearly_square(tmp_path):
    sheet = make_gallery(["a", "b", "c", "d", "e"], [small("{}")], [])
    page = draw_sheet(sheet, painted(tmp_path, sheet))
    found = areas(page)
    boxes = [found[colour][0] for colour in COLOURS[:5]]
    assert [len({box[side] for box in boxes}) for side in (0, 1)] == [3, 2]
    for left, upper, right, _ in boxes:
        assert ink(page, (left, upper - 12, right, upper)) > 5


def test_smaller_pictures_stand_in_the_middle(tmp_path):
    sheet = grid("x=width:96,48", given=[small("a")])
    found = areas(draw_sheet(sheet, painted(tmp_path, sheet)))
    (_, _, right, _), count = found[COLOURS[0]]
    (other_left, _, other_right, _), other_count = found[COLOURS[1]]
    assert (count, other_count) == (96 * 64, 48 * 64)
    assert other_left - right == 3 + 24
    assert other_right - other_left == 48


@pytest.mark.parametrize("limit", [40_000, 20_000, 10_000])
def test_large_sheets_are_scaled_down(tmp_path, limit):
    sheet = grid("x=seed:1,2,3", "y=cfg:2,3", given=[small("a")])
    page = draw_sheet(sheet, painted(tmp_path, sheet), limit)
    assert page.width * page.height <= limit
    assert page.width * page.height > limit * 0.7


def test_the_largest_sheet_stays_below_the_limit():
    cells = [Cell(Request(prompt=""))] * MAX_CELLS
    labels = ["a long label " * 50] * MAX_CELLS
    for sheet in (
        Sheet(cells, x=Axis("x", "seed", [0] * MAX_CELLS, labels)),
        Sheet(cells, y=Axis("y", "seed", [0] * MAX_CELLS, labels)),
        Sheet(cells, captions=labels),
    ):
        width, height = largest_layout(sheet, MAX_SHEET_PIXELS).size
        assert MAX_SHEET_PIXELS * 0.7 < width * height <= MAX_SHEET_PIXELS


def test_labels_are_wrapped_at_spaces_and_cut():
    font = ImageFont.load_default(12)
    width = int(font.getlength("some words")) + 1
    assert wrap("some words of a label", font, width, 9) == ["some words", "of a label"]
    assert wrap("", font, width, 3) == []
    cut = wrap("some words " * 20, font, width, 3)
    assert cut[:2] == ["some words"] * 2
    assert len(cut) == 3
    assert cut[2].endswith("...")
    for label in ("x" * 300, "wide words " * 9, "\x1b[31m\n"):
        lines = wrap(label, font, width, 100)
        assert all(font.getlength(line) <= width for line in lines)
        assert "".join(lines).replace(" ", "").startswith(label[:1].replace("\x1b", "\\x1b"))
    assert "".join(wrap("x" * 300, font, width, 100)) == "x" * 300
    assert wrap("ab", font, 1, 9) == ["a", "b"]


def test_the_png_says_what_its_pictures_share(tmp_path):
    sheet = grid('x=negative_prompt:"<a>, 日本",b', given=[small("p")])
    save_sheet(tmp_path / "grid.png", sheet, painted(tmp_path, sheet))
    with Image.open(tmp_path / "grid.png") as image:
        facts = json.loads(image.info["anima_train"])
    values = ["negative_prompt: <a>, 日本", "negative_prompt: b"]
    assert facts["grid"] == {"x": {"key": "negative_prompt", "values": values}}
    assert (facts["prompt"], facts["width"], facts["model"]) == ("p", 96, "m")
    assert "negative_prompt" not in facts
