"""The table of docs/captions.md, through the code that it describes."""

import re
from pathlib import Path

from anima_train.data.caption_parts import caption_parts

PAGE = Path(__file__).parents[2] / "docs" / "captions.md"
ROW = re.compile(r"^\| (?:`([^`]+)` )?\| `([^`]+)` \| (tags|prose) \|$", re.MULTILINE)


def test_the_table_of_parts_is_what_the_code_does():
    captions: dict[str, list[tuple[str, str]]] = {}
    caption = ""
    for named, text, kind in ROW.findall(PAGE.read_text(encoding="utf-8")):
        caption = named or caption
        captions.setdefault(caption, []).append((text, kind))
    assert len(captions) == 6
    for caption, expected in captions.items():
        found = [(part.text, "prose" if part.is_prose else "tags") for part in caption_parts(caption, ", ")]
        assert found == expected
