"""Captions: read from files, and the variants a sample is trained on."""

import stat
from pathlib import Path

from anima_train.core.random import shuffled


class BadCaption(Exception):
    """A caption file cannot be used; the message is the reason."""


def read_caption(path: Path) -> str:
    """A caption file's text: UTF-8 with or without BOM, line ends and NULs cleaned, outer white space removed.

    Raises:
        BadCaption: not UTF-8, with the offset of the first bad byte in the file; or not readable.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a FIFO would block
            raise BadCaption("not a file")
        data = path.read_bytes()
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadCaption(f"not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}); save it as UTF-8") from error
    except OSError as error:
        raise BadCaption(f"not readable ({error.strerror})") from error
    # The BOM is removed after decoding, because an offset counts from the start of the file.
    return text.removeprefix("\ufeff").replace("\x00", "").replace("\r\n", "\n").replace("\r", "\n").strip()


def shuffled_tags(caption: str, delimiter: str, seed: int, sample: str, variant: int) -> str:
    """The caption's tags in an order of their own for this sample and variant.

    Tags are told apart by their place too, so that a tag given twice stays twice.
    """
    tags = list(enumerate(caption.split(delimiter)))
    order = shuffled(tags, lambda tag: f"{tag[0]}:{tag[1]}", seed, "tags", sample, variant)
    return delimiter.join(tag for _, tag in order)
