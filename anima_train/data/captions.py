"""Captions: read from files, and the variants a sample is trained on."""

import json
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anima_train.core.random import shuffled, uniform
from anima_train.data.image_headers import Unreadable
from anima_train.data.sources.archive import ArchiveMember

CAPTIONS_JSON_FORM = 'expected {"file name": "caption" or ["several", "captions"]}'
# Tags whose underscores are no spaces: emoticons, as ^_^, o_o or (o)_(o), and the model's own score tags.
KEEPS_UNDERSCORES = re.compile(r"\S_\S|[^\w\s]\S{0,2}_\S{0,2}[^\w\s]|score_\d(_up)?")


class BadCaption(Exception):
    """A caption file cannot be used; the message is the reason."""


def read_caption(file: Path | ArchiveMember) -> str:
    """A caption file's text, as `cleaned`: UTF-8 with or without BOM.

    Raises:
        BadCaption: not UTF-8, with the offset of the first bad byte in the file; or not readable.
    """
    return cleaned(read_utf8(file))


def read_utf8(file: Path | ArchiveMember) -> str:
    """A file's text without BOM.

    Raises:
        BadCaption: as `read_caption`.
    """
    try:
        if isinstance(file, Path) and not stat.S_ISREG(file.stat().st_mode):  # a FIFO would block
            raise BadCaption("not a file")
        data = file.read_bytes() if isinstance(file, Path) else file.read()
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadCaption(f"not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}); save it as UTF-8") from error
    except OSError as error:
        raise BadCaption(f"not readable ({error.strerror})") from error
    except Unreadable as error:
        raise BadCaption(str(error)) from error
    # The BOM is removed after decoding, because an offset counts from the start of the file.
    return text.removeprefix("\ufeff")


def cleaned(text: str) -> str:
    """The text without NULs and outer white space, its line ends as line feeds."""
    return text.replace("\x00", "").replace("\r\n", "\n").replace("\r", "\n").strip()


def read_captions_json(file: Path | ArchiveMember) -> dict[str, tuple[str, ...]]:
    """What a captions.json holds: {"file name": "caption" or ["several", "captions"]}.

    Raises:
        BadCaption: not readable, or not of that form; names the line and column, or the entry.
    """
    text = read_utf8(file)
    try:
        # Pairs, to see a name given twice; and no int, which raises an error of its own on thousands of digits.
        pairs = json.loads(text, object_pairs_hook=list, parse_int=float)
    except json.JSONDecodeError as error:
        raise BadCaption(f"not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from error
    except RecursionError as error:
        raise BadCaption(f"nested too deeply; {CAPTIONS_JSON_FORM}") from error
    if not text.lstrip().startswith("{"):
        raise BadCaption(CAPTIONS_JSON_FORM)
    captions: dict[str, tuple[str, ...]] = {}
    for name, value in pairs:
        if name in captions:
            raise BadCaption(f"{json.dumps(name)} is given twice; merge the two into a list of captions")
        captions[name] = caption_list(name, value)
    return captions


def caption_list(name: str, value: Any) -> tuple[str, ...]:
    """The captions of one entry of a captions.json.

    Raises:
        BadCaption: it is neither text nor a list of texts, or a text that is no Unicode.
    """
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise BadCaption(f"{json.dumps(name)}: {CAPTIONS_JSON_FORM}")
    if not all(text.isascii() or not re.search("[\ud800-\udfff]", text) for text in texts):
        raise BadCaption(f"{json.dumps(name)}: half of a surrogate pair, which is no character")
    return tuple(map(cleaned, texts))


def without_underscores(caption: str, delimiter: str) -> str:
    """The caption with spaces for underscores, but not in tags that `KEEPS_UNDERSCORES`.

    Tags are what the delimiter, a comma or a line end separates.
    """
    parts = re.split(
        rf"({re.escape(delimiter)}|[,\n])", caption
    )  # tags at even places, what separates them at odd ones
    for place in range(0, len(parts), 2):
        if not KEEPS_UNDERSCORES.fullmatch(parts[place].strip()):
            parts[place] = parts[place].replace("_", " ")
    return "".join(parts)


def unescaped(text: str) -> str:
    """The text with ( and ) for \\( and \\)."""
    return text.replace("\\(", "(").replace("\\)", ")")


@dataclass(frozen=True)
class TagVariation:
    """How the tags of a caption change from showing to showing."""

    delimiter: str
    keep_first: int = 0  # tags at the start that stay
    shuffles: bool = False
    dropout: float = 0.0  # share of the tags left out
    protected: frozenset[str] = frozenset()  # never left out; as `plain_tag`

    def varied(self, caption: str, seed: int, sample: str, variant: int) -> str:
        """The caption's tags as this sample and variant has them.

        Tags are told apart by their place too, so that a tag given twice stays twice.
        """
        tags = [(f"{place}:{tag}", tag) for place, tag in enumerate(caption.split(self.delimiter))]
        kept, rest = tags[: self.keep_first], tags[self.keep_first :]
        if self.dropout > 0:
            rest = [
                (key, tag)
                for key, tag in rest
                if plain_tag(tag) in self.protected
                or uniform(seed, "tag_dropout", sample, variant, key) >= self.dropout
            ]
        if self.shuffles:
            rest = shuffled(rest, lambda item: item[0], seed, "tags", sample, variant)
        return self.delimiter.join(tag for _, tag in kept + rest)


def plain_tag(tag: str) -> str:
    """A tag without what is spelled in several ways: underscores, escapes, outer white space."""
    return unescaped(tag).replace("_", " ").strip()
