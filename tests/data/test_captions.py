"""Caption files as editors write them, and the order of tags."""

import os
from collections import Counter
from pathlib import Path

import pytest

from anima_train.data.captions import (
    MAX_CAPTION_BYTES,
    BadCaption,
    read_caption,
    read_captions_json,
    unescaped,
    vary_tags,
    without_underscores,
)
from anima_train.data.settings import DirectoryOptions


def shuffled_tags(caption: str, delimiter: str, seed: int, sample: str, variant: int) -> str:
    options = DirectoryOptions(cache_shuffle_delimiter=delimiter, shuffle_tags=True)
    return vary_tags(caption, options, seed, sample, variant)


TAGS = "1girl, solo, long hair, blue eyes, smile, outdoors, sky, cloud"


def caption(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    return read_caption(path)


def reason(path: Path) -> str:
    with pytest.raises(BadCaption) as caught:
        read_caption(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a cat", "a cat"),
        (b"", ""),
        (b" \r\n\t ", ""),
        ("\ufeffa cat".encode(), "a cat"),
        ("\ufeff".encode(), ""),
        (b"a cat,\r\na dog\r\n", "a cat,\na dog"),
        (b"a cat,\ra dog", "a cat,\na dog"),
        (b"a\x00 cat\x00", "a cat"),
        (b"\x00 a cat \x00", "a cat"),
        ("猫, café, 🐈".encode(), "猫, café, 🐈"),
    ],
)
def test_captions_are_cleaned(tmp_path: Path, content: bytes, expected: str):
    assert caption(tmp_path, content) == expected


@pytest.mark.parametrize(
    ("content", "offset", "byte"),
    [
        (b"caf\xe9, cat", 3, "e9"),  # Latin-1
        ("\ufeffcaf".encode() + b"\xe9", 6, "e9"),  # the BOM's three bytes count
        ("猫".encode()[:2], 0, "e7"),  # a character that stops
        (b"\xff\xfea\x00", 0, "ff"),  # UTF-16
    ],
)
def test_what_is_not_utf8_is_named_with_its_offset_in_the_file(tmp_path: Path, content: bytes, offset: int, byte: str):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert content[offset] == int(byte, 16)
    assert f"byte {offset} is 0x{byte}" in reason(path)


def test_files_that_cannot_be_read_are_bad_captions(tmp_path: Path):
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    os.mkfifo(tmp_path / "fifo.txt")  # opening it would wait for ever
    assert reason(tmp_path / "folder.txt") == "not a file"
    assert reason(tmp_path / "fifo.txt") == "not a file"
    assert "not readable" in reason(tmp_path / "loop.txt")
    assert "not readable" in reason(tmp_path / "nothing.txt")


def test_a_shuffle_is_a_permutation():
    shuffled = shuffled_tags(TAGS, ", ", 0, "a", 0)
    assert sorted(shuffled.split(", ")) == sorted(TAGS.split(", "))
    assert shuffled != TAGS


def test_a_tag_given_twice_stays_twice():
    shuffled = shuffled_tags("cat, dog, cat, bird, cat", ", ", 0, "a", 0)
    assert Counter(shuffled.split(", ")) == {"cat": 3, "dog": 1, "bird": 1}


def test_a_shuffle_depends_on_seed_sample_and_variant_and_on_nothing_else():
    first = shuffled_tags(TAGS, ", ", 0, "a", 0)
    others = [shuffled_tags(TAGS, ", ", 1, "a", 0), shuffled_tags(TAGS, ", ", 0, "b", 0)]
    others += [shuffled_tags(TAGS, ", ", 0, "a", variant) for variant in range(1, 5)]
    assert len({first, *others}) == 7
    assert shuffled_tags(TAGS, ", ", 0, "a", 0) == first


def test_every_tag_comes_first_about_equally_often():
    first = Counter(shuffled_tags("a,b,c,d", ",", 0, str(sample), 0)[0] for sample in range(2000))
    # 500 expected, standard deviation 19
    assert all(abs(number - 500) < 80 for number in first.values())
    assert len(first) == 4


def test_other_delimiters_split_exactly():
    assert sorted(shuffled_tags("a; b;c", ";", 3, "x", 1).split(";")) == [" b", "a", "c"]
    assert shuffled_tags("one sentence, and no semicolon", ";", 3, "x", 1) == "one sentence, and no semicolon"


def from_json(tmp_path: Path, content: bytes) -> dict[str, tuple[str, ...]]:
    path = tmp_path / "captions.json"
    path.write_bytes(content)
    return read_captions_json(path)


def test_captions_json_holds_one_or_several_captions_for_each_name(tmp_path: Path):
    content = '\ufeff{"a.png": "a cat\\r\\n", "\u732b.png": ["one", " two "], "c.png": "\\ud83d\\udc08"}'.encode()
    assert from_json(tmp_path, content) == {"a.png": ("a cat",), "\u732b.png": ("one", "two"), "c.png": ("\U0001f408",)}
    assert from_json(tmp_path, b"{}") == {}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not JSON (line 1, column 1: "),
        (b'{"a": "b",\n"c": }', "not JSON (line 2, column 6: "),
        (b'{"a": "b"} x', "not JSON (line 1, column 12: "),
        (b'{"a": "caf\xe9"}', "not UTF-8 (byte 10 is 0xe9)"),
        (b'[["a", "b"]]', "expected {"),
        (b'"a"', "expected {"),
        (b'{"a": 1}', '"a": expected {'),
        (b'{"a": ' + b"1" * 5000 + b"}", '"a": expected {'),
        (b'{"a": null}', '"a": expected {'),
        (b'{"a": []}', '"a": expected {'),
        (b'{"a": ["b", 1]}', '"a": expected {'),
        (b'{"a": {"b": "c"}}', '"a": expected {'),
        (b'{"a": "b", "a": "c"}', '"a" is given twice'),
        (b'{"a": "\\ud83d"}', '"a": half of a surrogate pair'),
        (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
    ],
)
def test_captions_json_of_another_form_is_refused(tmp_path: Path, content: bytes, expected: str):
    with pytest.raises(BadCaption) as caught:
        from_json(tmp_path, content)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("long_hair, very_long_hair", "long hair, very long hair"),
        ("^_^, o_o, ;_;, (o)_(o), <|>_<|>, ||_||, >_<", "^_^, o_o, ;_;, (o)_(o), <|>_<|>, ||_||, >_<"),
        ("score_7, score_7_up, score_board", "score_7, score_7_up, score board"),
        ("a_cat,^_^,\nb_dog", "a cat,^_^,\nb dog"),
        ("saber_(fate), :d_d, @some_artist", "saber (fate), :d d, @some artist"),
        ("", ""),
    ],
)
def test_underscores_are_spaces_but_in_emoticons_and_scores(text: str, expected: str):
    assert without_underscores(text, ", ") == expected


def test_tags_end_at_the_delimiter_too():
    assert without_underscores("a_cat | ^_^ | b_dog", " | ") == "a cat | ^_^ | b dog"


def test_every_occurrence_of_escaped_parentheses_is_rewritten():
    assert unescaped(r"saber_\(fate\), (ok), \\") == r"saber_(fate), (ok), \\"


def test_a_tag_more_leaves_the_fate_and_order_of_the_others_alone():
    options = DirectoryOptions(shuffle_tags=True, tag_dropout=0.5)
    before = [vary_tags(TAGS, options, 0, "a", number).split(", ") for number in range(50)]
    after = [vary_tags(f"{TAGS}, rain", options, 0, "a", number).split(", ") for number in range(50)]
    assert [[tag for tag in tags if tag != "rain"] for tags in after] == before
    assert 0 < sum("rain" in tags for tags in after) < 50


def test_a_caption_file_above_a_mebibyte_is_refused_without_being_read_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * MAX_CAPTION_BYTES)
    assert read_caption(path) == "x" * MAX_CAPTION_BYTES
    with open(path, "wb") as file:
        file.truncate(2**40)  # takes no room on the disk, and would not fit into the memory
    with pytest.raises(BadCaption, match=r"^larger than 1\.0 MiB, which is no caption$"):
        read_caption(path)
