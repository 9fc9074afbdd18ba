"""Image files decoded whole: to upright sRGB, scaled to cover, cropped; and their masks.

Whatever is wrong with a file ends as `BadImage` with a short reason: the caller skips the file and goes on.
"""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from anima_train.core.shapes import LATENT_PIXELS
from anima_train.data.colour import colour_and_alpha, composite, to_srgb
from anima_train.data.image_headers import (
    BadImage,
    decode_errors_as_bad_image,
    format_name,
    open_image,
    png_chunks,
    read_file,
    read_orientation,
)

TRANSPOSE_OF = {  # EXIF orientation -> the transpose that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)  # x, y, steps


@dataclass(frozen=True)
class Crop:
    """The way an image is prepared: scaled to cover width x height pixels, cropped to that, and mirrored if asked."""

    width: int
    height: int
    position: tuple[float, float] = (0.5, 0.5)  # (x, y) of what is kept: 0 left or top, 1 right or bottom
    mirrored: bool = False


def decode(file: Path | bytes) -> Image.Image:
    """Return the picture as it is meant to be seen: upright, RGB in sRGB, 8 bits, over white, the first frame.

    Raises:
        BadImage: as `probe`, and when the pixels are truncated or damaged; a file that stops is never loaded half.
            JPEG, WebP, AVIF and BMP carry no checksum, so wrong bytes inside a file of full length can go unnoticed.
    """
    picture = load_picture(file)
    return picture.copy() if isinstance(picture, ImageFile.ImageFile) else picture


def decode_mask(file: Path | bytes, image_size: tuple[int, int]) -> Image.Image:
    """Return the mask as 8-bit grey (mode L), upright, white = train, scaled to `image_size` (width, height).

    Colours count by their luma and no ICC profile is applied: the values are weights, not light. Transparent parts are
    not trained, so that white painted on a transparent layer means what it looks like.

    Raises:
        BadImage: as `decode`.
    """
    image, orientation = load(file)
    colour, alpha = colour_and_alpha(image)
    mask = apply_orientation(composite(colour.convert("RGB"), alpha, "black"), orientation).convert("L")
    return mask.resize(image_size, Image.Resampling.BILINEAR)


def decode_alpha(file: Path | bytes) -> Image.Image:
    """Return the image's opacity as a mask: 8-bit grey (mode L), upright, opaque = train; all white without alpha.

    Raises:
        BadImage: as `decode`.
    """
    image, orientation = load(file)
    _, alpha = colour_and_alpha(image)
    return apply_orientation(Image.new("L", image.size, "white") if alpha is None else alpha, orientation)


def cover_box(image_size: tuple[int, int], crop: Crop) -> tuple[float, float, float, float]:
    """Return the largest box (left, top, right, bottom) of the image with the crop's aspect ratio, at its position."""
    width, height = image_size
    box_width = min(width, height * crop.width / crop.height)
    box_height = min(height, width * crop.height / crop.width)
    left, top = (width - box_width) * crop.position[0], (height - box_height) * crop.position[1]
    # Rounding must not lead beyond the image, which Pillow refuses.
    return left, top, min(left + box_width, width), min(top + box_height, height)


def cover_and_crop(
    image: Image.Image, crop: Crop, resampling: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Scale to cover (antialiased) and crop, in one resampling, to exactly (width, height); then mirror."""
    cropped = image.resize((crop.width, crop.height), resampling, box=cover_box(image.size, crop))
    return cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.mirrored else cropped


def mask_to_latent(mask: Image.Image, crop: Crop) -> np.ndarray:
    """Return the mask of a crop at latent size: (1, height // 8, width // 8) float32 in [0, 1].

    The sides of the crop are multiples of 8. Bilinear, because Lanczos rings: it would give weight to pixels beside a
    hard edge.
    """
    cropped = np.asarray(cover_and_crop(mask, crop, Image.Resampling.BILINEAR), dtype=np.float32) / 255
    height, width = crop.height // LATENT_PIXELS, crop.width // LATENT_PIXELS
    return cropped.reshape(1, height, LATENT_PIXELS, width, LATENT_PIXELS).mean(axis=(2, 4))


def load_picture(file: Path | bytes) -> Image.Image:
    """Return the picture as `decode` does, but maybe as the image of the file itself, not a copy.

    Raises:
        BadImage: as `decode`.
    """
    image, orientation = load(file)
    colour, alpha = colour_and_alpha(image)
    picture = composite(to_srgb(colour, image.info.get("icc_profile")), alpha, "white")
    return apply_orientation(picture, orientation)


def load(file: Path | bytes) -> tuple[Image.Image, int]:
    """Return the decoded image as it is stored, and its EXIF orientation; JPEG at full size, never as a draft.

    Raises:
        BadImage: as `decode`.
    """
    content = file if isinstance(file, bytes) else read_file(file)
    image = open_image(content)
    if image.format == "PNG":
        check_png(content)
    if format_name(image) == "JPEG":
        check_jpeg(content)
    with decode_errors_as_bad_image():
        image.load()
    if image.format == "PNG" and may_lack_rows(image, content):
        check_png_rows(content)
    return image, read_orientation(image, content)


def check_png(content: bytes) -> None:
    """Raise BadImage if pixel data fails its checksum: Pillow stops at the last row and never looks at it."""
    view = memoryview(content)
    for kind, start, length in png_chunks(content):
        end = start + length
        if kind == b"IDAT" and zlib.crc32(view[start - 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise BadImage(f"truncated or damaged: the PNG chunk at byte {start - 8:,} fails its checksum")


def may_lack_rows(image: Image.Image, content: bytes) -> bool:
    """Return True if a decoded PNG is interlaced, or its last row is zeros, as rows are that its file does not hold."""
    last_row = image.crop((0, image.height - 1, image.width, image.height)).tobytes()
    return content[28] == 1 or not any(last_row)


def check_png_rows(content: bytes) -> None:
    """Raise BadImage if the pixel data ends before the last row: Pillow leaves the rest black and says nothing."""
    width, height, depth, colour, _, _, interlace = struct.unpack_from(">IIBBBBB", content, 16)
    passes = ADAM7 if interlace else ((0, 0, 1, 1),)
    sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes if width > x and height > y]
    bits = depth * PNG_CHANNELS[colour]
    expected = sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sizes)
    inflate, found = zlib.decompressobj(), 0
    for kind, start, length in png_chunks(content):
        data = content[start : start + length] if kind == b"IDAT" else b""
        while data and found < expected:  # no more than that, whatever the file unpacks to
            found += len(inflate.decompress(data, 2**20))
            data = inflate.unconsumed_tail
    if found < expected:
        raise BadImage(f"truncated: the PNG holds {found / expected:.0%} of the pixels that its header says")


def check_jpeg(content: bytes) -> None:
    """Raise BadImage if no end marker follows the start of the picture.

    Pillow notices a file that stops, but not one whose rest is zeros, as a broken download leaves it: that decodes to a
    picture whose lower part is grey.
    """
    position = 2
    while (position := content.find(b"\xff", position)) >= 0:
        marker = content[position + 1 : position + 2]
        if marker == b"\xda":  # start of scan
            break
        if marker in (b"", b"\x00", b"\x01", b"\xff"):  # no segment: junk, or a fill byte
            position += 1
        else:
            position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    if content.rfind(b"\xff\xd9", position) < 0:  # from the end, where it is
        raise BadImage("truncated: the JPEG has no end (EOI marker)")


def apply_orientation(picture: Image.Image, orientation: int) -> Image.Image:
    """Return the picture upright, its EXIF orientation undone, without metadata that no longer describes it."""
    if orientation in TRANSPOSE_OF:
        picture = picture.transpose(TRANSPOSE_OF[orientation])
    picture.info = {}
    return picture
