"""Cache entries: what their names depend on, and what becomes of damage, of a full disk and of two writers."""

import contextlib
import errno
import hashlib
import json
import os
import resource
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import anima_train
from anima_train.core.errors import SpaceError
from anima_train.data import cache as cache_module
from anima_train.data.buckets import Size
from anima_train.data.cache import SCHEMA, Cache, DamagedEntry, Kind, entry_key, write_files
from anima_train.data.loader import TextIdentity
from anima_train.data.samples import Picture, Sample, View
from anima_train.data.settings import DirectoryOptions

KEY = "ab" + "0" * 62
KEY2 = "cd" + "0" * 62

WRITER = """
import sys, torch
from pathlib import Path
from anima_train.data.cache import Cache, write_files
cache = Cache(Path(sys.argv[1]))
for round in range(3):
    for entry in range(40):
        write_files([cache.entry_file("latent", f"{entry:064x}", {"latents": torch.full((16, 40), float(entry))})])
"""


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def save(cache: Cache, kind: Kind, key: str, tensors: Mapping[str, Tensor]) -> None:
    write_files([cache.entry_file(kind, key, tensors)])


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """As on a disk that is full after this many bytes of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Names


def sample(cache: Cache, **changes: object) -> Sample:
    picture = {"path": Path("a.png"), "source": Path("a.png"), "sha256": "image", "width": 60, "height": 40,
               "tags": ("a cat",), "mask": Path("m.png"), "mask_sha256": "mask"}  # fmt: skip
    picture |= {name: value for name, value in changes.items() if name in picture}
    rest = {"size": Size(48, 32), "resolution": 40, "directory": 0, "options": DirectoryOptions(), "id": "0/a.png@40"}
    rest |= {name: value for name, value in changes.items() if name in rest}
    return Sample(picture=Picture(**picture), cache=cache, **rest)


def test_a_latent_depends_on_image_size_and_vae_only(cache: Cache):
    key = View(sample(cache)).latent_key("vae")
    for change in ({"sha256": "other"}, {"size": Size(64, 32)}, {"size": Size(48, 64)}):
        assert View(sample(cache, **change)).latent_key("vae") != key
    assert View(sample(cache)).latent_key("other vae") != key
    for change in (
        {"path": Path("moved/b.png")}, {"source": Path("moved/b.png")}, {"tags": ("a dog",)}, {"mask_sha256": "other"},
        {"mask": None}, {"id": "x"}, {"directory": 3}, {"resolution": 41}, {"options": DirectoryOptions(num_repeats=3)},
    ):  # fmt: skip
        assert View(sample(cache, **change)).latent_key("vae") == key


def test_a_mask_depends_on_mask_image_size_and_size_only(cache: Cache):
    key = View(sample(cache)).mask_key()
    for change in (
        {"mask_sha256": "other"}, {"width": 61}, {"height": 41}, {"size": Size(64, 32)}, {"size": Size(48, 64)}
    ):  # fmt: skip
        assert View(sample(cache, **change)).mask_key() != key
    for change in ({"path": Path("b.png")}, {"mask": Path("n.png")}, {"tags": ("a dog",)}, {"sha256": "other"}):
        assert View(sample(cache, **change)).mask_key() == key


def test_a_text_depends_on_caption_encoder_tokenizers_adapter_and_dtype():
    whole = {"encoder": "e", "tokenizer": "t", "t5_tokenizer": "t5", "adapter": "a", "dtype": "bfloat16"}
    keys = {TextIdentity(**{**whole, name: "other"}).key("a cat") for name in whole}
    keys |= {TextIdentity(**whole).key(caption) for caption in ("a cat", "a dog", "", "a cat ")}
    assert len(keys) == 9
    assert TextIdentity(**whole).key("a cat") == TextIdentity(**whole).key("a cat")
    lengths = [TextIdentity(**whole, max_tokens=number).key("a cat") for number in (512, 513, 1024)]
    assert lengths[0] == TextIdentity(**whole).key("a cat") == entry_key("text", caption="a cat", **whole)
    assert len({*lengths}) == 3


def test_values_never_run_together():
    assert entry_key("text", caption="ab", encoder="c") != entry_key("text", caption="a", encoder="bc")
    assert entry_key("text", a="1") != entry_key("text", a=1)
    assert entry_key("latent", a="1") != entry_key("mask", a="1")


def test_a_caption_of_any_characters_has_a_key():
    assert len({entry_key("text", caption=caption) for caption in ("猫", "\ud83d", "\x00", '"', "\\")}) == 5


def test_an_entry_of_another_schema_is_not_seen(cache: Cache):
    text = json.dumps({"image": "x", "kind": "latent", "schema": SCHEMA + 1}, sort_keys=True)
    save(cache, "latent", hashlib.sha256(text.encode()).hexdigest(), {"latents": torch.zeros(2)})
    assert entry_key("latent", image="x") not in cache.keys("latent")
    same = json.dumps({"image": "x", "kind": "latent", "schema": SCHEMA}, sort_keys=True)
    assert entry_key("latent", image="x") == hashlib.sha256(same.encode()).hexdigest()


# Content


@pytest.mark.parametrize(
    "tensors",
    [
        {"latents": torch.randn(16, 1, 4, 6)},
        {"context": torch.randn(5, 8).to(torch.bfloat16)},
        {"qwen": torch.randn(3, 8, dtype=torch.bfloat16), "t5_ids": torch.tensor([5, 2**40, 1])},
        {"qwen": torch.empty(0, 8), "t5_ids": torch.tensor([1])},  # the empty caption
        {"mask": torch.tensor(0.5)},
        {"mask": torch.arange(12.0).reshape(3, 4).T},  # not contiguous
        {"latents": torch.arange(12.0)[4:8]},  # part of a larger tensor
        {"latents": torch.tensor([float("nan"), float("inf"), -0.0])},
    ],
)
def test_an_entry_is_read_as_it_was_written(cache: Cache, tensors: dict[str, Tensor]):
    save(cache, "latent", KEY, tensors)
    found = cache.load("latent", KEY)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].nan_to_num(7.0), tensor.nan_to_num(7.0)) or tensor.numel() == 0
        assert found[name].shape == tensor.shape


def test_saving_again_replaces(cache: Cache):
    save(cache, "latent", KEY, {"latents": torch.zeros(3)})
    save(cache, "latent", KEY, {"latents": torch.ones(4)})
    assert torch.equal(cache.load("latent", KEY)["latents"], torch.ones(4))
    assert len(files(cache.folder)) == 1


def test_keys_lists_each_kind_by_itself(cache: Cache):
    assert cache.keys("latent") == set()  # no folder yet
    save(cache, "latent", KEY, {"latents": torch.zeros(3)})
    save(cache, "text", KEY2, {"context": torch.zeros(3)})
    assert cache.keys("latent") == {KEY}
    assert cache.keys("text") == {KEY2}
    assert cache.keys("mask") == set()


def test_temporary_files_are_no_entries(cache: Cache):
    path = cache.path("latent", KEY)
    save(cache, "latent", KEY, {"latents": torch.zeros(3)})
    (path.parent / f".{path.name}.x7_q.tmp").write_bytes(b"half")  # what a killed process leaves
    assert cache.keys("latent") == {KEY}


def test_the_permissions_are_those_of_the_umask(cache: Cache):
    old = os.umask(0o027)
    try:
        save(cache, "latent", KEY, {"latents": torch.zeros(3)})
    finally:
        os.umask(old)
    assert cache.path("latent", KEY).stat().st_mode & 0o777 == 0o640


# Damage


def test_every_flipped_bit_is_noticed(cache: Cache):
    save(cache, "latent", KEY, {"latents": torch.arange(3, dtype=torch.bfloat16), "t5_ids": torch.tensor([4])})
    path = cache.path("latent", KEY)
    content = path.read_bytes()
    cache.load("latent", KEY)
    for position in range(len(content)):
        for bit in range(8):
            path.write_bytes(content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :])
            with pytest.raises(DamagedEntry):
                cache.load("latent", KEY)


def test_every_truncation_is_noticed(cache: Cache):
    save(cache, "latent", KEY, {"latents": torch.arange(3.0)})
    path = cache.path("latent", KEY)
    content = path.read_bytes()
    assert cache.is_whole("latent", KEY)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert not cache.is_whole("latent", KEY)
        with pytest.raises(DamagedEntry):
            cache.load("latent", KEY)
    path.write_bytes(content + b"\0")
    assert not cache.is_whole("latent", KEY)


@pytest.mark.parametrize("content", [b"", b"<html>", b"version https://git-lfs", b"\xff" * 100, b"\0" * 100])
def test_other_content_is_damage(cache: Cache, content: bytes):
    cache.path("latent", KEY).parent.mkdir(parents=True)
    cache.path("latent", KEY).write_bytes(content)
    with pytest.raises(DamagedEntry):
        cache.load("latent", KEY)


def test_a_missing_entry_is_named(cache: Cache):
    with pytest.raises(DamagedEntry, match=KEY):
        cache.load("latent", KEY)


# Rejected


def test_rejected_keys_are_remembered_with_their_reasons(cache: Cache):
    assert cache.rejected() == {}
    write_files([cache.rejection_file(KEY, "truncated: the file stops, 猫")])
    write_files([cache.rejection_file(KEY2, "its mask \udcff.png: not an image")])  # a name that is not UTF-8
    assert Cache(cache.folder).rejected() == {
        KEY: "truncated: the file stops, 猫",
        KEY2: "its mask \\udcff.png: not an image",
    }


# Space


def test_a_full_disk_names_the_bytes_and_leaves_nothing_behind(cache: Cache):
    save(cache, "latent", KEY, {"latents": torch.zeros(10)})
    save(cache, "latent", KEY2, {"latents": torch.ones(1000)})
    before = {path: path.read_bytes() for path in files(cache.folder)}
    with largest_file(2000), pytest.raises(SpaceError) as caught:
        save(cache, "latent", KEY2, {"latents": torch.zeros(1000)})
    size = cache.path("latent", KEY2).stat().st_size
    assert f"needs {size:,} bytes" in str(caught.value)
    assert "cache_dir" in str(caught.value)
    assert {path: path.read_bytes() for path in files(cache.folder)} == before


def test_of_files_written_together_those_before_a_full_disk_stay(cache: Cache):
    small = cache.entry_file("latent", KEY, {"latents": torch.zeros(10)})
    large = cache.entry_file("latent", KEY2, {"latents": torch.zeros(1000)})
    last = cache.entry_file("mask", KEY, {"mask": torch.zeros(10)})
    with largest_file(2000), pytest.raises(SpaceError, match=f"this file needs {len(large.content):,} bytes"):
        write_files([small, large, last])
    assert files(cache.folder) == [small.path]
    assert torch.equal(cache.load("latent", KEY)["latents"], torch.zeros(10))


def test_files_that_cannot_be_flushed_are_not_there_and_name_their_bytes(cache: Cache, monkeypatch: pytest.MonkeyPatch):
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a network's disk, which looks at its quota late

    entries = [cache.entry_file("latent", key, {"latents": torch.zeros(10)}) for key in (KEY, KEY2)]
    monkeypatch.setattr(os, "fsync", fail)
    num_bytes = sum(len(entry.content) for entry in entries)
    with pytest.raises(SpaceError, match=f"these files need {num_bytes:,} bytes.* set cache_dir"):
        write_files(entries)
    assert files(cache.folder) == []


def test_a_folder_that_cannot_be_made_is_a_space_error(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    cache = Cache(tmp_path / "file" / "cache")
    with pytest.raises(SpaceError, match=r"needs [\d,]+ bytes") as caught:
        save(cache, "latent", KEY, {"latents": torch.zeros(10)})
    assert str(cache.folder) in str(caught.value)
    with pytest.raises(SpaceError, match="needs 8 bytes"):
        write_files([cache.rejection_file(KEY, "no image")])


# Several processes


@pytest.mark.slow
def test_two_processes_that_write_the_same_entries_leave_valid_ones(cache: Cache):
    environment = {**os.environ, "PYTHONPATH": str(Path(anima_train.__file__).parents[1])}
    command = [sys.executable, "-c", WRITER, str(cache.folder)]
    writers = [subprocess.Popen(command, env=environment) for _ in range(2)]
    while any(writer.poll() is None for writer in writers):
        for key in cache.keys("latent"):  # an entry that is visible is whole, all the time
            assert torch.equal(cache.load("latent", key)["latents"], torch.full((16, 40), float(int(key, 16))))
        time.sleep(0.01)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert cache.keys("latent") == {f"{entry:064x}" for entry in range(40)}
    assert len(files(cache.folder)) == 40  # no temporary file is left


HOLDER = """
import sys, time
from pathlib import Path
from anima_train.data.cache import Cache
with Cache(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def held_elsewhere(cache: Cache) -> Iterator[subprocess.Popen]:
    """Another process that holds the cache's lock."""
    environment = {**os.environ, "PYTHONPATH": str(Path(anima_train.__file__).parents[1])}
    command = [sys.executable, "-c", HOLDER, str(cache.folder)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield holder
        holder.kill()


def test_a_lock_is_waited_for_with_messages_and_free_when_its_holder_is_killed(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(cache_module, "MESSAGE_EVERY", 0.2)
    monkeypatch.setattr(cache_module, "LOCK_POLL", 0.02)
    caplog.set_level("INFO", cache_module.__name__)
    taken = threading.Event()

    def take() -> None:
        with cache.locked():
            taken.set()

    waiting = threading.Thread(target=take)
    with held_elsewhere(cache) as holder:
        waiting.start()
        while len(caplog.messages) < 3 and waiting.is_alive():
            time.sleep(0.01)
        assert not taken.is_set()
        holder.kill()
        assert taken.wait(10)
    waiting.join()
    assert set(caplog.messages) == {f"waiting for another process that is filling the cache {cache.folder}"}
    with cache.locked():  # whoever held it before
        assert cache.keys("latent") == set()


def test_a_lock_is_given_back_after_an_error(cache: Cache):
    def fail() -> None:
        with cache.locked():
            raise ValueError

    for _ in range(2):
        with pytest.raises(ValueError, match=r"^$"):
            fail()


def test_a_lock_that_cannot_be_made_is_a_space_error(tmp_path: Path, disk: Callable[..., Path]):
    (tmp_path / "file").write_text("not a folder")
    folder = disk(1 << 20)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    for cache in (Cache(tmp_path / "file" / "cache"), Cache(folder), Cache(folder / "cache")):
        with pytest.raises(SpaceError, match="cannot be locked to be filled") as caught, cache.locked():
            pass
        assert str(cache.folder) in str(caught.value)


def header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


ENTRY = b'{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        struct.pack("<Q", 2**63) + b"{}",
        header(b"{}" + b" " * (2 << 20)),
        header(b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        header(b'{"a": ' + ENTRY.replace(b"[1]", b"[9223372036854775807, 4]") + b"}", b"1234"),
        header(b'{"a": ' + ENTRY.replace(b"[0, 4]", b"[0, 4000]") + b"}", b"1234"),
        header(b'{"a": ' + ENTRY.replace(b"[0, 4]", b"[-4, 0]") + b"}", b"1234"),
        header(b'{"a": ' + ENTRY + b', "b": ' + ENTRY + b"}", b"1234"),
        header(b'{"a": ' + ENTRY.replace(b"[0, 4]", b"[4, 8]") + b"}", b"12345678"),
        header(b'{"a\xff": ' + ENTRY + b"}", b"1234"),
    ],
    ids=lambda content: str(content[8:40]),
)
def test_entry_with_a_header_that_nobody_writes_is_damaged(cache: Cache, content: bytes) -> None:
    path = cache.path("latent", KEY)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(DamagedEntry):
        cache.load("latent", KEY)
    assert cache.is_whole("latent", KEY) in (True, False)  # of the length alone; never an error
