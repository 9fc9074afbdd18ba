"""Image files: read the header, decode to upright sRGB, scale to cover, crop.

Whatever is wrong with a file ends as `BadImage` with a short reason: the caller sets the file aside and goes on.
"""

import codecs
import contextlib
import errno
import io
import os
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError

from anima_train.core.shapes import LATENT_PIXELS

MAX_PIXELS = 128 * 2**20  # a header that claims more is treated as a decompression bomb and never decoded
MAX_BYTES = 2**30  # WebP and AVIF are read whole even for their header; no picture of MAX_PIXELS is larger than this

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP")
FORMAT_OF_SUFFIX = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".avif": "AVIF",
    ".bmp": "BMP",
}
EXTENSIONS = frozenset(FORMAT_OF_SUFFIX)  # lower-case suffixes that count as images when a folder is scanned

# What Pillow and its codecs raise on damaged data. Not MemoryError: that is the machine's fault, not the file's.
DAMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, RuntimeError),
    *(struct.error, zlib.error),
)

SIGNATURES = (  # (offset, bytes, name), only for the reason shown to the user
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG", "PNG"),
    (8, b"WEBP", "WEBP"),
    (8, b"avif", "AVIF"),
    (8, b"avis", "AVIF"),
    (0, b"BM", "BMP"),
    (0, b"GIF8", "GIF"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (8, b"hei", "HEIC"),
    (4, b"JXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"8BPS", "PSD"),
)
FILE_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
UPRIGHT = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # the orientations that swap width and height
ORIENTATION_TAG = 0x0112

# Python's warning filters belong to the whole process, and two threads that change them at once can leave them changed.
WARNING_FILTERS = threading.Lock()


class BadImage(Exception):
    """The file cannot be used as an image; `str(error)` is the short reason shown to the user."""


class Unreadable(BadImage):
    """The file could not be read this time, or is another one than before; a later try may go well."""


@dataclass(frozen=True)
class ImageInfo:
    """What the header says."""

    width: int  # after EXIF orientation
    height: int
    format: str  # one of FORMATS
    has_alpha: bool  # whether anything may be transparent
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Crop:
    """What is made of an image: scaled to cover width x height pixels, cut to it, and mirrored if asked."""

    width: int
    height: int
    position: tuple[float, float] = (0.5, 0.5)  # of what is kept: 0 left or top, 1 right or bottom
    mirrored: bool = False


def probe(file: Path | BinaryIO, suffix: str = "") -> ImageInfo:
    """Read the header, never the pixels.

    Args:
        file: where the image is, or the image itself, open for reading.
        suffix: what the image is called, where it has no path.

    Raises:
        BadImage: not a readable file, not a supported image, too many pixels, or a PNG that ends too early. Damage in
            the pixels of the other formats only shows in `decode`.
    """
    if isinstance(file, Path):
        with open_file(file) as opened:
            return probe(opened, file.suffix)
    image = open_image(file)
    width, height = image.size
    if orientation(image, file) in SIDEWAYS:
        width, height = height, width
    warnings = tuple(header_warnings(suffix, image))
    return ImageInfo(width, height, format_name(image), image.has_transparency_data, warnings)


def read_file(path: Path) -> bytes:
    """A file's content, read once and whole, so that what is checked is what is decoded, even if the file changes.

    Raises:
        BadImage: not a file, or none of a plausible size; `Unreadable` where a later try may go well.
    """
    with open_file(path) as file:
        return file.read()


def decode(file: Path | bytes) -> Image.Image:
    """The picture as it is meant to be seen: upright, RGB in sRGB, 8 bits, transparency over white, the first frame.

    Raises:
        BadImage: as `probe`, and when the pixels are truncated or damaged; a file that stops is never loaded half.
            JPEG, WebP, AVIF and BMP carry no checksum, so wrong bytes inside a file of full length can go unnoticed.
    """
    picture = load_picture(file)
    return picture.copy() if isinstance(picture, ImageFile.ImageFile) else picture


def decode_and_crop(file: Path | bytes, crop: Crop) -> Image.Image:
    """`cover_and_crop` of what `decode` gives, without a copy of the whole picture on the way.

    Raises:
        BadImage: as `decode`.
    """
    return cover_and_crop(load_picture(file), crop)


def decode_mask(file: Path | bytes, image_size: tuple[int, int]) -> Image.Image:
    """The mask as 8-bit grey (mode L), upright, white = train, scaled to `image_size` (width, height).

    Colours count by their luma and no ICC profile is applied: the values are weights, not light. Transparent parts are
    not trained, so that white painted on a transparent layer means what it looks like.

    Raises:
        BadImage: as `decode`.
    """
    image, turn = load(file)
    colour, alpha = colour_and_alpha(image)
    mask = upright(over(colour.convert("RGB"), alpha, "black"), turn).convert("L")
    return mask.resize(image_size, Image.Resampling.BILINEAR)


def decode_alpha(file: Path | bytes) -> Image.Image:
    """The image's opacity as a mask: 8-bit grey (mode L), upright, opaque = train; white all over without alpha.

    Raises:
        BadImage: as `decode`.
    """
    image, turn = load(file)
    _, alpha = colour_and_alpha(image)
    return upright(Image.new("L", image.size, "white") if alpha is None else alpha, turn)


def cover_box(image_size: tuple[int, int], crop: Crop) -> tuple[float, float, float, float]:
    """The largest box (left, top, right, bottom) of the image with the aspect ratio of the crop, at its position."""
    width, height = image_size
    box_width = min(width, height * crop.width / crop.height)
    box_height = min(height, width * crop.height / crop.width)
    left, top = (width - box_width) * crop.position[0], (height - box_height) * crop.position[1]
    # Rounding must not lead beyond the image, which Pillow refuses.
    return left, top, min(left + box_width, width), min(top + box_height, height)


def cover_and_crop(image: Image.Image, crop: Crop) -> Image.Image:
    """Scale to cover (Lanczos, antialiased) and crop, in one resampling, to exactly (width, height); then mirror."""
    return resized(image, crop, Image.Resampling.LANCZOS)


def resized(image: Image.Image, crop: Crop, resampling: Image.Resampling) -> Image.Image:
    """The crop of an image."""
    cropped = image.resize((crop.width, crop.height), resampling, box=cover_box(image.size, crop))
    return cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.mirrored else cropped


def mask_to_latent(mask: Image.Image, crop: Crop) -> np.ndarray:
    """The mask at latent size, (1, height // 8, width // 8) float32 in [0, 1], where the crop of its image is.

    The sides of the crop are multiples of 8. Bilinear, because Lanczos rings: it would give weight to what lies beside
    a hard edge.
    """
    cropped = np.asarray(resized(mask, crop, Image.Resampling.BILINEAR), dtype=np.float32) / 255
    return cropped.reshape(
        1, crop.height // LATENT_PIXELS, LATENT_PIXELS, crop.width // LATENT_PIXELS, LATENT_PIXELS
    ).mean(axis=(2, 4))


# Files and headers


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """The file, open for reading; a FIFO or a device is refused before it is opened, since that may block."""
    try:
        check_kind_and_size(os.stat(path))
        with open(path, "rb") as file:
            yield file
    except PermissionError as error:
        raise Unreadable("not readable (permission denied)") from error
    except FileNotFoundError as error:
        raise Unreadable("not there: deleted, or a symbolic link to nothing") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Unreadable("a symbolic link that leads back to itself") from error
        raise Unreadable(f"not readable ({error.strerror})") from error


def check_kind_and_size(status: os.stat_result) -> None:
    """Raise BadImage unless this is a regular file with a plausible number of bytes."""
    if not stat.S_ISREG(status.st_mode):
        raise BadImage(f"{FILE_KINDS.get(stat.S_IFMT(status.st_mode), 'something else')}, not a file")
    if status.st_size == 0:
        raise BadImage("zero bytes")
    if status.st_size > MAX_BYTES:
        raise BadImage(f"{status.st_size:,} bytes is more than the limit of {MAX_BYTES:,}")


def open_image(file: BinaryIO) -> ImageFile.ImageFile:
    """The image with only its header read; `file` must stay open until its pixels are loaded."""
    try:
        with damage_is_bad_image(), WARNING_FILTERS, warnings.catch_warnings():
            # Pillow warns about large images, odd EXIF and odd animations; what matters of that is said by `probe`.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImage(f"its header claims more than the limit of {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        file.seek(0)
        raise BadImage(what_else(file.read(512))) from error
    check_pixels(*image.size)
    return image


@contextlib.contextmanager
def damage_is_bad_image() -> Iterator[None]:
    """Turn everything Pillow raises on damaged data into BadImage."""
    try:
        yield
    except UnidentifiedImageError:
        raise  # not damaged: something else
    except DAMAGE as error:
        kind = "truncated" if "truncated" in str(error).lower() else "truncated or damaged"
        raise BadImage(f"{kind}: {error}") from error


def check_pixels(width: int, height: int) -> None:
    """Raise BadImage if the picture has more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels is more than the limit of {MAX_PIXELS:,}")


def what_else(head: bytes) -> str:
    """What a file that Pillow cannot read as an image is, from its first bytes."""
    if head.startswith(b"version https://git-lfs"):
        return "not an image (a git-lfs pointer: run `git lfs pull`)"
    if is_text(head):
        return f"not an image ({'HTML' if b'<html' in head.lower() or b'<!doctype' in head.lower() else 'text'})"
    for offset, signature, name in SIGNATURES:
        if head[offset:].startswith(signature):
            if name in FORMATS:
                return f"truncated or damaged: it begins as {name}, but its header cannot be read"
            return f"{name} is not supported; convert it to PNG, JPEG or WebP"
    return "not an image"


def is_text(head: bytes) -> bool:
    """Whether the bytes are UTF-8 text, which may stop in the middle of a character."""
    try:
        return "\0" not in codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False


def format_name(image: ImageFile.ImageFile) -> str:
    """The image's format; MPO, a JPEG with more pictures behind it as phones write it, is a JPEG."""
    return "JPEG" if image.format == "MPO" else str(image.format)


def header_warnings(suffix: str, image: ImageFile.ImageFile) -> Iterator[str]:
    """What the user should know about an image that can be used all the same."""
    found = format_name(image)
    if FORMAT_OF_SUFFIX.get(suffix.lower(), found) != found:
        yield f"named {suffix} but holds {found}"
    frames: int = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        yield f"animated: the first of {frames} frames is used"
    if "icc_profile" in image.info and srgb_transform(image.info["icc_profile"], colour_mode(image.mode)) is None:
        yield "its ICC colour profile cannot be used; the colours are read as sRGB"


def orientation(image: ImageFile.ImageFile, file: BinaryIO) -> int:
    """The EXIF orientation, as in `exif_orientation`.

    Not Pillow's `getexif`: for a PNG that decodes the pixels, and damaged EXIF makes it raise or warn.
    """
    if image.format != "PNG":
        return exif_orientation(image.info.get("exif", b""))
    for kind, start, length in png_chunks(file):
        if kind == b"eXIf":  # before or after the pixels
            file.seek(start)
            return exif_orientation(file.read(length))
    lines = image.info.get("Raw profile type exif", "").split("\n")  # ImageMagick: three lines of heading, then hex
    try:
        return exif_orientation(bytes.fromhex("".join(lines[3:])))
    except ValueError:
        return 1


def exif_orientation(exif: bytes) -> int:
    """The orientation in an EXIF block's first directory; 1 if there is none or the block is damaged.

    Values that are not in UPRIGHT mean upright.
    """
    block = exif.removeprefix(b"Exif\0\0")
    order = ">" if block.startswith(b"MM") else "<"
    try:
        (directory,) = struct.unpack_from(f"{order}I", block, 4)
        (entries,) = struct.unpack_from(f"{order}H", block, directory)
        for start in range(directory + 2, directory + 2 + 12 * entries, 12):
            tag, kind = struct.unpack_from(f"{order}HH", block, start)
            if tag == ORIENTATION_TAG:
                value: int
                (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), block, start + 8)
                return value
    except struct.error:
        pass
    return 1


# Whole files


def load_picture(file: Path | bytes) -> Image.Image:
    """See `decode`; may be the image of the file itself."""
    image, turn = load(file)
    colour, alpha = colour_and_alpha(image)
    picture = over(to_srgb(colour, image.info.get("icc_profile")), alpha, "white")
    return upright(picture, turn)


def load(file: Path | bytes) -> tuple[Image.Image, int]:
    """The decoded image as it is stored, and its EXIF orientation. JPEG is decoded at full size, never as a draft."""
    content = file if isinstance(file, bytes) else read_file(file)
    if not content:
        raise BadImage("zero bytes")
    image = open_image(io.BytesIO(content))
    if image.format == "PNG":
        check_png(content)
    if format_name(image) == "JPEG":
        check_jpeg(content)
    with damage_is_bad_image():
        image.load()
    return image, orientation(image, io.BytesIO(content))


def png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """(name, start of the data, length) of each chunk, without reading the data; raises BadImage if there is no end."""
    size = file.seek(0, os.SEEK_END)
    position = 8
    while True:
        file.seek(position)
        header = file.read(8)
        if len(header) < 8:
            raise BadImage("truncated: the PNG has no end (IEND chunk)")
        length, kind = struct.unpack(">I4s", header)
        if not kind.isalpha():
            raise BadImage(f"truncated or damaged: no PNG chunk at byte {position:,}")
        if position + 12 + length > size:
            raise BadImage(f"truncated: the PNG ends inside its {kind.decode('ascii')} chunk")
        yield kind, position + 8, length
        if kind == b"IEND":
            return
        position += 12 + length


def check_png(content: bytes) -> None:
    """Raise BadImage if pixel data fails its checksum: Pillow stops at the last row and never looks at it."""
    view = memoryview(content)
    for kind, start, length in png_chunks(io.BytesIO(content)):
        end = start + length
        if kind == b"IDAT" and zlib.crc32(view[start - 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise BadImage(f"truncated or damaged: the PNG chunk at byte {start - 8:,} fails its checksum")


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


# Colour


def colour_mode(mode: str) -> str:
    """The mode that holds the colours of an image of this mode with 8 bits and without alpha: L, RGB or CMYK."""
    if mode in ("1", "L", "LA") or mode.startswith("I"):
        return "L"
    return "CMYK" if mode == "CMYK" else "RGB"


def colour_and_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours in `colour_mode`, and the alpha as L if anything may be transparent."""
    mode = colour_mode(image.mode)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion to L would clip at 255
        deep = np.asarray(image, dtype=np.uint32)
        grey = Image.fromarray(((deep * 255 + 32767) // 65535).astype(np.uint8))
        transparent = image.info.get("transparency")
        if transparent is None:
            return grey, None
        return grey, Image.fromarray(np.where(deep == transparent, 0, 255).astype(np.uint8))
    if image.has_transparency_data:  # an alpha channel, or transparent palette entries, or one transparent colour
        layered = image.convert("RGBA")
        return layered.convert(mode), layered.getchannel("A")
    return converted(image, mode), None


def srgb_transform(icc: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the profile's colours to sRGB, or None if the profile is damaged or not for images of this mode.

    Relative colorimetric with black point compensation: what photo editors do by default.
    """
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc or b""))
        source = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(profile.profile.xcolor_space, "")
        if source != mode and (source, mode) != ("RGB", "L"):
            return None
        return ImageCms.buildTransform(
            profile,
            ImageCms.createProfile("sRGB"),
            source,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (OSError, ImageCms.PyCMSError):
        return None


def to_srgb(colour: Image.Image, icc: bytes | None) -> Image.Image:
    """The colours as RGB in sRGB; without a usable profile grey and RGB are sRGB, and CMYK is converted plainly."""
    transform = srgb_transform(icc, colour.mode)
    if transform is None:
        return converted(colour, "RGB")
    return transform.apply(colour.convert(transform.input_mode))


def converted(image: Image.Image, mode: str) -> Image.Image:
    """The image in this mode; itself if it is in it already, where `convert` would copy it."""
    return image if image.mode == mode else image.convert(mode)


def over(colour: Image.Image, alpha: Image.Image | None, background: str) -> Image.Image:
    """The RGB colours over a background, by their alpha."""
    if alpha is None:
        return colour
    canvas = Image.new("RGB", colour.size, background)
    canvas.paste(colour, mask=alpha)
    return canvas


def upright(picture: Image.Image, turn: int) -> Image.Image:
    """The picture with its EXIF orientation undone, and without metadata that no longer describes it."""
    if turn in UPRIGHT:
        picture = picture.transpose(UPRIGHT[turn])
    picture.info = {}
    return picture
