"""Statistics of a set's captions: lengths in tokens, unreadable characters, tags, typos, missing trigger words."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from anima_train.core.text_batch import MAX_TOKENS
from anima_train.data.caption_parts import kind_of
from anima_train.data.samples import Sample
from anima_train.data.scan_warnings import SPECIAL_TOKEN
from anima_train.model.text import AS_TRAINED, TokenCounts, Tokenizers, count_tokens

MAX_TAG = 40  # characters; longer pieces are sentences
MIN_TYPO = 5  # characters; among shorter words neighbours are common: "hat" and "cat"
TYPO_RATIO = 3  # a tag this many times as frequent may be what was meant
MIN_CAPTIONED = 4  # images of a directory; among fewer no first tag is a habit


@dataclass(frozen=True)
class Tokenized:
    """The captions as both tokenizers read them."""

    lengths: Mapping[str, TokenCounts]
    unknown: Mapping[str, str]  # caption -> the characters that T5 reads as <unk>


def tokenized(tokenizers: Tokenizers, captions: Iterable[str], max_tokens: int = MAX_TOKENS) -> Tokenized:
    """Tokenize every caption once, and again those that T5 cannot read; `max_tokens` of each are trained."""
    lengths = count_tokens(tokenizers, captions, max_tokens)
    unknown = {caption: unread(tokenizers, caption) for caption, counts in lengths.items() if counts.has_unknown}
    return Tokenized(lengths, unknown)


def unread(tokenizers: Tokenizers, caption: str) -> str:
    """Return the characters of a caption that T5 reads as <unk>, each once."""
    found = tokenizers.t5(caption, **AS_TRAINED, return_offsets_mapping=True)
    places = zip(found["input_ids"], found["offset_mapping"], strict=True)
    pieces = [caption[start:end] for token, (start, end) in places if token == tokenizers.t5.unk_token_id]
    # <unk> as text is warned of as a special token.
    return "".join(sorted({letter for piece in pieces if piece != "<unk>" for letter in piece.strip()}))


@dataclass(frozen=True)
class Typo:
    """A tag that looks like a mistyped one."""

    tag: str
    number: int
    meant: str
    meant_number: int


@dataclass(frozen=True)
class CaptionStats:
    """The statistics of a set's captions."""

    lengths: Sequence[TokenCounts]  # one per different caption
    truncated: Sequence[tuple[str, int]]  # (caption, tokens lost), the longest first
    unknown: Sequence[tuple[str, int]]  # (character, captions it is in), the most frequent first
    special: Sequence[tuple[str, str]]  # (special token, a caption that holds its text)
    tags: Sequence[tuple[str, int]]  # (tag, images), the most frequent first
    typos: Sequence[Typo]


def caption_stats(captions: Iterable[Sequence[str]], known: Tokenized) -> CaptionStats:
    """Return the statistics of one set.

    Args:
        captions: those of each image.
        known: their tokens.
    """
    images = list(captions)
    different = list(dict.fromkeys(caption for image in images for caption in image))
    truncated = [(caption, known.lengths[caption].lost) for caption in different if known.lengths[caption].lost]
    unknown = Counter(letter for caption in different for letter in known.unknown.get(caption, ""))
    tags = Counter(tag for image in images for tag in {tag for caption in image for tag in tags_of(caption)})
    return CaptionStats(
        [known.lengths[caption] for caption in different],
        sorted(truncated, key=lambda item: -item[1]),
        ranked(unknown),
        [(found[0], caption) for caption in different if (found := SPECIAL_TOKEN.search(caption))],
        ranked(tags),
        list(typos(tags)),
    )


def ranked(counter: Counter[str]) -> list[tuple[str, int]]:
    """Return (text, number), the most frequent first, of equals in alphabetical order."""
    return sorted(counter.items(), key=lambda item: (-item[1], item[0]))


def tags_of(caption: str) -> Iterator[str]:
    """Yield the tags of a caption: pieces between commas and line ends, without sentences."""
    return (piece for piece in pieces(caption) if len(piece) <= MAX_TAG)


def pieces(caption: str, delimiter: str = ",") -> list[str]:
    """Return the pieces between the delimiter, commas and line ends."""
    parts = re.split(rf"{re.escape(delimiter)}|[,\n]", caption)
    return [stripped for part in parts if (stripped := part.strip())]


def typos(tags: Mapping[str, int]) -> Iterator[Typo]:
    """Yield tags one edit away from a tag at least `TYPO_RATIO` times as frequent, with the most frequent such tag.

    Two texts within one edit (a letter more, less, changed, or two swapped) are equal after at most one letter is
    taken out of each: so neighbours are looked up, and no pair of unrelated tags is ever compared.
    """
    neighbours: dict[str, list[str]] = defaultdict(list)
    for tag, number in tags.items():
        if number >= TYPO_RATIO and len(tag) >= MIN_TYPO:
            for shorter in shortened(tag):
                neighbours[shorter].append(tag)
    for tag, number in sorted(tags.items()):
        if len(tag) < MIN_TYPO:
            continue
        near = {other for shorter in shortened(tag) for other in neighbours.get(shorter, ())}
        meant = [other for other in near if tags[other] >= TYPO_RATIO * number and one_edit(tag, other)]
        if meant:
            best = min(meant, key=lambda other: (-tags[other], other))
            yield Typo(tag, number, best, tags[best])


def shortened(tag: str) -> set[str]:
    """Return the tag, and the tag without each of its letters."""
    return {tag, *(tag[:place] + tag[place + 1 :] for place in range(len(tag)))}


def num_same(one: str, other: str) -> int:
    """Return the number of letters that are the same from the start on."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def one_edit(tag: str, other: str) -> bool:
    """Return True if one edit makes one tag of the other; not where digits differ, as in 1girl and 2girl."""
    start = num_same(tag, other)
    left, right = tag[start:], other[start:]
    end = num_same(left[::-1], right[::-1])
    left, right = left[: len(left) - end], right[: len(right) - end]
    if any(letter.isdigit() for letter in left + right):
        return False
    return max(len(left), len(right)) == 1 or (len(left) == 2 and left == right[::-1])


@dataclass(frozen=True)
class Missing:
    """The images of one directory that lack its trigger word, or what looks like one."""

    directory: int
    word: str
    is_set: bool  # trigger_word; else the first tag of most captions
    images: Sequence[str]

    @property
    def described(self) -> str:
        """The word, and the reason to expect it."""
        if self.is_set:
            return f"the trigger word {self.word}"
        return f"{self.word}, which begins most captions of this folder"


def caption_kinds(samples: Iterable[Sample]) -> dict[str, list[str]]:
    """Return the files of the pictures with captions of tags, of sentences and of both, as they are in the files."""
    pictures = {sample.picture.path: sample for sample in samples}  # once, not for every resolution
    kinds: dict[str, list[str]] = {"tags": [], "sentences": [], "both": []}
    for path, sample in pictures.items():
        texts = (*sample.picture.tags, *sample.picture.natural)
        for kind in {kind_of(text, sample.options.cache_shuffle_delimiter) for text in texts} - {"empty"}:
            kinds[kind].append(str(path))
    return kinds


def missing_words(samples: Iterable[Sample]) -> Iterator[Missing]:
    """Yield the directories with images that lack their trigger word, in any of their captions.

    Images for regularization need none.
    """
    directories: dict[int, dict[str, Sample]] = defaultdict(dict)
    for sample in samples:
        if sample.role == "train":  # once, not for every resolution
            directories[sample.directory].setdefault(str(sample.picture.path), sample)
    for directory, images in sorted(directories.items()):
        options = next(iter(images.values())).options
        tags = {
            path: [pieces(caption, options.cache_shuffle_delimiter) for caption in sample.plain_captions()]
            for path, sample in images.items()
        }
        word = options.trigger_word.strip()
        expected = word or common_first(tags.values())
        wanted = set(pieces(expected, options.cache_shuffle_delimiter))
        lacking = [path for path, captions in tags.items() if not any(wanted.issubset(caption) for caption in captions)]
        if lacking:
            yield Missing(directory, expected, bool(word), lacking)


def common_first(images: Iterable[Sequence[Sequence[str]]]) -> str:
    """Return the first tag of at least half of the images that have a caption; "" if there is none, or too few images.

    Args:
        images: the tags of each caption of each.
    """
    captioned = [first for captions in images if (first := {tags[0] for tags in captions if tags})]
    numbers = ranked(Counter(tag for first in captioned for tag in first if len(tag) <= MAX_TAG))
    if len(captioned) < MIN_CAPTIONED or not numbers or 2 * numbers[0][1] < len(captioned):
        return ""
    return numbers[0][0]
