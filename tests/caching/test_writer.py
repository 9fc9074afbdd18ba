"""Entries are written behind the encoder, together, and none is lost or half there."""

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from anima_train.caching.writer import MAX_WAITING, EntryWriter, Made, Rejected
from anima_train.core.errors import Interrupted, SpaceError
from anima_train.data.cache import Cache

FIRST = "ab"  # what the keys begin with, so that all entries lie in one folder


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture
def batch(cache):
    """Makes a batch of latents of these numbers, which are their values, too."""

    def make(*numbers, value=None):
        entries = [SimpleNamespace(cache=cache, kind="latent", key=f"{FIRST}{number:062x}") for number in numbers]
        values = [{"latents": torch.full((4,), float(number if value is None else value))} for number in numbers]
        return Made(entries, values)

    return make


class Disk:
    """The disk, which can be held: `os.fsync` does not return meanwhile, and is counted by the path's suffix."""

    def __init__(self, monkeypatch):
        self.free = threading.Event()
        self.free.set()
        self.reached = threading.Event()
        self.synced = []
        self.threads = set()
        fsync = os.fsync

        def held_fsync(descriptor):
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            self.synced.append(path.suffix)
            self.threads.add(threading.current_thread())
            self.reached.set()
            assert self.free.wait(30), "the disk was never free"
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", held_fsync)

    def hold(self):
        self.free.clear()
        self.reached.clear()


@pytest.fixture
def disk(monkeypatch):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to tell files from folders")
    held = Disk(monkeypatch)
    yield held
    held.free.set()


def numbers(cache):
    return sorted(int(key.removeprefix(FIRST), 16) for key in cache.keys("latent"))


def test_nobody_waits_for_the_disk_and_what_waits_is_written_together(cache, batch, disk):
    disk.hold()
    with EntryWriter() as writer:
        writer.put(batch(0))
        assert disk.reached.wait(30)
        for number in range(1, 1 + MAX_WAITING):
            writer.put(batch(2 * number, 2 * number + 1))  # returns, though nothing can be written
        assert numbers(cache) == []
        disk.free.set()
    assert len(numbers(cache)) == 1 + 2 * MAX_WAITING
    assert disk.synced.count(".tmp") == 1 + 2 * MAX_WAITING  # every file, or it may be empty after a power cut
    assert disk.synced.count("") == 2  # the folder: once for the first batch, once for all others
    assert writer.made == {"latents": 1 + 2 * MAX_WAITING}
    assert threading.current_thread() not in disk.threads


def test_a_slow_disk_holds_the_encoder_up_instead_of_filling_the_memory(cache, batch, disk):
    disk.hold()
    with EntryWriter() as writer:
        putting = threading.Thread(target=lambda: [writer.put(batch(number)) for number in range(20)])
        putting.start()
        assert disk.reached.wait(30)
        putting.join(0.3)
        assert putting.is_alive()
        assert len(writer.waiting) <= MAX_WAITING + 1
        disk.free.set()
        putting.join()
    assert numbers(cache) == list(range(20))


def test_values_are_what_was_put_and_those_not_finite_are_rejected_by_the_writer(cache, batch):
    with EntryWriter() as writer:
        writer.put(batch(3, 4))
        writer.put(batch(5, value=float("nan")))
        (entry,) = batch(6).entries
        writer.put(Rejected(entry, "truncated", for_now=True))
    assert numbers(cache) == [3, 4]
    for number in (3, 4):
        assert cache.load("latent", f"{FIRST}{number:062x}")["latents"].tolist() == [number] * 4
    assert sorted(cache.rejected().values()) == ["its latents are not finite", "truncated"]
    assert writer.made == {"latents": 2}


def test_a_failure_ends_the_filling_with_the_next_batch_and_nothing_is_written_after_it(tmp_path, cache, batch):
    (tmp_path / "cache").write_text("no folder")
    tried = 0
    with pytest.raises(SpaceError, match=r"this file needs [\d,]+ bytes"), EntryWriter() as writer:  # noqa: PT012
        for number in range(1000):
            tried += 1
            writer.put(batch(number))
            writer.jobs.join()  # as an encoder that takes longer than the disk
            (tmp_path / "cache").unlink(missing_ok=True)  # it could be written from here on
    assert tried == 2
    assert numbers(cache) == []


def test_a_failure_of_the_last_batch_is_raised_on_leaving(tmp_path, batch):
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(SpaceError, match=r"this file needs [\d,]+ bytes"), EntryWriter() as writer:
        writer.put(batch(1))


@pytest.mark.parametrize("stop", [Interrupted("now", 143), ValueError("now")])
def test_a_run_that_is_stopped_writes_what_was_encoded(cache, batch, disk, stop):
    disk.hold()
    with pytest.raises(type(stop), match="now"), EntryWriter() as writer:  # noqa: PT012
        writer.put(batch(0))
        assert disk.reached.wait(30)
        writer.put(batch(1, 2))
        threading.Timer(0.1, disk.free.set).start()
        raise stop
    assert numbers(cache) == [0, 1, 2]


def test_ctrl_c_drops_what_waits_and_leaves_only_whole_files(cache, batch, disk):
    disk.hold()
    with pytest.raises(KeyboardInterrupt), EntryWriter() as writer:  # noqa: PT012
        writer.put(batch(0))
        assert disk.reached.wait(30)
        writer.put(batch(1, 2))
        threading.Timer(0.1, disk.free.set).start()
        raise KeyboardInterrupt
    assert numbers(cache) == [0]
    assert not list(cache.folder.rglob("*.tmp"))


def test_ctrl_c_waits_for_no_disk_that_hangs(batch, disk, monkeypatch):
    monkeypatch.setattr("anima_train.caching.writer.PATIENCE", 0.1)
    disk.hold()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), EntryWriter() as writer:  # noqa: PT012
        writer.put(batch(0))
        assert disk.reached.wait(30)
        raise KeyboardInterrupt
    assert time.monotonic() - started < 10
    disk.free.set()
    writer.thread.join()
