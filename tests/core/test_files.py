"""Files are there whole or not at all."""

import concurrent.futures
import errno
import hashlib
import math
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from anima_train.core.errors import SpaceError
from anima_train.core.files import (
    SYNC_THREADS,
    DiskRequirement,
    atomic_files,
    atomic_folder,
    atomic_path,
    current_umask,
    free_bytes,
    on_disk,
    require_space,
    sha256_file,
    write_text,
)  # fmt: skip


def python(code, *arguments):
    """Run code in a process of its own, with the files room imported."""
    setup = "import os, resource, signal, sys\nfrom pathlib import Path\nfrom anima_train.core.files import *\n"
    return subprocess.run(
        [sys.executable, "-c", setup + code, *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip


@pytest.fixture
def umask():
    """Set the umask for one test."""
    before = current_umask()
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**20 + 1])
def test_the_hash_is_sha256_of_all_bytes(tmp_path, size):
    data = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "a").write_bytes(data[:size])
    assert sha256_file(tmp_path / "a") == hashlib.sha256(data[:size]).hexdigest()


def test_a_file_appears_with_its_folders_and_nothing_else(tmp_path):
    write_text(tmp_path / "a/b/c.txt", "猫\n")
    assert (tmp_path / "a/b/c.txt").read_bytes() == "猫\n".encode()
    assert os.listdir(tmp_path / "a/b") == ["c.txt"]


def test_threads_that_ask_for_the_umask_leave_it_as_it_is(umask):
    umask(0o027)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: current_umask(), range(20_000)))
    assert found == {0o027}
    assert current_umask() == 0o027


def test_a_file_is_replaced_at_the_end_only(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_path(path) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_files_are_flushed_before_one_appears_and_each_folder_once(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(descriptor):
        fsync(descriptor)
        events.append(os.fstat(descriptor).st_ino)

    def noted_replace(source, target):
        events.append(("appears", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    paths = [tmp_path / folder / f"{number}.txt" for folder in "ab" for number in range(10)]
    with atomic_files() as write:
        for path in paths:
            write(path, path.name.encode())
        assert events == []
        assert not any(path.exists() for path in paths)
    files, folders = [path.stat().st_ino for path in paths], [(tmp_path / name).stat().st_ino for name in "ab"]
    assert sorted(events[:20]) == sorted(files)  # each of them: a power cut leaves no empty file
    assert events[20:40] == [("appears", inode) for inode in files]
    assert sorted(events[40:]) == sorted(folders)
    assert all(path.read_text() == path.name for path in paths)
    assert len(list(tmp_path.rglob("*"))) == 2 + 20


def test_files_are_flushed_side_by_side(tmp_path, monkeypatch):
    meeting, fsync = threading.Barrier(SYNC_THREADS, timeout=30), os.fsync

    def fsync_together(descriptor):
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            meeting.wait()  # raises if they come one after the other
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_together)
    with atomic_files() as write:
        for number in range(2 * SYNC_THREADS):
            write(tmp_path / str(number), b"x")
    assert len(list(tmp_path.iterdir())) == 2 * SYNC_THREADS


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SpaceError])
def test_of_several_files_none_appears_after_an_exception_or_a_failed_flush(tmp_path, monkeypatch, failure):
    (tmp_path / "0").write_text("old")

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_three():
        with atomic_files() as write:
            for number in range(3):
                write(tmp_path / str(number), b"new")
            if failure is not SpaceError:
                raise failure("stop")
            monkeypatch.setattr(os, "fsync", fail)

    with pytest.raises(failure, match=r"stop|No space left"):
        write_three()
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    assert (tmp_path / "0").read_text() == "old"


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit, OSError])
def test_whatever_is_raised_leaves_the_old_file_and_no_temporary_one(tmp_path, failure):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_half():
        with atomic_path(path) as temporary:
            temporary.write_text("half of the new")
            raise failure("stop")

    with pytest.raises(failure, match="stop"):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_writer_that_removes_its_file_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_path(path) as temporary:
        temporary.unlink()
    assert path.read_text() == "old"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_is_respected(tmp_path, umask, mask, mode):
    umask(mask)
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("")
        temporary.chmod(0o600)  # as safetensors does
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode
    assert current_umask() == mask


def test_a_full_disk_is_an_error_of_its_own_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    # The kernel refuses to let a file grow past the limit, as a full disk would.
    done = python(
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    write_text(Path(sys.argv[1]), 'x' * 2000)\n"
        "except SpaceError as error:\n"
        "    print(error)\n"
        "    sys.exit(error.exit_code)\n",
        path,
    )
    assert done.returncode == 6, done.stderr
    assert done.stdout == f"{path}: could not be written (File too large); earlier files are intact\n"
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_that_may_not_be_written_is_an_error_of_the_same_kind(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    done = python(
        "if os.geteuid() == 0:\n"
        "    os.setuid(65534)\n"
        "try:\n"
        "    write_text(Path(sys.argv[1]), 'x')\n"
        "except SpaceError as error:\n"
        "    print(error)\n",
        locked / "a.txt",
    )
    assert done.stdout.startswith(f"{locked}/a.txt: could not be written (Permission denied)"), done.stderr
    assert os.listdir(locked) == []


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EROFS"])
def test_every_way_of_having_no_space_is_recognised(tmp_path, number):
    with pytest.raises(SpaceError, match="earlier files are intact"), atomic_path(tmp_path / "a"):
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))


def test_a_writer_killed_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    done = python(
        "with atomic_path(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n",
        path,
    )
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    write_text(path, "new")  # what it left is in nobody's way
    assert path.read_text() == "new"


def test_several_writers_leave_one_whole_file(tmp_path):
    path = tmp_path / "a.txt"
    code = "for _ in range(50):\n    write_text(Path(sys.argv[1]), sys.argv[2] * 10_000)\n"
    setup = "import sys\nfrom pathlib import Path\nfrom anima_train.core.files import write_text\n"
    writers = [
        subprocess.Popen([sys.executable, "-c", setup + code, str(path), letter], cwd=Path(__file__).parents[2])
        for letter in "ab"
    ]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            seen.add(path.read_text())
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen | {path.read_text()} <= {"a" * 10_000, "b" * 10_000}
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_appears_whole_with_the_permissions_the_umask_allows(tmp_path, umask):
    umask(0o027)
    with atomic_folder(tmp_path / "a" / "b") as temporary:
        (temporary / "c").mkdir()
        (temporary / "c" / "d.txt").write_text("new")
        assert not (tmp_path / "a" / "b").exists()
    assert os.listdir(tmp_path / "a") == ["b"]
    assert (tmp_path / "a" / "b" / "c" / "d.txt").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o750


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, OSError(errno.ENOSPC, "full")])
def test_whatever_is_raised_leaves_no_folder(tmp_path, failure):
    def write():
        with atomic_folder(tmp_path / "a") as temporary:
            (temporary / "b").write_text("new")
            raise failure

    with pytest.raises(SpaceError if isinstance(failure, OSError) else failure):
        write()
    assert os.listdir(tmp_path) == []


# Space ---------------------------------------------------------------------------------------------------------------


def test_a_write_that_cannot_fit_does_not_begin_and_says_what_is_missing(disk):
    folder = disk(64 * 1024)
    write_text(folder / "a.txt", "old")
    began = False
    with pytest.raises(SpaceError) as caught, atomic_path(folder / "a.txt", 100_000):
        began = True
    assert not began
    assert str(caught.value) == (
        f"{folder}/a.txt: could not be written (No space left on device); 97.7 KiB needed, 60.0 KiB free, "
        "40.0 KiB missing; earlier files are intact"
    )
    assert (folder / "a.txt").read_text() == "old"
    assert os.listdir(folder) == ["a.txt"]


def test_a_disk_that_fills_up_while_writing_keeps_the_old_file_and_says_what_is_missing(disk):
    folder = disk(64 * 1024)
    write_text(folder / "a.txt", "old")

    def write():
        with atomic_path(folder / "a.txt", 40_000) as temporary:
            (folder / "of-another-process").write_bytes(bytes(32 * 1024))
            temporary.write_bytes(bytes(40_000))

    with pytest.raises(SpaceError, match=r"39\.1 KiB needed, 28\.0 KiB free, 12\.0 KiB missing; earlier files are"):
        write()
    assert (folder / "a.txt").read_text() == "old"
    assert sorted(os.listdir(folder)) == ["a.txt", "of-another-process"]
    (folder / "of-another-process").unlink()
    write_text(folder / "a.txt", "x" * 40_000)


def test_a_write_of_unknown_size_says_what_is_free(disk):
    folder = disk(64 * 1024)
    with (
        pytest.raises(SpaceError, match=r"device\); the disk has 64\.0 KiB free; earlier"),
        atomic_path(folder / "a") as temporary,
    ):
        temporary.write_bytes(bytes(100_000))
    assert os.listdir(folder) == []


def test_a_disk_without_a_size_is_never_too_small(disk):
    assert free_bytes(disk(0)) == math.inf
    write_text(disk(0, "other") / "a.txt", "written")


def test_free_space_is_that_of_the_nearest_folder_there_is(disk):
    folder = disk(64 * 1024)
    assert free_bytes(folder) == free_bytes(folder / "not" / "there") == 64 * 1024


@pytest.mark.parametrize(("num_bytes", "expected"), [(0, 0), (1, 4096), (4096, 4096), (4097, 8192)])
def test_files_take_whole_blocks(num_bytes, expected):
    assert on_disk(num_bytes) == expected


def test_what_folders_of_one_disk_need_is_summed_and_each_disk_is_reported(disk):
    first, second = disk(64 * 1024, "first"), disk(64 * 1024, "second")
    (first / "a").mkdir()
    needs = [
        DiskRequirement(first / "a", 40_960, "the cache"),
        DiskRequirement(first / "b", 40_960, "a state"),
        DiskRequirement(second, 131_072, "weights"),
    ]
    with pytest.raises(SpaceError) as caught:
        require_space(needs, "free some space")
    assert list(caught.value.problems) == [
        f"the disk has no room for the cache in {first}/a (40.0 KiB), a state in {first}/b (40.0 KiB): 80.0 KiB "
        "needed, 64.0 KiB free, 16.0 KiB missing; free some space",
        f"the disk has no room for weights in {second} (128.0 KiB): 128.0 KiB needed, 64.0 KiB free, 64.0 KiB "
        "missing; free some space",
    ]
    require_space(needs[:1], "")
    require_space([DiskRequirement(first, 65_536, "all of it")], "")


def test_a_read_only_disk_is_refused_with_the_bytes_if_any_are_needed(disk):
    folder = disk(64 * 1024)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    require_space([DiskRequirement(folder, 0, "nothing")], "")
    with pytest.raises(SpaceError, match=r"disk/b: cannot be written, where 1\.0 KiB are needed for the cache; move"):
        require_space([DiskRequirement(folder / "b", 1024, "the cache")], "move")
