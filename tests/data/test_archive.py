"""Real tar archives as folders of images: what is in them is what is in the folder that was packed."""

import gzip
import io
import json
import os
import subprocess
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anima_train.core.errors import DataError
from anima_train.core.format import Listing
from anima_train.data.cache import Cache
from anima_train.data.image_headers import MAX_BYTES, Unreadable
from anima_train.data.scan import Scan, scan
from anima_train.data.settings import DatasetSettings
from anima_train.data.sources.archive import TarMember, content_of, tar_members

LONG = "long_" * 40  # more than a header holds


def png(name: str, side: int = 80) -> bytes:
    """An image whose pixels depend on its name."""
    generator = np.random.default_rng(zlib.crc32(os.fsencode(name)))
    file = io.BytesIO()
    Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def pack(archive: Path, files: dict[str, bytes], **options: object) -> Path:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:", **options) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return archive


def look(place: Path, masks: Path | None = None, **keys: object) -> Scan:
    keys = {"resolutions": [64], "enable_ar_bucket": False, **keys}
    dataset = DatasetSettings.model_validate({**keys, "directory": [{"path": "unused"}]})
    return scan(dataset, [place], [masks], [Cache(place.parent / "cache")], seed=0, write=True)


def ids(found: Scan) -> list[str]:
    return [sample.id.removeprefix("0/").removesuffix("@64") for sample in found.samples]


def facts(found: Scan) -> list[tuple]:
    """What is trained, and under which names."""
    samples = found.samples
    for sample in samples:
        assert not isinstance(sample.picture.source, Path) or sample.picture.path.is_file()
    return [
        (
            *(sample.id, sample.captions(0), sample.picture.natural, sample.size, sample.picture.sha256),
            content_of(sample.picture.source),
            sample.picture.mask_sha256,
            None if sample.picture.mask is None else content_of(sample.picture.mask),
        )
        for sample in samples
    ]


FILES = {
    "a.png": png("a.png"),
    "a.txt": b"\xef\xbb\xbfa cat\r\n",
    "a_nl.txt": b"A cat sits.",
    "b.png": png("b.png"),
    "b.txt": b"a dog",
    "sub/captions.json": json.dumps({"c.png": ["one", "two"]}).encode(),
    "sub/c.png": png("c.png"),
    "sub/deeper/d.png": png("d.png"),
    "sub/deeper/d.txt": b"a deer",
    "\u732b \u00e9.png": png("cat"),
    "\u732b \u00e9.txt": "\u732b".encode(),
    f"{LONG}.png": png(LONG),
    f"{LONG}.txt": b"long",
}


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
@pytest.mark.parametrize("prefix", ["", "./"])
@pytest.mark.parametrize("masks", ["none", "folder", "tar"])
def test_an_archive_is_what_was_packed(tmp_path: Path, kind: int, prefix: str, masks: str) -> None:
    folder = write(tmp_path / "folder", FILES)
    archive = pack(tmp_path / "x.tar", {prefix + name: content for name, content in FILES.items()}, format=kind)
    masked = {"a.jpg": png("mask a"), "sub/deeper/d.png": png("mask d")}
    mask_folder = None if masks == "none" else write(tmp_path / "masks", masked)
    mask_place = pack(tmp_path / "masks.tar", masked) if masks == "tar" else mask_folder
    keys = {"recursive": True, "caption_mode": "mixed"}
    expected = look(folder, mask_folder, **keys)
    found = look(archive, mask_place, **keys)
    assert facts(found) == facts(expected)
    assert len(found.samples) == 6
    assert sum(sample.has_mask for sample in found.samples) == (0 if masks == "none" else 2)
    said = [warning.removeprefix(str(archive)) for warning in found.warnings]
    assert said == [warning.removeprefix(str(folder)) for warning in expected.warnings]
    assert not found.bad


def test_what_the_tar_command_writes_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "folder", FILES)
    subprocess.run(["tar", "-C", str(folder), "-cf", str(tmp_path / "x.tar"), "."], check=True)
    assert facts(look(tmp_path / "x.tar")) == facts(look(folder, recursive=True))


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    names = ["a.png", "._a.png", ".hidden.png", "__MACOSX/._a.png", ".cache/b.png", "./.cache/c.png", "x/.git/d.png"]
    names += ["__MACOSX/h.png", "x/@eaDir/i.png", "Thumbs.db"]
    found = look(pack(tmp_path / "x.tar", {name: png(name) for name in [*names, "../e.png", "/f.png", "x/./g.png"]}))
    assert ids(found) == ["a.png", "f.png", "x/g.png"]
    assert found.num_images == 4
    assert found.skipped == [f"{tmp_path}/x.tar/../e.png: its name leads out of the archive"]


def test_two_archives_with_the_same_names_in_them_are_told_apart(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for shard in ("0.tar", "1.TAR"):
        pack(folder / shard, {"a.png": png(shard), "a.txt": shard.encode()})
    write(folder, {"a.png": png("beside"), "a.txt": b"beside"})
    found = look(folder, tars=True)
    assert ids(found) == ["0.tar/a.png", "1.TAR/a.png", "a.png"]
    assert [sample.picture.tags for sample in found.samples] == [("0.tar",), ("1.TAR",), ("beside",)]
    assert [content_of(sample.picture.source) for sample in found.samples] == [
        png("0.tar"),
        png("1.TAR"),
        png("beside"),
    ]
    assert str(found.samples[0].picture.path) == str(folder / "0.tar" / "a.png")


def test_archives_in_subfolders_are_found_as_the_folders_are(tmp_path: Path) -> None:
    pack(tmp_path / "images" / "sub" / "x.tar", {"a.png": png("a")})
    write(tmp_path / "images", {"b.png": png("b")})
    assert ids(look(tmp_path / "images", tars=True)) == ["b.png"]
    assert ids(look(tmp_path / "images", tars=True, recursive=True)) == ["b.png", "sub/x.tar/a.png"]


def test_without_tars_an_archive_is_listed_as_not_used(tmp_path: Path) -> None:
    folder = write(tmp_path / "images", {"a.png": png("a"), "a.txt": b"a"})
    pack(folder / "x.tar", {"b.png": png("b")})
    found = look(folder)
    assert ids(found) == ["a.png"]
    assert found.warnings == [f"{folder}: files that are neither images nor captions, not used: 1, such as x.tar"]


def test_hidden_archives_and_what_is_only_named_like_one_are_no_archives(tmp_path: Path) -> None:
    """macOS leaves a "._x.tar", which is no archive, beside each x.tar."""
    folder = write(tmp_path / "images", {"a.png": png("a"), "._x.tar": b"not an archive", "d.tar/b.png": png("b")})
    os.mkfifo(folder / "fifo.tar")  # opening it would block
    assert ids(look(folder, tars=True)) == ["a.png"]
    assert ids(look(folder, tars=True, recursive=True)) == ["a.png", "d.tar/b.png"]


def test_archives_in_archives_are_not_searched(tmp_path: Path) -> None:
    inner = pack(tmp_path / "inner.tar", {"b.png": png("b")}).read_bytes()
    archive = pack(tmp_path / "x.tar", {"a.png": png("a"), "a.txt": b"a", "inner.tar": inner})
    found = look(archive, tars=True)
    assert ids(found) == ["a.png"]
    assert found.warnings == [f"{archive}: files that are neither images nor captions, not used: 1, such as inner.tar"]


def test_an_archive_counts_as_a_subfolder_for_kohya_folders_alone(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    pack(folder / "10_cat.tar", {"a.png": png("a")})
    pack(folder / "cat.tar", {"3_b/b.png": png("b")})
    plain = look(folder, tars=True, num_repeats=2)
    assert [sample.repeats for sample in plain.samples] == [2, 2]
    named = look(folder, tars=True, num_repeats=2, kohya_folders=True)
    assert [sample.repeats for sample in named.samples] == [20, 2]
    alone = look(folder / "10_cat.tar", num_repeats=2, kohya_folders=True)
    assert [sample.repeats for sample in alone.samples] == [2]


def test_the_last_of_two_members_of_one_name_counts(tmp_path: Path) -> None:
    """As for tar, to which files may be appended."""
    archive = pack(tmp_path / "x.tar", {"a.png": png("old"), "./a.png": png("new")})
    assert [content_of(sample.picture.source) for sample in look(archive).samples] == [png("new")]


def test_hard_links_are_files_and_symbolic_ones_are_not(tmp_path: Path) -> None:
    folder = write(tmp_path / "folder", {"a.png": png("a")})
    os.link(folder / "a.png", folder / "b.png")
    os.symlink("a.png", folder / "c.png")
    with tarfile.open(tmp_path / "x.tar", "w:") as tar:
        for name in "abc":
            tar.add(folder / f"{name}.png", f"./{name}.png")
        assert [member.islnk() for member in tar] == [False, True, False]
    found = look(tmp_path / "x.tar")
    assert ids(found) == ["a.png", "b.png"]
    assert [content_of(sample.picture.source) for sample in found.samples] == [png("a")] * 2
    assert found.skipped == [f"{tmp_path}/x.tar/c.png: a symbolic link"]
    assert found.num_images == 3


def test_entries_that_are_not_read_are_counted_and_named(tmp_path: Path) -> None:
    """Links, devices, names that lead out, names given again; hidden ones and folders are no loss."""
    kinds = {
        "link.txt": tarfile.SYMTYPE, "early.webp": tarfile.LNKTYPE, "pipe.png": tarfile.FIFOTYPE,
        "tty.png": tarfile.CHRTYPE, "disk.jpg": tarfile.BLKTYPE, ".link.png": tarfile.SYMTYPE,
        "sub.png": tarfile.DIRTYPE,
    }  # fmt: skip
    (tmp_path / "images").mkdir()
    with tarfile.open(tmp_path / "images" / "x.tar", "w:") as tar:
        for name, kind in kinds.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/hostname"
            tar.addfile(entry)
        for name, content in (
            ("a.png", png("old")), ("a.txt", b"old"), ("./a.png", png("new")), ("a.txt", b"new"),
            ("sub/../../../b.png", png("b")), ("sub/../c.txt", b"c"), ("..d.png", png("d")),
        ):  # fmt: skip
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    found = look(tmp_path / "images", tars=True)
    assert ids(found) == ["x.tar/a.png"]
    assert content_of(found.samples[0].picture.source) == png("new")
    assert found.samples[0].picture.tags == ("new",)
    start = f"{tmp_path}/images/x.tar/"
    assert [line.removeprefix(start) for line in found.skipped] == [
        "early.webp: a link to no file before it",
        "pipe.png: a FIFO",
        "tty.png: a device",
        "disk.jpg: a device",
        "sub/../../../b.png: its name leads out of the archive",
    ]
    assert found.num_images == 6
    (warning,) = found.warnings
    assert isinstance(warning, Listing)
    assert warning.entries == (
        "x.tar/link.txt (a symbolic link)", "x.tar/a.png (more than once; the last one is read)",
        "x.tar/a.txt (more than once; the last one is read)",
        "x.tar/sub/../c.txt (its name leads out of the archive)",
    )  # fmt: skip


def test_names_that_are_not_utf_8_are_read(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.png")
    archive = pack(tmp_path / "x.tar", {name: png("a")}, format=tarfile.GNU_FORMAT, errors="surrogateescape")
    assert list(tar_members(archive)[0]) == [name]
    (sample,) = look(archive).samples
    assert content_of(sample.picture.source) == png("a")
    sample.id.encode()  # it can be written anywhere


# Damage


def expected_problem(archive: Path) -> str:
    return f"{archive}: no tar archive, compressed, or damaged ("


def test_archives_that_cannot_be_read_are_all_reported(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    good = pack(folder / "good.tar", {"a.png": png("a"), "b.png": png("b")}).read_bytes()
    bad = {
        "compressed.tar": gzip.compress(good),
        "empty.tar": b"",
        "html.tar": b"<!doctype html><title>Not found</title>" * 40,
        "inside.tar": good[: tarfile.BLOCKSIZE + 100],  # in the middle of a file
        "header.tar": good[: good.index(b"b.png") + 100],  # in the middle of a header
        "between.tar": good[: good.index(b"b.png")],  # between two files
        "zeros.tar": good[: good.index(b"b.png") + 200].ljust(len(good), b"\xff"),  # the second header is damaged
    }
    write(folder, bad)
    with pytest.raises(DataError) as caught:
        look(folder, tars=True)
    problems = list(caught.value.problems)
    assert [problem.partition(" (")[0] + " (" for problem in problems] == [
        expected_problem(folder / name) for name in sorted(bad)
    ]
    assert all(problem.endswith("); only whole and uncompressed ones are read") for problem in problems)


def test_an_archive_that_is_not_there_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.tar: cannot be read \(No such file or directory\)"):
        tar_members(tmp_path / "gone.tar")


def test_an_archive_of_nothing_holds_no_image(tmp_path: Path) -> None:
    archive = pack(tmp_path / "x.tar", {})
    (warning,) = look(archive).warnings
    assert warning.startswith(f"{archive}: holds no image (")


def test_damaged_members_are_skipped_by_name(tmp_path: Path) -> None:
    archive = pack(
        tmp_path / "x.tar",
        {
            "cut.png": png("cut")[:100], "empty.png": b"", "text.jpg": b"hello", "good.png": png("good"),
            "latin.png": png("latin"), "latin.txt": b"caf\xe9",
        },
    )  # fmt: skip
    found = look(archive)
    assert ids(found) == ["good.png"]
    assert found.num_images == 5
    assert sorted(found.bad) == [
        f"{archive}/cut.png: truncated: the PNG ends inside its IDAT chunk",
        f"{archive}/empty.png: zero bytes",
        f"{archive}/latin.png: its caption latin.txt: not UTF-8 (byte 3 is 0xe9); save it as UTF-8",
        f"{archive}/text.jpg: not an image (text)",
    ]


def test_a_damaged_mask_skips_its_image(tmp_path: Path) -> None:
    archive = pack(tmp_path / "x.tar", {"a.png": png("a"), "b.png": png("b")})
    found = look(archive, pack(tmp_path / "masks.tar", {"a.png": b"no image"}))
    assert ids(found) == ["b.png"]
    assert found.bad == [f"{archive}/a.png: its mask a.png: not an image (text)"]


def test_a_damaged_captions_json_is_named_with_its_archive(tmp_path: Path) -> None:
    archive = pack(tmp_path / "images" / "x.tar", {"a.png": png("a"), "sub/captions.json": b"{"})
    with pytest.raises(DataError, match=r"images/x\.tar/sub/captions\.json: not JSON \(line 1"):
        look(tmp_path / "images", tars=True)
    with pytest.raises(DataError, match=r"images/x\.tar/sub/captions\.json: not JSON \(line 1"):
        look(archive)


def test_members_larger_than_any_image_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with open(path, "wb") as file:
        file.truncate(MAX_BYTES + 2)  # a hole: it takes no space
    status = path.stat()
    with pytest.raises(Unreadable, match="more than the limit of"):
        TarMember(path, 0, MAX_BYTES + 1, status.st_mtime_ns, status.st_ctime_ns).read()


# Change


@pytest.mark.parametrize("change", ["replaced", "shorter", "gone"])
def test_an_archive_that_changes_after_the_scan_is_seen(tmp_path: Path, change: str) -> None:
    archive = pack(tmp_path / "x.tar", {"b.png": png("b"), "a.png": png("a")})
    sample = look(archive).samples[0]
    status = archive.stat()
    if change == "replaced":  # by one of the same size
        pack(archive, {"b.png": png("c"), "a.png": png("d")})
        assert archive.stat().st_size == status.st_size
        os.utime(archive, ns=(status.st_mtime_ns, status.st_mtime_ns + 1))
    elif change == "shorter":
        os.truncate(archive, 700)
        os.utime(archive, ns=(status.st_mtime_ns, status.st_mtime_ns))
    else:
        archive.unlink()
    reason = {"gone": "is not readable \\(No such file or directory\\)"}.get(change, "has changed since")
    with pytest.raises(Unreadable, match=rf"x\.tar {reason}"):
        content_of(sample.picture.source)


def test_a_second_scan_reads_no_image(tmp_path: Path, opened: list[str]) -> None:
    archive = pack(tmp_path / "x.tar", {"a.png": png("a"), "b.png": png("b")})
    masks = pack(tmp_path / "masks.tar", {"a.png": png("mask")})
    opened.clear()
    first = look(archive, masks)
    once = opened.count("x.tar"), opened.count("masks.tar")
    opened.clear()
    second = look(archive, masks)
    again = opened.count("x.tar"), opened.count("masks.tar")
    assert (once[0] - again[0], once[1] - again[1]) == (2, 1)  # what remains is the list
    opened.clear()
    tar_members(archive)
    assert opened.count("x.tar") == again[0]
    assert facts(second) == facts(first)


def test_a_changed_archive_is_looked_at_again(tmp_path: Path) -> None:
    archive = pack(tmp_path / "x.tar", {"a.png": png("a"), "a.txt": b"a cat"})
    status = archive.stat()
    before = look(archive)
    pack(archive, {"a.png": png("b"), "a.txt": b"a dog"})
    os.utime(archive, ns=(status.st_mtime_ns, status.st_mtime_ns))  # its time of change still differs
    after = look(archive)
    assert archive.stat().st_size == status.st_size
    assert before.samples[0].picture.sha256 != after.samples[0].picture.sha256
    assert after.samples[0].picture.tags == ("a dog",)
    assert content_of(after.samples[0].picture.source) == png("b")
