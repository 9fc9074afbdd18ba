"""Captions with lines and sentences: prose stays whole and in its place, tags move within their own run."""

import pytest

from anima_train.data.caption_parts import caption_parts, map_tags, tags_in
from anima_train.data.captions import vary_tags
from anima_train.data.settings import DirectoryOptions

TAGS = "2boys, green coat, holding lamp, night, snow"
PROSE = "Two boys in green coats walk through the snow, laughing, and one of them holds a lamp."


def kinds(caption: str) -> list[tuple[str, str]]:
    return [("prose" if part.is_prose else "tags", part.text) for part in caption_parts(caption, ", ")]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (TAGS, [("tags", TAGS)]),
        (PROSE, [("prose", PROSE)]),
        (f"{TAGS}\n{PROSE}", [("tags", TAGS), ("prose", PROSE)]),
        (f"{PROSE} {TAGS}", [("prose", PROSE), ("tags", TAGS)]),
        (f"{PROSE}, {TAGS}", [("prose", PROSE), ("tags", TAGS)]),  # as some taggers put the two together
        (f"{TAGS}, {PROSE}", [("tags", TAGS), ("prose", PROSE)]),
        (f"{TAGS}. {PROSE}", [("tags", f"{TAGS}."), ("prose", PROSE)]),
        (f"{TAGS}, a photo of two boys in the snow, one of them laughs",
         [("tags", TAGS), ("prose", "a photo of two boys in the snow, one of them laughs")]),
        ("Mr. Fox sits by the fire, reading. 1boy, solo",
         [("prose", "Mr. Fox sits by the fire, reading."), ("tags", "1boy, solo")]),
        ("A boy dressed as Dr. Strange, smiling. 1boy",
         [("prose", "A boy dressed as Dr. Strange, smiling."), ("tags", "1boy")]),
        ("Un garçon marche dans la neige, souriant. 1boy, solo",
         [("prose", "Un garçon marche dans la neige, souriant."), ("tags", "1boy, solo")]),
        ("雪の中を歩く、二人の少年。2boys, snow", [("prose", "雪の中を歩く、二人の少年。"), ("tags", "2boys, snow")]),
    ],
)  # fmt: skip
def test_sentences_and_tags_are_told_apart(caption: str, expected: list[tuple[str, str]]):
    assert kinds(caption) == expected


@pytest.mark.parametrize(
    "tags",
    [
        "dr. stone, 1girl, senku, solo",
        "k-on!, 1girl, love live! school idol project, guitar",
        "1boy, !?, ..., spoken exclamation mark, solo",
        "1girl, kono subarashii sekai ni shukufuku wo!, megumin",
        "1girl, the legend of zelda, zelda, hand on own hip, standing on one leg",
        "masterpiece, best quality, score_8, safe, 1girl, smile.",
        "1girl,solo,hat",
    ],
)
def test_marks_and_long_names_do_not_make_sentences_of_tags(tags: str):
    assert kinds(tags) == [("tags", tags)]


@pytest.mark.parametrize("delimiter", [", ", ",", ";", " | "])
def test_parts_put_together_are_the_caption(delimiter: str):
    caption = f"\nye-pop\n{PROSE} {TAGS}\n\n{TAGS}, {PROSE} Yes!  \n x"
    assert "".join(part.text + part.joiner for part in caption_parts(caption, delimiter)) == caption


@pytest.mark.parametrize("caption", [f"{TAGS}\n{PROSE}", f"{PROSE}, {TAGS}", f"{TAGS}, {PROSE}", f"{PROSE} {TAGS}"])
def test_shuffling_moves_tags_only(caption: str):
    options = DirectoryOptions(shuffle_tags=True)
    drawn = [vary_tags(caption, options, 0, "a", variant) for variant in range(8)]
    before, after = caption.split(TAGS)
    assert len(set(drawn)) > 4
    for text in drawn:
        assert text.startswith(before)
        assert text.endswith(after)
        assert PROSE in text
        shuffled = text.removeprefix(before).removesuffix(after)
        assert sorted(shuffled.split(", ")) == sorted(TAGS.split(", "))


def test_dropping_leaves_sentences_and_no_delimiter_without_a_tag():
    options = DirectoryOptions(tag_dropout=0.9)
    drawn = {vary_tags(f"{TAGS}\n{PROSE}", options, 0, "a", variant) for variant in range(40)}
    assert all(text.endswith(PROSE) for text in drawn)
    assert PROSE in drawn  # without an empty line in front


def test_lines_of_tags_do_not_mix():
    options = DirectoryOptions(shuffle_tags=True)
    for variant in range(8):
        first, second = vary_tags("a, b, c\nd, e, f", options, 0, "x", variant).split("\n")
        assert (sorted(first), sorted(second)) == (sorted("a, b, c"), sorted("d, e, f"))


def test_the_line_of_a_dataset_stays():
    options = DirectoryOptions(shuffle_tags=True, tag_dropout=0.99)
    assert vary_tags(f"deviantart\n{TAGS}", options, 0, "a", 3).split("\n")[0] == "deviantart"
    assert vary_tags("deviantart\n" + "1boy, solo", options, 0, "a", 5).startswith("deviantart")


def test_kept_tags_are_the_first_of_all_runs():
    options = DirectoryOptions(shuffle_tags=True, keep_first_n_tags=3)
    for variant in range(8):
        first, second = vary_tags("a, b\nc, d, e, f", options, 0, "x", variant).split("\n")
        assert first == "a, b"
        assert second.startswith("c, ")


def test_a_separator_keeps_what_is_in_front_of_it_and_behind_a_second_one():
    options = DirectoryOptions(shuffle_tags=True, keep_tokens_separator="|||", keep_first_n_tags=1)
    drawn = {vary_tags("mia, 1girl ||| hat, coat, snow ||| score_7", options, 0, "x", number) for number in range(20)}
    assert len(drawn) == 6  # orders of three tags
    for text in drawn:
        assert text.startswith("mia, 1girl, ")
        assert text.endswith(", score_7")
        assert "|" not in text
    assert vary_tags("mia ||| hat, coat", options, 0, "x", None) == "mia, hat, coat"  # in evaluation, too


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("cat, , dog, ", "cat, dog"),
        ("cat, dog,", "cat, dog"),
        (", , cat", "cat"),
        (", ", ""),
        (f"cat, , dog\n{PROSE}", f"cat, dog\n{PROSE}"),
    ],
)
def test_empty_tags_vanish(caption: str, expected: str):
    assert map_tags(caption, ", ", lambda tags: tags) == expected
    assert vary_tags(caption, DirectoryOptions(), 0, "x", None) == expected


def test_underscores_of_sentences_stay():
    options = DirectoryOptions(replace_underscores=True)
    text = "A file called my_file.txt lies on the table, unread."
    assert vary_tags(f"long_hair, ^_^\n{text}", options, 0, "x", None) == f"long hair, ^_^\n{text}"


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("dr. Jones and prof. Lee met at 9 a.m. on a bridge, and waved. 2boys, bridge", [
            ("dr. Jones and prof. Lee met at 9 a.m. on a bridge, and waved.", True), ("2boys, bridge", False),
        ]),
        ("1boy, solo, weapon, i.e. a sword, cats, etc. everywhere", [
            ("1boy, solo, weapon, i.e. a sword, cats, etc. everywhere", False),
        ]),
        ("a boy with short hair, green eyes, and a scarf, sitting in a tree", [
            ("a boy with short hair, green eyes, and a scarf, sitting in a tree", True),
        ]),
        ("He is looking back, waving, one hand up", [("He is looking back, waving, one hand up", True)]),
        ("'Wait, please!' he said, and ran. 1boy", [("'Wait, please!' he said, and ran.", True), ("1boy", False)]),
        ("sitting on a chair, holding a cup, standing on a roof, solo", [
            ("sitting on a chair, holding a cup, standing on a roof, solo", False),
        ]),
        ("A Silent Voice, nishimiya shouko, 1girl", [("A Silent Voice, nishimiya shouko, 1girl", False)]),
        ("a dog!, cat?, yuru camp!", [("a dog!, cat?, yuru camp!", False)]),
        ("crowd of 2,500,000 people at http://x.org/a, b", [("crowd of 2,500,000 people at http://x.org/a, b", False)]),
        ("夕焼けの海、船。1boy, 海", [("夕焼けの海、船。", True), ("1boy, 海", False)]),
    ],
)  # fmt: skip
def test_shortened_words_quotations_and_clauses_are_told_apart(caption: str, expected: list[tuple[str, bool]]):
    assert [(part.text, part.is_prose) for part in caption_parts(caption, ", ")] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('sign, "stop, now", text: "a, b, c", hat', ["sign", '"stop, now"', 'text: "a, b, c"', "hat"]),
        ("5'11\" tall, 1boy, 6'2\" tall", ["5'11\" tall", "1boy", "6'2\" tall"]),
        ('"open, hat, cat', ['"open', "hat", "cat"]),
        ('hat, "open, cat,', ["hat", '"open', "cat"]),
        ('"one", "two", x', ['"one"', '"two"', "x"]),
    ],
)
def test_what_stands_in_quotation_marks_is_one_tag(text: str, expected: list[str]):
    assert tags_in(text, ", ") == expected
