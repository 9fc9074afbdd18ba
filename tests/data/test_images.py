"""Image files, good and bad, really written; decoded pixels are compared with the array they came from."""

import contextlib
import io
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from anima_train.data.image_headers import (
    EXTENSIONS,
    FORMATS,
    MAX_BYTES,
    MAX_PIXELS,
    BadImage,
    ImageInfo,
    Unreadable,
    probe,
    read_file,
)
from anima_train.data.images import (
    TRANSPOSE_OF,
    Crop,
    check_png_rows,
    cover_and_crop,
    cover_box,
    decode,
    decode_alpha,
    decode_mask,
    mask_to_latent,
)

NOBODY = 65534  # a user who owns nothing
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def scene(width: int = 48, height: int = 32) -> np.ndarray:
    """A smooth picture with no symmetry, (height, width, 3) uint8: survives JPEG, and shows every turn and flip."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return np.stack([255 * x, 255 * y, 255 * x * y], axis=-1).round().astype(np.uint8)


def noise(width: int = 96, height: int = 64) -> Image.Image:
    """A picture that does not compress, so that every part of its file matters."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(path: Path, image: Image.Image | np.ndarray, **options: object) -> Path:
    """Write the image in the format of its suffix."""
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
    return path


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def probe_file(path: Path) -> ImageInfo:
    return probe(read_file(path), path.suffix)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def reason(call: Callable[[Path], object], path: Path) -> str:
    """The reason `call` gives for refusing the file."""
    with pytest.raises(BadImage) as caught:
        call(path)
    return str(caught.value)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, bits: int, colour_type: int, rows: bytes, *, before: bytes = b"", after: bytes = b""
) -> bytes:
    """A PNG written by hand: `rows` are the bytes of the rows, each led by its filter byte."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return PNG_SIGNATURE + chunk(b"IHDR", header) + before + pixels + after + chunk(b"IEND", b"")


def exif_with(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def icc_profile(space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ") -> bytes:
    """An ICC version 2 profile from its tags."""
    data = b""
    table = struct.pack(">I", len(tags))
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += struct.pack(">4sII", name, 128 + 4 + 12 * len(tags) + len(data), len(content))
        data += content
    illuminant = struct.pack(">3i", *(round(value * 65536) for value in D50))
    header = struct.pack(">I4x4s4s4s4s", 128 + len(table) + len(data), b"\x02\x20\0\0", b"prtr", space, connection)
    header += bytes(12) + b"acsp" + bytes(28) + illuminant
    return header.ljust(128, b"\0") + table + data


D50 = (0.9642, 1.0, 0.8249)
WHITE_POINT = b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in D50))


def swapped_red_and_green() -> bytes:
    """A profile like sRGB, in which the red channel is green light and the green channel red light."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"TEMP", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"TEMP", b"gXYZ", 1)


def cmyk_profile_with_orange_cyan() -> bytes:
    """A CMYK profile in which paper is white, cyan ink is L*a*b* (60, 40, 60), and what has black is black.

    That is its colorimetric table; its perceptual one has grey for cyan ink, to tell the two apart.
    """
    perceptual, colorimetric = cyan_lut(80, 0, 0), cyan_lut(60, 40, 60)
    return icc_profile(b"CMYK", {b"wtpt": WHITE_POINT, b"A2B0": perceptual, b"A2B1": colorimetric}, connection=b"Lab ")


def cyan_lut(*lab: int) -> bytes:
    """An ICC lut8 table from CMYK to L*a*b*, with 2 points to each ink."""
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536 * i for i in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    lut += bytes(range(256)) * 4
    for corner in range(16):  # C is the slowest index, K the fastest
        cyan, black = corner >> 3 & 1, corner & 1
        lightness, a, b = (0, 0, 0) if black else lab if cyan else (100, 0, 0)
        lut += bytes([round(lightness * 2.55), a + 128, b + 128])
    return lut + bytes(range(256)) * 3


def lab_to_srgb(lightness: float, a: float, b: float) -> np.ndarray:
    """CIE L*a*b* (D50) to 8-bit sRGB, after the CIE's and the sRGB standard's equations with Bradford adaptation."""
    f = np.array([(lightness + 16) / 116 + a / 500, (lightness + 16) / 116, (lightness + 16) / 116 - b / 200])
    xyz = np.array(D50) * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    to_linear = [[3.1339, -1.6169, -0.4906], [-0.9785, 1.9160, 0.0333], [0.0720, -0.2290, 1.4057]]
    linear = np.clip(np.array(to_linear) @ xyz, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


# Orientation


STORED = {  # EXIF orientation -> how a camera that writes it has stored the upright scene (TIFF 6.0, tag 274)
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".avif"])
def test_every_orientation_gives_the_same_upright_picture(tmp_path: Path, suffix: str, orientation: int) -> None:
    stored = np.ascontiguousarray(STORED[orientation](scene()))
    options = {".jpg": {"quality": 95, "subsampling": 0}, ".webp": {"lossless": True}, ".avif": {"quality": 95}}
    path = save(tmp_path / f"x{suffix}", stored, exif=exif_with(orientation), **options.get(suffix, {}))
    info = probe_file(path)
    assert (info.width, info.height, info.warnings) == (48, 32, ())
    assert np.abs(array(decode(path)) - scene()).mean() < 2


def test_orientation_after_the_pixels_of_a_png_is_applied(tmp_path: Path) -> None:
    rows = b"".join(b"\0" + row.tobytes() for row in np.rot90(scene(), 1))
    exif = chunk(b"eXIf", exif_with(6).tobytes().removeprefix(b"Exif\0\0"))
    path = write(tmp_path / "late.png", png(32, 48, 8, 2, rows, after=exif))
    assert (probe_file(path).width, probe_file(path).height) == (48, 32)
    assert np.array_equal(array(decode(path)), scene())


def test_orientation_in_imagemagicks_text_is_applied(tmp_path: Path) -> None:
    rows = b"".join(b"\0" + row.tobytes() for row in np.rot90(scene(), 1))
    exif = exif_with(6).tobytes()
    text = f"\nexif\n{len(exif):8}\n{exif.hex()}\n".encode()
    before = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))
    path = write(tmp_path / "magick.png", png(32, 48, 8, 2, rows, before=before))
    assert (probe_file(path).width, probe_file(path).height) == (48, 32)
    assert np.array_equal(array(decode(path)), scene())


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0",
        b"Exif\0\0nonsense nonsense",
        exif_with(9).tobytes(),
    ],
)
def test_damaged_exif_is_read_as_upright_and_without_a_python_warning(tmp_path: Path, exif: bytes) -> None:
    path = save(tmp_path / "x.jpg", scene(), exif=exif, quality=95)
    assert (probe_file(path).width, probe_file(path).height) == (48, 32)
    assert np.abs(array(decode(path)) - scene()).mean() < 3


def test_the_metadata_that_was_applied_is_gone(tmp_path: Path) -> None:
    path = save(tmp_path / "x.jpg", scene(), exif=exif_with(3), icc_profile=swapped_red_and_green())
    assert decode(path).info == {}


# Colour


def test_cmyk_without_a_profile_comes_back_as_the_colours_it_was_made_from(tmp_path: Path) -> None:
    path = save(tmp_path / "x.jpg", Image.fromarray(scene()).convert("CMYK"), quality=95, subsampling=0)
    picture = decode(path)
    assert picture.mode == "RGB"
    assert np.abs(array(picture) - scene()).mean() < 4


def test_cmyk_is_converted_by_its_profile(tmp_path: Path) -> None:
    inks = np.zeros((16, 48, 4), np.uint8)  # paper, cyan, black
    inks[:, 16:32, 0] = 255
    inks[:, 32:, 3] = 255
    image = Image.frombytes("CMYK", (48, 16), inks.tobytes())
    path = save(tmp_path / "x.jpg", image, quality=95, subsampling=0, icc_profile=cmyk_profile_with_orange_cyan())
    picture = array(decode(path))
    assert probe_file(path).warnings == ()
    assert np.abs(picture[8, 8] - 255).max() <= 2
    assert np.abs(picture[8, 24] - lab_to_srgb(60, 40, 60)).max() <= 4
    assert np.abs(picture[8, 40] - 0).max() <= 4


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_rgb_is_converted_by_its_profile(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(scene()).convert(mode)
    path = save(tmp_path / "x.png", image, icc_profile=swapped_red_and_green())
    expected = array(image.convert("RGB"))[..., [1, 0, 2]]
    assert np.abs(array(decode(path)) - expected).max() <= 1


def test_an_srgb_profile_changes_nothing(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = save(tmp_path / "x.png", noise(), icc_profile=profile)
    assert np.abs(array(decode(path)) - array(noise())).max() <= 1


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_linear_grey_is_converted_by_its_profile(tmp_path: Path, mode: str) -> None:
    linear = icc_profile(b"GRAY", {b"wtpt": WHITE_POINT, b"kTRC": b"curv\0\0\0\0\0\0\0\0"})
    image = Image.new(mode, (4, 4), {"L": 55, "LA": (55, 255), "I;16": 55 * 257}[mode])
    path = save(tmp_path / "x.png", image, icc_profile=linear)
    assert probe_file(path).warnings == ()
    expected = 255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055)  # the sRGB curve
    assert np.abs(array(decode(path)) - expected).max() <= 1


@pytest.mark.parametrize(
    ("mode", "profile"),
    [
        ("RGB", b"not a profile"),
        ("RGB", swapped_red_and_green()[:300]),
        ("RGB", cmyk_profile_with_orange_cyan()),
        ("L", cmyk_profile_with_orange_cyan()),
    ],
    ids=["nonsense", "truncated", "for CMYK", "for CMYK, on grey"],
)
def test_an_unusable_profile_is_ignored_and_said(tmp_path: Path, mode: str, profile: bytes) -> None:
    image = Image.fromarray(scene()).convert(mode)
    path = save(tmp_path / "x.png", image, icc_profile=profile)
    assert probe_file(path).warnings == ("its ICC colour profile cannot be used; the colours are read as sRGB",)
    assert np.array_equal(array(decode(path)), array(image.convert("RGB")))


def test_grey_under_an_rgb_profile_stays_grey(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", Image.fromarray(scene()).convert("L"), icc_profile=swapped_red_and_green())
    assert probe_file(path).warnings == ()
    assert np.abs(array(decode(path)) - array(Image.fromarray(scene()).convert("L"))[..., None]).max() <= 1


def test_16_bit_grey_is_scaled(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65278, 65535]], np.uint16)
    path = save(tmp_path / "x.png", values)
    assert array(decode(path))[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255]


def test_one_transparent_value_of_16_bit_grey_shows_white(tmp_path: Path) -> None:
    rows = b"\0" + struct.pack(">3H", 1000, 1001, 65535)
    path = write(tmp_path / "x.png", png(3, 1, 16, 0, rows, before=chunk(b"tRNS", struct.pack(">H", 1000))))
    assert array(decode(path))[0, :, 0].tolist() == [255, 4, 255]


def test_16_bit_colour_is_scaled(tmp_path: Path) -> None:
    rows = b"\0" + struct.pack(">9H", 0, 32768, 65535, 65535, 0, 32768, 257, 514, 51400)
    path = write(tmp_path / "x.png", png(3, 1, 16, 2, rows))
    assert array(decode(path))[0].tolist() == [[0, 128, 255], [255, 0, 128], [1, 2, 200]]


def test_16_bit_colour_with_alpha_lies_over_white(tmp_path: Path) -> None:
    rows = b"\0" + struct.pack(">8H", 65535, 0, 0, 65535, 65535, 0, 0, 0)
    path = write(tmp_path / "x.png", png(2, 1, 16, 6, rows))
    assert array(decode(path))[0].tolist() == [[255, 0, 0], [255, 255, 255]]


def test_alpha_lies_over_white(tmp_path: Path) -> None:
    pixels = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]], np.uint8)
    for suffix, options in ((".png", {}), (".webp", {"lossless": True, "exact": True})):
        path = save(tmp_path / f"x{suffix}", pixels, **options)
        expected = [[200, 100, 0], [255, 255, 255], [244, 224, 204]]  # 0.2 * colour + 0.8 * 255
        assert np.abs(array(decode(path))[0] - expected).max() <= 1


def test_grey_with_alpha_lies_over_white(tmp_path: Path) -> None:
    pixels = np.array([[[100, 255], [100, 0], [100, 51]]], np.uint8)
    path = save(tmp_path / "x.png", Image.fromarray(pixels))
    assert np.abs(array(decode(path))[0] - np.array([[100], [255], [224]])).max() <= 1


@pytest.mark.parametrize(
    ("transparency", "expected"),
    [
        (1, [[10, 20, 30], [255, 255, 255], [70, 80, 90]]),
        (b"\xff\x00\x33", [[10, 20, 30], [255, 255, 255], [218, 220, 222]]),
    ],
    ids=["one entry", "alpha per entry"],
)
def test_transparent_palette_lies_over_white(
    tmp_path: Path, transparency: int | bytes, expected: list[list[int]]
) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    path = save(tmp_path / "x.png", image, transparency=transparency)
    assert np.abs(array(decode(path))[0] - expected).max() <= 1


@pytest.mark.parametrize(
    ("mode", "pixel", "transparency"), [("L", 7, 7), ("RGB", (1, 2, 3), (1, 2, 3)), ("1", 0, 0)], ids=["L", "RGB", "1"]
)
def test_one_transparent_colour_shows_white(tmp_path: Path, mode: str, pixel: int, transparency: int) -> None:
    image = Image.new(mode, (2, 1), pixel)
    image.putpixel((1, 0), 255 if mode != "RGB" else (9, 9, 9))
    path = save(tmp_path / "x.png", image, transparency=transparency)
    assert array(decode(path))[0].tolist() == [[255] * 3, [255] * 3 if mode != "RGB" else [9] * 3]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
@pytest.mark.parametrize("suffix", [".png", ".bmp"])
def test_modes_without_alpha_keep_their_colours(tmp_path: Path, suffix: str, mode: str) -> None:
    image = Image.fromarray(scene()).convert(mode)
    picture = decode(save(tmp_path / f"x{suffix}", image))
    assert picture.mode == "RGB"
    assert type(picture) is Image.Image
    assert np.array_equal(array(picture), array(image.convert("RGB")))


# What the header says


@pytest.mark.parametrize("suffix", sorted(EXTENSIONS))
def test_header_tells_size_and_format(tmp_path: Path, suffix: str) -> None:
    info = probe_file(save(tmp_path / f"x{suffix.upper()}", scene()))
    assert (info.width, info.height, info.warnings) == (48, 32, ())  # one would say that it holds another format


def test_wrong_suffix_is_read_by_content_and_said(tmp_path: Path) -> None:
    path = save(tmp_path / "x.jpg", scene(), quality=95).rename(tmp_path / "x.png")
    assert probe_file(path).warnings == ("named .png but holds JPEG",)
    assert np.abs(array(decode(path)) - scene()).mean() < 3


@pytest.mark.parametrize("suffix", [".png", ".webp", ".avif"])
def test_animation_gives_its_first_frame_and_a_warning(tmp_path: Path, suffix: str) -> None:
    frames = [Image.fromarray(255 - scene()), Image.new("RGB", (48, 32), "red")]
    lossless = {"lossless": True} if suffix == ".webp" else {}
    path = save(tmp_path / f"x{suffix}", scene(), save_all=True, append_images=frames, duration=100, **lossless)
    assert probe_file(path).warnings == ("animated: the first of 3 frames is used",)
    assert np.abs(array(decode(path)) - scene()).mean() < 4


def test_phone_jpeg_with_a_second_picture_is_a_plain_jpeg(tmp_path: Path) -> None:
    path = save(tmp_path / "x.mpo", scene(), save_all=True, append_images=[noise(48, 32)], quality=95)
    path = path.rename(tmp_path / "x.jpg")
    with Image.open(path) as image:
        assert image.format == "MPO"
    assert probe_file(path).warnings == ()
    assert np.abs(array(decode(path)) - scene()).mean() < 3


def test_probe_decodes_no_pixels(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", np.zeros((4000, 4000, 3), np.uint8))
    tracemalloc.start()
    probe_file(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
    damaged = bytearray(path.read_bytes())
    damaged[100:200] = bytes(100)  # inside the pixels: the header is still right
    assert probe_file(write(path, bytes(damaged))).width == 4000


@pytest.mark.parametrize("name", ["画像 ñ é 🖼.png", "with  spaces and 'quotes'.png", "n" * 236 + ".png"])
def test_names_of_every_kind_work(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, scene())
    assert probe_file(path).width == 48
    assert np.array_equal(array(decode(path)), scene())


# Files that are not whole


ENCODINGS: list[tuple[str, dict[str, object]]] = [
    (".jpg", {"quality": 90}),
    (".jpg", {"quality": 90, "progressive": True}),
    (".png", {}),
    (".webp", {}),
    (".webp", {"lossless": True}),
    (".avif", {}),
    (".bmp", {}),
]


@pytest.mark.parametrize(("suffix", "options"), ENCODINGS)
def test_truncated_file_is_never_loaded(tmp_path: Path, suffix: str, options: dict[str, object]) -> None:
    path = save(tmp_path / f"x{suffix}", noise(), **options)
    whole = path.read_bytes()
    decode(path)
    for kept in [*(len(whole) * percent // 100 for percent in range(5, 100, 10)), *range(len(whole) - 24, len(whole))]:
        assert "truncated" in reason(decode, write(path, whole[:kept])), kept


def test_truncated_png_shows_in_the_header(tmp_path: Path) -> None:
    whole = save(tmp_path / "x.png", noise()).read_bytes()
    for kept in (len(whole) // 2, len(whole) - 20, len(whole) - 12, len(whole) - 1):
        assert reason(probe_file, write(tmp_path / "x.png", whole[:kept])).startswith("truncated")


def test_png_whose_second_half_is_zeros_shows_in_the_header(tmp_path: Path) -> None:
    content = png(1, 1, 8, 2, bytes(4)).removesuffix(chunk(b"IEND", b""))
    path = write(tmp_path / "x.png", content + bytes(5000))
    assert reason(probe_file, path) == f"truncated or damaged: no PNG chunk at byte {len(content)}"


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_file_whose_rest_is_zeros_is_never_loaded(tmp_path: Path, suffix: str, kept: float) -> None:
    path = save(tmp_path / f"x{suffix}", noise())
    whole = path.read_bytes()
    cut = int(len(whole) * kept)
    assert "truncated" in reason(decode, write(path, whole[:cut] + bytes(len(whole) - cut)))


def test_end_of_the_thumbnail_is_not_the_end_of_the_jpeg(tmp_path: Path) -> None:
    thumbnail = io.BytesIO()
    noise(16, 16).save(thumbnail, "JPEG")
    exif = exif_with(1).tobytes() + thumbnail.getvalue()
    path = save(tmp_path / "x.jpg", noise(), exif=exif, quality=90)
    decode(path)
    whole = path.read_bytes()
    cut = int(len(whole) * 0.8)
    assert "truncated" in reason(decode, write(path, whole[:cut] + bytes(len(whole) - cut)))


def test_fill_bytes_before_a_marker_of_a_jpeg_are_allowed(tmp_path: Path) -> None:
    path = save(tmp_path / "x.jpg", noise())
    expected = array(decode(path))
    path.write_bytes(path.read_bytes().replace(b"\xff\xdb", b"\xff\xff\xff\xdb", 1))
    assert np.array_equal(array(decode(path)), expected)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_what_follows_the_end_does_no_harm(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"x{suffix}", noise())
    expected = array(decode(path))
    path.write_bytes(path.read_bytes() + b"motion photo" + bytes(500))
    assert probe_file(path).warnings == ()
    assert np.array_equal(array(decode(path)), expected)


def test_png_pixels_that_fail_their_checksum_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", noise())
    whole = bytearray(path.read_bytes())
    start = whole.index(b"IDAT")
    middle = start + len(whole) // 2
    whole[middle : middle + 400] = bytes(400)  # Pillow decodes this into other pixels without a word
    assert (
        reason(decode, write(path, bytes(whole)))
        == f"truncated or damaged: the PNG chunk at byte {start - 4:,} fails its checksum"
    )


@pytest.mark.parametrize(("suffix", "options"), ENCODINGS)
def test_damaged_bytes_give_a_picture_or_a_reason(tmp_path: Path, suffix: str, options: dict[str, object]) -> None:
    path = save(tmp_path / f"x{suffix}", noise(24, 16), **options)
    whole = path.read_bytes()
    random = np.random.default_rng(1)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for position in random.integers(0, len(whole), 4):
            damaged[position] = random.integers(0, 256)
        write(path, bytes(damaged))
        for read in (probe_file, decode):
            try:
                read(path)
            except BadImage:
                refused += 1
    assert refused > 0


def test_animation_without_a_clock_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.avif", scene(), save_all=True, append_images=[noise(48, 32)])
    whole = bytearray(path.read_bytes())
    start = whole.index(b"mdhd") + 4 + 4 + 16  # after the name, the version (1) and two 8-byte times
    whole[start : start + 4] = bytes(4)  # ticks per second: Pillow divides by it
    assert reason(decode, write(path, bytes(whole))).startswith("truncated or damaged")


# Files that are not images


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "zero bytes"),
        (b"a photo of a cat", "not an image (text)"),
        ("ネコの写真".encode() * 100, "not an image (text)"),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", "not an image (HTML)"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "not an image (a git-lfs pointer: run `git lfs pull`)",
        ),
        (bytes(range(256)), "not an image"),
        (PNG_SIGNATURE, "truncated or damaged: it begins as PNG, but its header cannot be read"),
        (b"\xff\xd8\xff", "truncated or damaged: it begins as JPEG, but its header cannot be read"),
    ],
    ids=[
        "empty",
        "text",
        "text cut inside a character",
        "HTML",
        "git-lfs",
        "binary",
        "PNG signature",
        "JPEG signature",
    ],
)
@pytest.mark.parametrize("read", [probe_file, decode])
def test_what_is_not_an_image_is_named(
    tmp_path: Path, read: Callable[[Path], object], content: bytes, expected: str
) -> None:
    assert reason(read, write(tmp_path / "x.png", content)) == expected


@pytest.mark.parametrize(("format_name", "tolerance"), [("GIF", 40), ("TIFF", 0)])  # a GIF has 256 colours
def test_of_formats_with_several_pictures_the_first_is_read(tmp_path: Path, format_name: str, tolerance: int) -> None:
    path = tmp_path / f"x.{format_name.lower()}"
    Image.fromarray(scene()).save(path, format_name, save_all=True, append_images=[Image.fromarray(255 - scene())])
    found = np.asarray(decode(path)).astype(int)
    assert np.abs(found - scene()).max() <= tolerance
    assert probe_file(path).warnings == ("animated: the first of 2 frames is used",)


def png_of_rows(rows: int, value: int, interlace: int = 0) -> bytes:
    """A PNG of 20 x 24 pixels that holds this many rows, each of one value."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress((b"\0" + bytes([value]) * 60) * rows)
    header = struct.pack(">IIBBBBB", 20, 24, 8, 2, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("rows", [1, 12, 23])
def test_a_png_with_fewer_rows_than_its_header_says_is_never_loaded(tmp_path: Path, rows: int) -> None:
    message = f"truncated: the PNG holds {rows / 24:.0%} of the pixels that its header says"
    assert reason(decode, write(tmp_path / "x.png", png_of_rows(rows, 200))) == message


def test_a_png_that_is_black_at_the_end_is_whole(tmp_path: Path) -> None:
    assert not np.asarray(decode(write(tmp_path / "x.png", png_of_rows(24, 0)))).any()


@pytest.mark.parametrize("size", [(16, 16), (13, 7), (1, 1), (3, 20)])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_rows_are_counted_for_every_kind_of_png(size: tuple[int, int], mode: str) -> None:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    check_png_rows(file.getvalue())


def test_an_interlaced_png_without_its_last_pass_is_never_loaded(tmp_path: Path) -> None:
    whole = png_of_rows(24, 200, interlace=1)  # as many bytes as 24 rows, but the passes need some more for filters
    with pytest.raises(BadImage, match=r"the PNG holds 9\d% of the pixels"):
        check_png_rows(whole)
    check_png_rows(png_of_rows(26, 200, interlace=1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate"])
def test_a_tiff_is_upright(tmp_path: Path, orientation: int, compression: str | None) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "x.tif"
    stored = Image.fromarray(scene())
    stored.save(path, "TIFF", compression=compression, exif=exif)
    upright = stored if orientation == 1 else stored.transpose(TRANSPOSE_OF[orientation])
    assert np.array_equal(np.asarray(decode(path)), np.asarray(upright))
    assert (probe_file(path).width, probe_file(path).height) == upright.size


def test_a_tiff_without_agreed_colours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tiff"
    Image.new("F", (16, 16), 0.5).save(path)
    assert reason(decode, path) == "a TIFF of mode F is not supported; convert it to PNG, JPEG or WebP"


FITS = b"".join(
    card.ljust(80) for card in (b"SIMPLE  =                    T", b"BITPIX  =                    8",
    b"NAXIS   =                    2", b"NAXIS1  =                    2", b"NAXIS2  =                    2", b"END")
).ljust(2880) + bytes(4)  # fmt: skip
PSD = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 2, 2, 8, 3) + bytes(12) + bytes(2 + 12)


def disguised() -> Iterator[tuple[str, bytes]]:
    """What Pillow would open as another format, whatever the file is called."""
    Image.init()
    for name in sorted(Image.SAVE.keys() - {*FORMATS, "MPO"}):
        for picture in (Image.fromarray(scene()), Image.new("L", (16, 16)), Image.new("1", (16, 16))):
            file = io.BytesIO()
            with contextlib.suppress(OSError, ValueError, KeyError):
                picture.save(file, name)
                Image.open(io.BytesIO(file.getvalue()))
                yield name, file.getvalue()
                break
    yield "FITS", FITS
    yield "PSD", PSD


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of formats that Pillow will drop
def test_no_other_format_reaches_its_decoder(tmp_path: Path) -> None:
    """Some of them run other programs (EPS), read other files, or have decoders that few look at."""
    found = dict(disguised())
    assert found.keys() >= {"EPS", "FITS", "ICO", "PCX", "PPM", "PSD", "SGI", "TGA"}
    for name, content in found.items():
        assert Image.open(io.BytesIO(content)).format == name
        path = write(tmp_path / "x.png", content)
        for read in (probe_file, decode, decode_alpha, lambda file: decode_mask(file, (16, 16))):
            assert re.match("not an image|.* is not supported", reason(read, path)), name
        with pytest.raises(BadImage):
            decode(content)


def test_fifo_is_refused_without_blocking(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    os.mkfifo(path)
    reasons: list[str] = []
    thread = threading.Thread(
        target=lambda: reasons.extend(reason(read, path) for read in (probe_file, decode)), daemon=True
    )
    thread.start()
    thread.join(timeout=5)
    assert reasons == ["a FIFO, not a file"] * 2


def test_socket_device_and_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("x.png")
        assert reason(decode, Path("x.png")) == "a socket, not a file"
    (tmp_path / "folder.png").mkdir()
    assert reason(probe_file, tmp_path / "folder.png") == "a folder, not a file"
    assert reason(probe_file, Path(os.devnull)) == "a device, not a file"


def test_symbolic_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "missing.png")
    (tmp_path / "link.png").symlink_to(save(tmp_path / "real.png", scene()))
    assert reason(probe_file, tmp_path / "a.png") == "a symbolic link that leads back to itself"
    assert reason(probe_file, tmp_path / "nowhere.png") == "not there: deleted, or a symbolic link to nothing"
    assert probe_file(tmp_path / "link.png").width == 48


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "x.png", scene()).chmod(0)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # the folders above are open to their owner alone
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)  # root may read everything
    try:
        assert reason(probe_file, Path("x.png")) == "not readable (permission denied)"
    finally:
        os.seteuid(user)


def test_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    assert reason(probe_file, tmp_path / ("n" * 300 + ".png")) == "not readable (File name too long)"


# Bombs


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        (60_000, f"its header claims more than the limit of {MAX_PIXELS:,} pixels"),
        (12_000, f"12000 x 12000 pixels is more than the limit of {MAX_PIXELS:,}"),
    ],
)
@pytest.mark.parametrize("read", [probe_file, decode])
def test_bomb_is_refused_from_its_header(
    tmp_path: Path, read: Callable[[Path], object], side: int, expected: str
) -> None:
    path = write(tmp_path / "bomb.png", png(side, side, 8, 2, bytes(1000)))
    tracemalloc.start()
    assert reason(read, path) == expected
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_bomb_costs_the_process_no_memory(tmp_path: Path) -> None:
    """Pillow's own memory is not Python's: so a process of its own is asked for its peak."""
    path = write(tmp_path / "bomb.png", png(11_500, 11_700, 8, 2, bytes(1000)))
    script = (
        "import sys; from pathlib import Path\n"
        "from anima_train.data.image_headers import BadImage, probe, read_file\n"
        "from anima_train.data.images import decode\n"
        "def peak(): return int(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]) // 1024\n"
        "before = peak()\n"
        "for read in (lambda path: probe(read_file(path), path.suffix), decode):\n"
        "    try: read(Path(sys.argv[1]))\n"
        "    except BadImage: continue\n"
        "    raise SystemExit('not refused')\n"
        "print(peak() - before)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert int(result.stdout) < 20  # MiB; its pixels would be 385


def test_a_large_picture_below_the_limit_is_no_bomb_and_no_python_warning(tmp_path: Path) -> None:
    path = write(tmp_path / "large.png", png(11_000, 11_000, 8, 2, bytes(1000)))  # where Pillow itself warns
    assert MAX_PIXELS > 11_000**2
    assert probe_file(path).width == 11_000


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_compressed_metadata_bomb_is_refused(tmp_path: Path, kind: bytes) -> None:
    huge = chunk(kind, b"name\0\0" + zlib.compress(bytes(50_000_000)))
    path = write(tmp_path / "x.png", png(1, 1, 8, 2, bytes(4), before=huge))
    assert "Decompressed data too large" in reason(probe_file, path)


def test_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = write(tmp_path / "x.webp", b"RIFF")
    os.truncate(path, MAX_BYTES + 1)  # sparse: takes no room
    assert reason(decode, path) == f"{MAX_BYTES + 1:,} bytes is more than the limit of {MAX_BYTES:,}"


def test_the_warning_filters_are_left_as_they_were(tmp_path: Path) -> None:
    path = save(tmp_path / "x.jpg", scene(), exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0")
    before = list(warnings.filters)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=lambda: [decode(path) for _ in range(30)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert list(warnings.filters) == before


# Scale and crop


@pytest.mark.parametrize(
    ("image_size", "target", "expected"),
    [
        ((100, 100), (64, 64), (0, 0, 100, 100)),
        ((200, 100), (64, 64), (50, 0, 150, 100)),
        ((100, 200), (64, 64), (0, 50, 100, 150)),
        ((100, 100), (128, 64), (0, 25, 100, 75)),
        ((99, 100), (32, 64), (24.5, 0, 74.5, 100)),
    ],
)
def test_cover_box_of_simple_sizes(
    image_size: tuple[int, int], target: tuple[int, int], expected: tuple[float, ...]
) -> None:
    assert cover_box(image_size, Crop(*target)) == expected


def test_cover_box_is_centred_inside_and_has_the_targets_shape() -> None:
    random = np.random.default_rng(0)
    for _ in range(2000):
        image_width, image_height, width, height = (int(side) for side in random.integers(1, 20_000, 4))
        left, top, right, bottom = cover_box((image_width, image_height), Crop(width, height))
        assert 0 <= left < right <= image_width
        assert 0 <= top < bottom <= image_height
        assert left + right == pytest.approx(image_width)
        assert top + bottom == pytest.approx(image_height)
        assert (right - left) * height == pytest.approx((bottom - top) * width)
        assert min(left, top) == 0


@pytest.mark.parametrize("size", [(1, 1), (3, 1000), (1000, 3), (333, 77), (64, 48)])
@pytest.mark.parametrize("target", [(64, 48), (16, 128), (65, 47)])
def test_result_has_exactly_the_size_asked_for(size: tuple[int, int], target: tuple[int, int]) -> None:
    assert cover_and_crop(Image.new("RGB", size), Crop(*target)).size == target


@pytest.mark.parametrize(("size", "target"), [((400, 100), (50, 50)), ((100, 400), (50, 50)), ((60, 20), (48, 48))])
def test_crop_keeps_the_centre(size: tuple[int, int], target: tuple[int, int]) -> None:
    """On a ramp, away from the border, a resampled pixel is the ramp at its place in the box."""
    x, y = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    ramp = np.stack([255 * x / size[0], 255 * y / size[1], 0 * x], axis=-1).round().astype(np.uint8)
    left, top, right, bottom = cover_box(size, Crop(*target))
    columns = left + (np.arange(target[0]) + 0.5) * (right - left) / target[0]
    rows = top + (np.arange(target[1]) + 0.5) * (bottom - top) / target[1]
    result = array(cover_and_crop(Image.fromarray(ramp), Crop(*target)))[5:-5, 5:-5]
    assert np.abs(result[..., 0] - 255 * columns[None, 5:-5] / size[0]).max() <= 2
    assert np.abs(result[..., 1] - 255 * rows[5:-5, None] / size[1]).max() <= 2


@pytest.mark.parametrize(
    ("image_size", "position", "expected"),
    [
        ((200, 100), (0.0, 0.0), (0, 0, 100, 100)),
        ((200, 100), (1.0, 0.0), (100, 0, 200, 100)),
        ((200, 100), (0.25, 1.0), (25, 0, 125, 100)),
        ((100, 200), (0.5, 0.0), (0, 0, 100, 100)),
        ((100, 200), (0.0, 1.0), (0, 100, 100, 200)),
    ],
)
def test_cover_box_lies_at_its_position(
    image_size: tuple[int, int], position: tuple[float, float], expected: tuple[float, ...]
) -> None:
    assert cover_box(image_size, Crop(64, 64, position)) == expected


def test_every_position_stays_inside_the_image() -> None:
    random = np.random.default_rng(1)
    for _ in range(300):
        width, height, *target = (int(side) for side in random.integers(1, 400, 4))
        position = (float(random.random()), float(random.random()))
        image = Image.new("L", (width, height))
        for at in (position, (1.0, 1.0)):
            assert cover_and_crop(image, Crop(target[0], target[1], at)).size == tuple(target)


def test_a_mirrored_crop_is_the_crop_mirrored() -> None:
    image, mask = Image.fromarray(scene()), Image.fromarray(scene()[..., 0])
    for position in ((0.0, 0.0), (1.0, 0.3)):
        plain, mirrored = Crop(16, 16, position), Crop(16, 16, position, mirrored=True)
        assert np.array_equal(array(cover_and_crop(image, mirrored)), array(cover_and_crop(image, plain))[:, ::-1])
        assert np.array_equal(mask_to_latent(mask, mirrored), mask_to_latent(mask, plain)[..., ::-1])


def test_same_size_is_left_alone() -> None:
    assert np.array_equal(array(cover_and_crop(Image.fromarray(scene()), Crop(48, 32))), scene())


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((64, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    result = array(cover_and_crop(Image.fromarray(stripes), Crop(64, 8)))
    assert np.abs(result[:, 4:-4] - 127.5).max() < 4


# Masks


def test_mask_is_grey_upright_and_of_its_images_size(tmp_path: Path) -> None:
    grey = scene()[..., 0]
    path = save(tmp_path / "m.png", np.ascontiguousarray(np.rot90(grey, 1)), exif=exif_with(6))
    mask = decode_mask(path, (48, 32))
    assert (mask.mode, mask.size) == ("L", (48, 32))
    assert np.array_equal(array(mask), grey)
    assert decode_mask(path, (96, 64)).size == (96, 64)
    assert np.abs(array(decode_mask(path, (24, 16))) - grey.reshape(16, 2, 24, 2).mean((1, 3))).max() <= 2


def test_mask_of_other_modes_means_the_same(tmp_path: Path) -> None:
    half = np.zeros((8, 16), np.uint8)
    half[:, 8:] = 255
    grey = Image.fromarray(half)
    for mode in ("1", "L", "P", "RGB", "LA", "RGBA"):
        assert np.array_equal(array(decode_mask(save(tmp_path / "m.png", grey.convert(mode)), (16, 8))), half), mode
    deep = save(tmp_path / "m.png", half.astype(np.uint16) * 257)
    assert np.array_equal(array(decode_mask(deep, (16, 8))), half)
    inks = save(tmp_path / "m.jpg", grey.convert("RGB").convert("CMYK"), quality=95)
    assert np.abs(array(decode_mask(inks, (16, 8))) - half).max() <= 3


def test_transparent_part_of_a_mask_is_not_trained(tmp_path: Path) -> None:
    layer = np.full((1, 2, 4), 255, np.uint8)
    layer[0, 0, 3] = 0
    assert array(decode_mask(save(tmp_path / "m.png", layer), (2, 1))).tolist() == [[0, 255]]


def test_mask_values_are_not_colour_managed(tmp_path: Path) -> None:
    linear = icc_profile(b"GRAY", {b"wtpt": WHITE_POINT, b"kTRC": b"curv\0\0\0\0\0\0\0\0"})
    path = save(tmp_path / "m.png", Image.new("L", (4, 4), 55), icc_profile=linear)
    assert (array(decode_mask(path, (4, 4))) == 55).all()


def test_alpha_as_a_mask_is_upright_opacity(tmp_path: Path) -> None:
    opacity = scene()[..., 0]
    picture = np.dstack([scene(), opacity])
    turned = save(tmp_path / "i.png", np.ascontiguousarray(np.rot90(picture, 1)), exif=exif_with(6))
    assert (decode_alpha(turned).mode, probe_file(turned).has_alpha) == ("L", True)
    assert np.array_equal(array(decode_alpha(turned)), opacity)
    opaque = save(tmp_path / "o.png", scene())
    assert not probe_file(opaque).has_alpha
    assert (array(decode_alpha(opaque)) == 255).all()


def test_bytes_are_decoded_as_their_file_is(tmp_path: Path) -> None:
    path = save(tmp_path / "i.png", scene())
    assert np.array_equal(array(decode(read_file(path))), array(decode(path)))
    assert reason(decode, b"") == "zero bytes"


def test_what_a_later_try_may_read_is_told_apart_from_damage(tmp_path: Path) -> None:
    with pytest.raises(Unreadable):
        probe_file(tmp_path / "nowhere.png")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(BadImage) as error:
        probe_file(tmp_path / "empty.png")
    assert not isinstance(error.value, Unreadable)


def test_damaged_mask_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", noise())
    path.write_bytes(path.read_bytes()[:-30])
    assert "truncated" in reason(lambda path: decode_mask(path, (96, 64)), path)


def test_latent_mask_is_the_mean_of_each_8_by_8_square() -> None:
    values = np.random.default_rng(0).integers(0, 256, (32, 48), dtype=np.uint8)
    latent = mask_to_latent(Image.fromarray(values), Crop(48, 32))
    assert (latent.shape, latent.dtype) == ((1, 4, 6), np.float32)
    for row in range(4):
        for column in range(6):
            square = values[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert latent[0, row, column] == pytest.approx(square.mean() / 255, abs=1e-6)


def test_latent_mask_lies_where_the_image_is_cropped() -> None:
    """An edge in the middle of a wide picture stays there, and gives no weight to what lies beside it."""
    mask = np.zeros((128, 512), np.uint8)
    mask[:, 259:] = 255  # at 33.5 of the 64 pixels, inside the fifth of the 8 latent columns
    latent = mask_to_latent(Image.fromarray(mask), Crop(64, 64))
    assert latent[0, :, :4].max() == 0
    assert latent[0, :, 5:].min() == 1
    picture = array(cover_and_crop(Image.fromarray(mask).convert("RGB"), Crop(64, 64)))[..., 0]
    assert np.abs(latent[0] - picture.reshape(8, 8, 8, 8).mean((1, 3)) / 255).max() < 0.02
    assert np.all(mask_to_latent(Image.new("L", (100, 30), 255), Crop(64, 64)) == 1)
    assert np.all(mask_to_latent(Image.new("L", (100, 30), 0), Crop(64, 64)) == 0)
