"""Pixels and masks as threads decode them: the same arrays and errors whoever decodes, and what becomes of changes."""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import anima_train
from anima_train.core.budget import ByteBudget
from anima_train.data import decoding
from anima_train.data.buckets import Size
from anima_train.data.cache import Cache
from anima_train.data.decoding import decoded_bytes, mask, num_decoding_threads, pixels, usable_cpus
from anima_train.data.image_headers import BadImage, Unreadable
from anima_train.data.images import cover_and_crop, decode, decode_alpha, decode_mask, mask_to_latent
from anima_train.data.loader import read_ahead
from anima_train.data.samples import Picture, Sample, View
from anima_train.data.settings import DirectoryOptions

SMALL_MEMORY = """
import hashlib, resource, sys
from pathlib import Path
from anima_train.core.errors import DataError
sys.path.insert(0, sys.argv[1])
from test_decoding import view_of
from anima_train.data.decoding import pixels
large, small = view_of(Path(sys.argv[2])), view_of(Path(sys.argv[3]))
pixels(small)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 30 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    pixels(large)
except DataError as error:
    print(error)
print(pixels(small).shape)
"""


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


@dataclass(frozen=True)
class InMemory:
    """An image inside of another file."""

    content: bytes

    @property
    def stamp(self) -> tuple[int, int, int]:
        return len(self.content), 0, 0

    def read(self) -> bytes:
        return self.content


def view_of(
    path: Path, size: tuple[int, int] = (64, 48), mirrored: bool = False, in_memory: bool = False,
    mask_path: Path | None = None, alpha: bool = False, image_size: tuple[int, int] = (150, 90), **options: object,
) -> View:  # fmt: skip
    """A view of a file as it is now, or (`in_memory`) of its bytes."""
    source, mask_source = [
        InMemory(each.read_bytes()) if in_memory and each is not None else each for each in (path, mask_path)
    ]
    hashes = ["" if each is None or not each.exists() else sha256(each) for each in (path, mask_path)]
    picture = Picture(path, source, hashes[0], *image_size, mask=mask_source, mask_sha256=hashes[1], has_alpha=alpha)
    sample = Sample(
        path.name, picture, Size(*size), 64, 0, DirectoryOptions(alpha_as_mask=alpha, **options), Cache(path.parent)
    )
    return View(sample, mirrored)


def failure(view: View, run: Callable[[View], np.ndarray]) -> tuple[type, str]:
    """What is wrong with an image."""
    with pytest.raises(BadImage) as caught:
        run(view)
    return caught.type, str(caught.value)


CROPS = [
    {},
    {"size": (48, 64), "crop_position": [0.0, 0.3]},
    {"size": (32, 32), "crop_position": [1.0, 0.7], "mirrored": True},
]


# Results


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_pixels_are_the_decoded_crop(tmp_path: Path, suffix: str, crop: dict):
    path = save(tmp_path / f"a{suffix}", scene(150, 90))
    for in_memory in (False, True):
        view = view_of(path, in_memory=in_memory, **crop)
        found = pixels(view)
        assert found.dtype == np.uint8
        assert found.shape == (view.crop.height, view.crop.width, 3)
        assert np.array_equal(found, np.asarray(cover_and_crop(decode(path), view.crop)))
        assert found.flags.writeable  # torch warns about arrays that are not


@pytest.mark.parametrize("crop", CROPS)
def test_a_mask_is_of_its_file_of_the_opacity_or_their_product(tmp_path: Path, crop: dict):
    path = save(tmp_path / "mask.png", scene(75, 45, seed=1)[..., 0])
    alpha = scene(150, 90, seed=2)[..., :1]
    image = save(tmp_path / "image.png", np.concatenate([scene(150, 90), alpha], axis=-1))
    grey = np.asarray(decode_mask(path, (150, 90)), dtype=float)
    opacity = np.asarray(decode_alpha(image), dtype=float)
    for options, expected in (
        ({"mask_path": path}, grey),
        ({"alpha": True}, opacity),
        ({"mask_path": path, "alpha": True}, (grey * opacity / 255).round()),
        ({"mask_path": path, "alpha": True, "in_memory": True}, (grey * opacity / 255).round()),
    ):
        view = view_of(image, **options, **crop)
        found = mask(view)
        assert found.dtype == np.float32
        assert found.shape == (1, view.crop.height // 8, view.crop.width // 8)
        assert np.array_equal(found, mask_to_latent(Image.fromarray(expected.astype(np.uint8)), view.crop))
    assert 0.05 < found.mean() < 0.5  # neither all nor nothing: it is a product


def test_several_threads_decode_at_once_and_results_come_in_order(tmp_path: Path):
    paths = [save(tmp_path / f"{index}.png", scene(900 if index % 4 == 0 else 40, 50, index)) for index in range(16)]
    views = [view_of(path) for path in paths]
    threads = set()

    def decode_here(view: View) -> np.ndarray:
        threads.add(threading.get_ident())
        return pixels(view)

    found = list(read_ahead(views, decode_here, num_threads=4))
    assert len(threads) > 1
    assert threading.get_ident() not in threads
    assert all(np.array_equal(array, pixels(view)) for array, view in zip(found, views, strict=True))


@pytest.mark.parametrize("name", ["plain", "日本 é", "line\nbreak", os.fsdecode(b"not utf-8 \xff\xfe")])
def test_any_name_is_found(tmp_path: Path, name: str):
    path = save(tmp_path / "a.png", scene(80, 60))
    expected = pixels(view_of(path))
    assert np.array_equal(pixels(view_of(path.rename(tmp_path / name))), expected)


# Failures


def test_damage_and_absence_are_told_apart_and_a_masks_is_named_so(tmp_path: Path):
    good = save(tmp_path / "good.png", scene(80, 60))
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(save(tmp_path / "whole.jpg", scene(80, 60)).read_bytes()[:-300])
    text = tmp_path / os.fsdecode(b"\xff.png")
    text.write_text("<html>")
    for path in (cut, text):
        kind, reason = failure(view_of(path), pixels)
        assert kind is BadImage
        assert failure(view_of(good, mask_path=path), mask) == (BadImage, f"its mask {path.name}: {reason}")
        assert failure(view_of(good, mask_path=path, in_memory=True), mask) == (BadImage, f"its mask: {reason}")
    assert failure(view_of(tmp_path / "absent.png"), pixels)[0] is Unreadable
    kind, reason = failure(view_of(good, mask_path=tmp_path / "absent.png"), mask)
    assert kind is Unreadable
    assert reason.startswith("its mask absent.png: ")


def test_another_image_than_before_is_refused(tmp_path: Path):
    path, other = (save(tmp_path / name, scene(80, 60)) for name in ("a.png", "b.png"))
    before = view_of(path)
    masked = view_of(other, mask_path=path)
    transparent = view_of(path, mask_path=other, alpha=True)
    stored = view_of(path, in_memory=True)
    save(path, scene(80, 60, seed=1))
    object.__setattr__(stored.sample.picture.source, "content", path.read_bytes())
    for view, run in ((before, pixels), (masked, mask), (transparent, mask), (stored, pixels)):
        kind, reason = failure(view, run)
        assert kind is Unreadable
        assert reason.endswith("changed while the run was starting")


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")
def test_memory_that_runs_out_is_no_bad_image(tmp_path: Path):
    large = save(tmp_path / "large.png", np.zeros((4000, 4000, 3), np.uint8))  # 64 MB in Pillow
    small = save(tmp_path / "a.png", scene(80, 60))
    environment = {**os.environ, "PYTHONPATH": str(Path(anima_train.__file__).parents[1])}
    command = [sys.executable, "-c", SMALL_MEMORY, str(Path(__file__).parent), str(large), str(small)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["large.png: there is not enough memory to decode it", "(48, 64, 3)"]


def test_the_number_of_threads_fits_the_machine():
    assert num_decoding_threads(1) == min(16, max(2, usable_cpus()))
    assert num_decoding_threads(10**6) == 2
    assert 1 <= usable_cpus() <= (os.cpu_count() or 1)


def test_threads_wait_until_the_pictures_of_others_leave_room_for_theirs(tmp_path, monkeypatch):
    views = [view_of(save(tmp_path / f"{seed}.png", scene(150, 90, seed))) for seed in range(12)]
    budget = ByteBudget(3 * decoded_bytes(views[0]))
    held, load = [], decoding.load_picture

    def looking(content):
        held.append(budget.held)
        return load(content)

    monkeypatch.setattr(decoding, "DECODING", budget)
    monkeypatch.setattr(decoding, "load_picture", looking)
    expected = [pixels(view) for view in views]
    for found, wanted in zip(read_ahead(views, pixels, num_threads=8), expected, strict=True):
        assert np.array_equal(found, wanted)
    assert all(0 < num_bytes <= budget.num_bytes for num_bytes in held)
    assert decoded_bytes(views[0]) == 150 * 90 * 8
