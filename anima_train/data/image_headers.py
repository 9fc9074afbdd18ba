"""Image files before their pixels are decoded: opening them, and reading size, format and orientation.

Whatever is wrong with a file ends as `BadImage` with a short reason: the caller skips the file and goes on.
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
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageFile, UnidentifiedImageError

from anima_train.data.colour import colour_mode, srgb_transform

MAX_PIXELS = 128 * 2**20  # a header that claims more is treated as a decompression bomb and never decoded
MAX_BYTES = 2**30  # WebP and AVIF are read whole even for their header; no picture of MAX_PIXELS is larger than this

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")
OTHER_SUFFIXES = {".jpg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".apng": "PNG", ".tif": "TIFF"}
FORMAT_OF_SUFFIX = {f".{name.lower()}": name for name in FORMATS} | OTHER_SUFFIXES
EXTENSIONS = frozenset(FORMAT_OF_SUFFIX)  # lower-case suffixes that count as images when a folder is scanned

# Pictures that are not read, by suffix, and what to do with them.
CONVERT, EXTRACT = "convert it to PNG, JPEG or WebP", "extract its frames as PNG or JPEG"
UNREAD_SUFFIXES = (
    dict.fromkeys(
        (
            *(
                "heic",
                "heif",
                "heics",
                "hif",
                "avifs",
                "jxl",
                "jxr",
                "jp2",
                "j2k",
                "jpf",
                "jpx",
                "ppm",
                "pgm",
                "pbm",
                "pnm",
            ),
            *("qoi", "tga", "ico", "dds", "pcx", "exr", "hdr", "svg", "svgz", "eps", "ai", "wmf", "emf"),
            *("psd", "psb", "xcf", "kra", "clip", "sai", "sai2", "mdp", "afphoto", "procreate"),
        ),
        CONVERT,
    )
    | dict.fromkeys(("jpg_large", "jpg_orig", "png_large", "png_orig"), "rename it to .jpg or .png")
    | dict.fromkeys(
        (
            *("cr2", "cr3", "crw", "nef", "nrw", "arw", "dng", "raf", "orf", "rw2", "pef", "srw", "x3f", "3fr", "iiq"),
            *("dcr", "kdc", "rwl"),
        ),
        "develop it to PNG, JPEG or WebP",
    )
    | dict.fromkeys(
        (
            *("mp4", "webm", "mov", "avi", "mkv", "m4v", "gifv", "wmv", "flv", "mpg", "mpeg", "3gp", "ogv", "m2ts"),
            "vob",
        ),
        EXTRACT,
    )
)

# What Pillow and its codecs raise on damaged data. Not MemoryError: that is the machine's fault, not the file's.
DECODE_ERRORS = (
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
UNREAD_TIFF_MODES = ("F", "I", "LAB", "HSV")  # their values have no agreed meaning as colours
FILE_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}  # others are devices
SIDEWAYS = (5, 6, 7, 8)  # the orientations that swap width and height
ORIENTATION_TAG = 0x0112

# Python's warning filters belong to the whole process, and two threads that change them at once can leave them changed.
WARNING_FILTERS = threading.Lock()


class BadImage(Exception):
    """A file that cannot be used as an image; `str(error)` is the short reason shown to the user."""


class Unreadable(BadImage):
    """A file that could not be read this time, or is another one than before; a later try may go well."""


class ImageInfo(NamedTuple):
    """The information in an image's header."""

    width: int  # after EXIF orientation
    height: int
    has_alpha: bool  # anything may be transparent
    warnings: tuple[str, ...]


def probe(content: bytes, suffix: str) -> ImageInfo:
    """Read the header of an image file, never the pixels.

    Args:
        content: of the file.
        suffix: of its name.

    Raises:
        BadImage: not a supported image, too many pixels, or a PNG that ends too early. Damage in the pixels of the
            other formats only shows in `decode`.
    """
    image = open_image(content)
    width, height = image.size
    if read_orientation(image, content) in SIDEWAYS:
        width, height = height, width
    warnings = tuple(header_warnings(suffix, image))
    return ImageInfo(width, height, image.has_transparency_data, warnings)


def read_file(path: Path) -> bytes:
    """Return a file's content, read once and whole: what is checked is what is decoded, even if the file changes.

    Raises:
        BadImage: not a file, or none of a plausible size; `Unreadable` where a later try may go well.
    """
    try:
        check_kind_and_size(path.stat())  # before it is opened, since to open a FIFO or a device may block
        return path.read_bytes()
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
        raise BadImage(f"{FILE_KINDS.get(stat.S_IFMT(status.st_mode), 'a device')}, not a file")
    if status.st_size == 0:
        raise BadImage("zero bytes")
    if status.st_size > MAX_BYTES:
        raise BadImage(f"{status.st_size:,} bytes is more than the limit of {MAX_BYTES:,}")


def open_image(content: bytes) -> ImageFile.ImageFile:
    """Return the image with only its header read.

    Raises:
        BadImage: empty, not a supported image, or too many pixels.
    """
    if not content:
        raise BadImage("zero bytes")
    try:
        with decode_errors_as_bad_image(), WARNING_FILTERS, warnings.catch_warnings():
            # Pillow warns about large images, odd EXIF and odd animations; `probe` warns of what matters of that.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImage(f"its header claims more than the limit of {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise BadImage(identify(content[:512])) from error
    if image.format == "TIFF" and image.mode in UNREAD_TIFF_MODES:
        raise BadImage(f"a TIFF of mode {image.mode} is not supported; convert it to PNG, JPEG or WebP")
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{image.width} x {image.height} pixels is more than the limit of {MAX_PIXELS:,}")
    return image


@contextlib.contextmanager
def decode_errors_as_bad_image() -> Iterator[None]:
    """Turn everything Pillow raises on damaged data into BadImage."""
    try:
        yield
    except UnidentifiedImageError:
        raise  # not damaged: something else
    except DECODE_ERRORS as error:
        kind = "truncated" if "truncated" in str(error).lower() else "truncated or damaged"
        raise BadImage(f"{kind}: {error}") from error


def identify(head: bytes) -> str:
    """Return what a file that Pillow cannot read as an image is, told from its first bytes."""
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
    """Return True if the bytes are UTF-8 text, which may stop in the middle of a character."""
    try:
        return "\0" not in codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False


def format_name(image: ImageFile.ImageFile) -> str:
    """Return the image's format; MPO, a JPEG with more pictures after it as phones write it, counts as JPEG."""
    return "JPEG" if image.format == "MPO" else str(image.format)


def header_warnings(suffix: str, image: ImageFile.ImageFile) -> Iterator[str]:
    """Yield the warnings about an image that can be used all the same."""
    found = format_name(image)
    if FORMAT_OF_SUFFIX.get(suffix.lower(), found) != found:
        yield f"named {suffix} but holds {found}"
    frames: int = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        yield f"animated: the first of {frames} frames is used"
    if "icc_profile" in image.info and srgb_transform(image.info["icc_profile"], colour_mode(image.mode)) is None:
        yield "its ICC colour profile cannot be used; the colours are read as sRGB"


def read_orientation(image: ImageFile.ImageFile, content: bytes) -> int:
    """Return the EXIF orientation, as `exif_orientation` does.

    Not Pillow's `getexif`: for a PNG that decodes the pixels, and damaged EXIF makes it raise or warn.
    """
    if image.format != "PNG":
        return exif_orientation(image.info.get("exif", b""))
    for kind, start, length in png_chunks(content):
        if kind == b"eXIf":  # before or after the pixels
            return exif_orientation(content[start : start + length])
    lines = image.info.get("Raw profile type exif", "").split("\n")  # ImageMagick: three lines of heading, then hex
    try:
        return exif_orientation(bytes.fromhex("".join(lines[3:])))
    except ValueError:
        return 1


def exif_orientation(exif: bytes) -> int:
    """Return the orientation in an EXIF block's first directory; 1 if there is none or the block is damaged.

    Values other than 2 to 8 mean upright.
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


def png_chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, start of the data, length) of each chunk of a PNG.

    Raises:
        BadImage: there is no end.
    """
    position, kind = 8, b""
    while kind != b"IEND":
        if len(content) < position + 8:
            raise BadImage("truncated: the PNG has no end (IEND chunk)")
        length, kind = struct.unpack_from(">I4s", content, position)
        if not kind.isalpha():
            raise BadImage(f"truncated or damaged: no PNG chunk at byte {position:,}")
        if len(content) < position + 12 + length:
            raise BadImage(f"truncated: the PNG ends inside its {kind.decode('ascii')} chunk")
        yield kind, position + 8, length
        position += 12 + length
