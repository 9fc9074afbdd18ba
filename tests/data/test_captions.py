"""Caption files as editors write them, and the order of tags."""

import os
from collections import Counter
from pathlib import Path

import pytest

from anima_train.data.captions import BadCaption, read_caption, shuffled_tags

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
