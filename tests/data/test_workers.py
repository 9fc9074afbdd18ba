"""Worker processes, really started: the same arrays and errors as in this process, and what comes of killed ones."""

import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import anima_train
from anima_train.core.errors import DataError
from anima_train.data.image_headers import BadImage, Unreadable
from anima_train.data.images import Crop, cover_and_crop, decode, decode_alpha, decode_mask, mask_to_latent
from anima_train.data.loader import read_ahead
from anima_train.data.workers import (
    MIN_ITEMS,
    MaskWork,
    PixelWork,
    Work,
    Workers,
    exchange,
    num_workers,
    result,
    usable_cpus,
)

PLAIN = Crop(64, 48)
CROPS = [PLAIN, Crop(48, 64, (0.0, 0.3)), Crop(32, 32, (1.0, 0.7), mirrored=True)]

PARENT = """
import sys, time
from anima_train.data.workers import PixelWork, Workers
from anima_train.data.images import (Crop)
from pathlib import Path
workers = Workers(1)
workers.run(PixelWork("a", Path(sys.argv[1]), sys.argv[2], Crop(16, 16)))
print(workers.processes[0].pid, flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """Two processes that all tests may use which do them no harm."""
    with Workers(2) as pool:
        yield pool


def scene(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Smooth, with some noise and no symmetry, (h, w, 3)."""
    x, y = np.meshgrid(np.linspace(0, 200, width), np.linspace(0, 150, height))
    noise = np.random.default_rng(seed).integers(0, 50, (height, width, 3))
    return (np.stack([x, y, (x + y) / 2], axis=-1) + noise).astype(np.uint8)


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pixel_work(path: Path, crop: Crop = PLAIN) -> PixelWork:
    return PixelWork(path.name, path, sha256(path), crop)


def failure(work: Work, run: Callable[[Work], np.ndarray]) -> tuple[type, str]:
    """What is wrong with an image."""
    with pytest.raises(BadImage) as caught:
        run(work)
    return caught.type, str(caught.value)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def settle(condition: Callable[[], bool]) -> bool:
    """Whether the condition holds within a few seconds."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def stopped(pool: Workers, work: Work) -> subprocess.Popen[bytes]:
    """The first process of a pool, stopped, so that it takes its next work but never ends it."""
    pool.run(work)
    (process,) = pool.processes
    os.kill(process.pid, signal.SIGSTOP)
    return process


# Results


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_pixels_are_those_of_this_process(workers: Workers, tmp_path: Path, suffix: str, crop: Crop):
    path = save(tmp_path / f"a{suffix}", scene(150, 90))
    expected = np.asarray(cover_and_crop(decode(path), crop))
    for source in (path, path.read_bytes()):
        work = PixelWork("a", source, sha256(path), crop)
        for found in (workers.run(work), Workers(0).run(work)):
            assert found.dtype == np.uint8
            assert found.shape == (crop.height, crop.width, 3)
            assert np.array_equal(found, expected)
            assert found.flags.writeable  # torch warns about arrays that are not


@pytest.mark.parametrize("crop", CROPS)
def test_masks_are_those_of_this_process(workers: Workers, tmp_path: Path, crop: Crop):
    mask = save(tmp_path / "mask.png", scene(75, 45, seed=1)[..., 0])
    alpha = scene(150, 90, seed=2)[..., :1]
    image = save(tmp_path / "image.png", np.concatenate([scene(150, 90), alpha], axis=-1))
    size = (150, 90)
    grey = np.asarray(decode_mask(mask, size), dtype=float)
    opacity = np.asarray(decode_alpha(image), dtype=float)
    both = Image.fromarray((grey * opacity / 255).round().astype(np.uint8))
    for mask_source, image_source, expected in (
        (mask, None, Image.fromarray(grey.astype(np.uint8))),
        (None, image, Image.fromarray(opacity.astype(np.uint8))),
        (mask, image.read_bytes(), both),
        (mask.read_bytes(), image, both),
    ):
        work = MaskWork("image", mask_source, image_source, sha256(mask), sha256(image), size, crop)
        found = workers.run(work)
        assert found.dtype == np.float32
        assert found.shape == (1, crop.height // 8, crop.width // 8)
        assert np.array_equal(found, mask_to_latent(expected, crop))
        assert np.array_equal(found, result(work))
    assert 0.05 < found.mean() < 0.5  # neither all nor nothing: it is a product


def test_results_come_in_the_order_of_the_work(workers: Workers, tmp_path: Path):
    paths = [save(tmp_path / f"{index}.png", scene(900 if index % 4 == 0 else 40, 50, index)) for index in range(16)]
    works = [pixel_work(path) for path in paths]
    found = list(read_ahead(works, workers.run, num_threads=workers.num_threads))
    assert len(workers.processes) == 2
    assert all(np.array_equal(array, result(work)) for array, work in zip(found, works, strict=True))


@pytest.mark.parametrize("name", ["plain", "日本 é", "line\nbreak", os.fsdecode(b"not utf-8 \xff\xfe")])
def test_any_name_is_found(workers: Workers, tmp_path: Path, name: str):
    work = pixel_work(save(tmp_path / "a.png", scene(80, 60)).rename(tmp_path / name))
    assert np.array_equal(workers.run(work), result(work))


def test_a_relative_path_means_the_current_folder_of_the_run(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    work = PixelWork("a", Path("a.png"), sha256(save(tmp_path / "a.png", scene(80, 60))), PLAIN)
    monkeypatch.chdir(tmp_path)  # after the workers have been started
    assert workers.run(work).shape == (48, 64, 3)


# Failures


def test_what_is_wrong_with_an_image_reads_the_same(workers: Workers, tmp_path: Path):
    good = save(tmp_path / "good.png", scene(80, 60))
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(save(tmp_path / "whole.jpg", scene(80, 60)).read_bytes()[:-300])
    text = tmp_path / os.fsdecode(b"\xff.png")
    text.write_text("<html>")
    for path in (cut, text):
        for work in (pixel_work(path), MaskWork("a", path, good, sha256(path), sha256(good), (80, 60), PLAIN)):
            kind, reason = failure(work, workers.run)
            assert (kind, reason) == failure(work, result)
            assert kind is BadImage
            assert ("its mask" in reason) == isinstance(work, MaskWork)
    absent = PixelWork("a", tmp_path / "absent.png", "", PLAIN)
    assert failure(absent, workers.run) == failure(absent, result)
    assert failure(absent, workers.run)[0] is Unreadable
    assert workers.run(pixel_work(good)).shape == (48, 64, 3)  # the same processes go on


def test_another_image_than_before_is_refused(workers: Workers, tmp_path: Path):
    path = save(tmp_path / "a.png", scene(80, 60))
    before = sha256(path)
    save(path, scene(80, 60, seed=1))
    works = [
        PixelWork("a", path, before, PLAIN),
        PixelWork("a", path.read_bytes(), before, PLAIN),
        MaskWork("a", path, None, before, "", (80, 60), PLAIN),
        MaskWork("a", path, path, sha256(path), before, (80, 60), PLAIN),
    ]
    for work in works:
        kind, reason = failure(work, workers.run)
        assert kind is Unreadable
        assert reason.endswith("changed while the run was starting")


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of another process")
def test_memory_that_runs_out_is_no_bad_image(tmp_path: Path):
    large = pixel_work(save(tmp_path / "large.png", np.zeros((4000, 4000, 3), np.uint8)))  # 64 MB in Pillow
    small = pixel_work(save(tmp_path / "a.png", scene(80, 60)))
    with Workers(1) as pool:
        pool.run(small)
        (process,) = pool.processes
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 30 * 2**20
        resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))
        with pytest.raises(DataError, match=r"large\.png: there is not enough memory"):
            pool.run(large)
        assert pool.processes == [process]
        assert np.array_equal(pool.run(small), result(small))


# Processes


def test_a_killed_worker_is_an_error_that_names_the_image_and_the_others_go_on(tmp_path: Path):
    work = pixel_work(save(tmp_path / "a.png", scene(80, 60)))
    with Workers(2) as pool, ThreadPoolExecutor(4) as threads:
        victim = stopped(pool, work)
        failing = threads.submit(pool.run, work)
        assert settle(lambda: not pool.idle)
        for found in threads.map(pool.run, [work] * 12):
            assert np.array_equal(found, result(work))
        os.kill(victim.pid, signal.SIGKILL)
        with pytest.raises(DataError, match=r"a\.png: the process decoding it was killed \(signal 9\); .*memory"):
            failing.result(30)
        assert victim not in pool.processes
        for found in threads.map(pool.run, [work] * 12):
            assert np.array_equal(found, result(work))
        assert len(pool.processes) <= 2


def test_a_worker_killed_while_idle_is_replaced(tmp_path: Path):
    work = pixel_work(save(tmp_path / "a.png", scene(80, 60)))
    with Workers(1) as pool:
        pool.run(work)
        pool.processes[0].kill()
        pool.processes[0].wait()
        with pytest.raises(DataError, match=r"a\.png: the process decoding it was killed"):
            pool.run(work)
        assert np.array_equal(pool.run(work), result(work))


def test_a_worker_that_cannot_start_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    work = pixel_work(save(tmp_path / "a.png", scene(80, 60)))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with Workers(1) as pool, pytest.raises(DataError, match=r"a\.png: no process can be started"):
        pool.run(work)


def test_a_worker_ends_with_its_killed_parent(tmp_path: Path):
    path = save(tmp_path / "a.png", scene(80, 60))
    environment = {**os.environ, "PYTHONPATH": str(Path(anima_train.__file__).parents[1])}
    command = [sys.executable, "-c", PARENT, str(path), sha256(path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    assert settle(lambda: not is_alive(pid))


def test_ctrl_c_does_not_reach_a_worker(workers: Workers, tmp_path: Path):
    work = pixel_work(save(tmp_path / "a.png", scene(80, 60)))
    workers.run(work)
    for process in workers.processes:
        process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    for _ in range(4):
        assert workers.run(work).shape == (48, 64, 3)


def test_a_worker_does_not_import_torch_and_is_not_disturbed_by_what_it_prints(tmp_path: Path):
    path = save(tmp_path / "a.png", scene(80, 60))
    code = (
        "import sys\n"
        "from anima_train.data import workers\n"
        "original = workers.result\n"
        "def noisy(work):\n"
        "    print('printed', 'torch' in sys.modules)\n"
        "    return original(work)\n"
        "workers.result = noisy\n"
        "workers.main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(anima_train.__file__).parents[1])}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=pipe, stdout=pipe, stderr=pipe
    ) as worker:
        header, parts = exchange(worker, pixel_work(path))
        assert header["shape"] == [48, 64, 3]
        assert len(parts[0]) == 48 * 64 * 3
        assert worker.stdin is not None
        assert worker.stderr is not None
        worker.stdin.close()
        assert worker.wait(10) == 0
        assert worker.stderr.read().decode().split() == ["printed", "False"]


def test_processes_are_started_when_they_are_needed(tmp_path: Path):
    work = pixel_work(save(tmp_path / "a.png", scene(80, 60)))
    with Workers(5) as pool:
        assert pool.processes == []
        for _ in range(3):
            pool.run(work)
        assert len(pool.processes) == 1
    with Workers(0) as pool:
        assert np.array_equal(pool.run(work), result(work))
        assert pool.processes == []


def test_closing_frees_threads_that_wait_and_can_be_done_twice(tmp_path: Path):
    work = pixel_work(save(tmp_path / "a.png", scene(80, 60)))
    pool = Workers(1)
    process = stopped(pool, work)
    with ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(pool.run, work) for _ in range(4)]  # one waits for the process, three for that one
        assert settle(lambda: not pool.idle)
        pool.close()
        for future in futures:
            with pytest.raises(RuntimeError, match="closed"):
                future.result(10)
    assert process.returncode is not None
    assert pool.processes == []
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.run(work)


def test_the_number_of_workers_fits_work_and_machine():
    assert num_workers(MIN_ITEMS - 1, 1) == 0
    assert num_workers(0, 8) == 0
    assert num_workers(1000, 1) == min(16, usable_cpus())
    assert num_workers(1000, 10**6) == 1
    assert 1 <= usable_cpus() <= (os.cpu_count() or 1)
