"""Captions: read from files, and varied from repeat to repeat."""

import json
import math
import re
import stat
from pathlib import Path
from typing import Any

from anima_train.core.format import format_bytes
from anima_train.core.random import shuffled, uniform
from anima_train.data.caption_parts import map_tags
from anima_train.data.image_headers import Unreadable
from anima_train.data.settings import DirectoryOptions
from anima_train.data.sources.archive import ArchiveMember

MAX_CAPTION_BYTES = 2**20  # no caption is that long: it is another text
CAPTIONS_JSON_FORM = 'expected {"file name": "caption" or ["several", "captions"]}'
# Tags whose underscores are no spaces: emoticons, as ^_^, o_o or (o)_(o), and the model's own score tags.
KEEPS_UNDERSCORES = re.compile(r"\S_\S|[^\w\s]\S{0,2}_\S{0,2}[^\w\s]|score_\d(_up)?")


class BadCaption(Exception):
    """A caption file that cannot be used; the message is the reason."""


def read_caption(file: Path | ArchiveMember) -> str:
    """Return a caption file's text, `cleaned`: UTF-8 with or without BOM.

    Raises:
        BadCaption: not UTF-8, with the offset of the first bad byte in the file; not readable, or too large.
    """
    return cleaned(read_utf8(file, MAX_CAPTION_BYTES))


def read_utf8(file: Path | ArchiveMember, max_bytes: float = math.inf) -> str:
    """Return a file's text without BOM.

    Args:
        file: that is read.
        max_bytes: that it may have; a larger one is not read.

    Raises:
        BadCaption: as `read_caption`.
    """
    try:
        if isinstance(file, Path) and not stat.S_ISREG(file.stat().st_mode):  # a FIFO would block
            raise BadCaption("not a file")
        num_bytes = file.stat().st_size if isinstance(file, Path) else file.stamp[0]
        if num_bytes > max_bytes:
            raise BadCaption(f"larger than {format_bytes(max_bytes)}, which is no caption")
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
    """Return the text without NULs and outer white space, its line ends as line feeds."""
    return text.replace("\x00", "").replace("\r\n", "\n").replace("\r", "\n").strip()


def read_captions_json(file: Path | ArchiveMember) -> dict[str, tuple[str, ...]]:
    """Return the captions of a captions.json by file name: {"file name": "caption" or ["several", "captions"]}.

    Raises:
        BadCaption: not readable, or not of that form; names the line and column, or the entry.
    """
    text = read_utf8(file)
    try:
        # Pairs, to notice a name given twice; and no int, which raises an error of its own on thousands of digits.
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
    """Return the captions of one entry of a captions.json.

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
    """Return the caption with spaces for underscores, except in tags that match `KEEPS_UNDERSCORES`.

    Tags are separated by the delimiter, a comma or a line end.
    """
    parts = re.split(rf"({re.escape(delimiter)}|[,\n])", caption)  # tags at even indices, separators at odd ones
    for place in range(0, len(parts), 2):
        if not KEEPS_UNDERSCORES.fullmatch(parts[place].strip()):
            parts[place] = parts[place].replace("_", " ")
    return "".join(parts)


def unescaped(text: str) -> str:
    """Return the text with ( and ) for \\( and \\)."""
    return text.replace("\\(", "(").replace("\\)", ")")


def vary_tags(
    caption: str, options: DirectoryOptions, seed: int, sample: str, variant: int | None, num_fixed: int = 0
) -> str:
    """Return the caption with its tags in this variant of this sample, shuffled and dropped as the options say.

    Sentences and line ends stay where they are, and no tag leaves its run (`caption_parts`). Tags are drawn by their
    position too, so that a tag given twice stays twice.

    Args:
        caption: as in the file.
        options: of the directory.
        seed: of the run.
        sample: its name.
        variant: None leaves all tags, in the order of the file.
        num_fixed: tags at the start that stay, beside those of `keep_first_n_tags`.
    """
    delimiter, separator = options.cache_shuffle_delimiter, options.keep_tokens_separator
    protected = set(map(plain_tag, options.protected_tags))
    num_kept, num_seen = num_fixed + options.keep_first_n_tags, 0

    def spelled(tags: list[str]) -> list[str]:
        return [without_underscores(tag, delimiter) for tag in tags] if options.replace_underscores else tags

    def varied(tags: list[str]) -> list[str]:
        nonlocal num_seen
        if variant is None:
            return spelled(tags)
        keyed = [(f"{num_seen + place}:{tag}", tag) for place, tag in enumerate(spelled(tags))]
        num_here = max(0, num_kept - num_seen)
        num_seen += len(keyed)
        kept, rest = keyed[:num_here], keyed[num_here:]
        if options.tag_dropout > 0:
            rest = [
                (key, tag)
                for key, tag in rest
                if plain_tag(tag) in protected
                or uniform(seed, "tag_dropout", sample, variant, key) >= options.tag_dropout
            ]
        if options.shuffle_tags or options.cache_shuffle_num > 0:
            rest = shuffled(rest, lambda item: item[0], seed, "tags", sample, variant)
        return [tag for _, tag in kept + rest]

    if not separator or separator not in caption:
        return map_tags(caption, delimiter, varied)
    num_kept = 0  # the separator takes the place of a number
    outside = f" {delimiter}"
    head, flexible, *tail = (part.strip(outside) for part in caption.split(separator))
    parts = [map_tags(head, delimiter, spelled), map_tags(flexible, delimiter, varied)]
    return delimiter.join(filter(None, [*parts, *(map_tags(part, delimiter, spelled) for part in tail)]))


def plain_tag(tag: str) -> str:
    """Return a tag in one spelling: without underscores, escapes and outer white space."""
    return unescaped(tag).replace("_", " ").strip()
