"""The parts of a caption: lines and sentences, which stay as they are, and runs of tags, which may vary."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

# Words that tell a sentence from tags; "the" in small letters also begins names, so it counts further inside only.
SENTENCE_WORDS = frozenset(
    ("a", "an", "the", "is", "are", "was", "were", "has", "have", "her", "his", "its", "their", "she", "he", "it",
     "they", "this", "that", "there", "which", "who", "while")
)  # fmt: skip
ARTICLES = frozenset(("a", "an", "the"))
WORD = re.compile("[a-z]+")
END = re.compile(r"([.!?…]+[\"'”’»)\]]*(?=[\s,;]|$)|[。！？]+[」』”）]*)")  # of a sentence
JOINER = re.compile(r"\s*[,;]?\s*")  # between a sentence and what follows it
# Words before a full stop that ends no sentence: always, or where a small letter follows.
TITLE = re.compile(r"\b(?:dr|mr|mrs|ms|st|prof)$", re.IGNORECASE)
SHORTENED = re.compile(r"\b(?:[a-z](?:\.[a-z])+|etc|vs|approx|incl)$", re.IGNORECASE)
QUOTES = "\"'“”‘’"
OPEN_QUOTE = re.compile(r'(?:^|[\s:(])"')
NUM_WORDS = 4  # a clause of so many words, on average, is long: tags seldom have more than three
MAX_TAG_WORDS = 6
MAX_ABBREVIATION = 2  # words of a piece like "Mr." that belongs to the sentence behind it


@dataclass(frozen=True, slots=True)
class Part:
    """A run of sentences, or of tags."""

    text: str
    is_prose: bool
    joiner: str = ""  # that stands behind it: a line end, a blank, a comma


def caption_parts(caption: str, delimiter: str) -> list[Part]:
    """Return the caption's parts in their order; put together, with their joiners, they are the caption again.

    A line end always ends a part. Within a line a sentence ends at a full stop, a question or an exclamation mark; what
    reads as prose is prose to its end, and neighbouring pieces of one kind are one part. In doubt a piece is prose,
    because torn sentences do more harm than tags that stay in their places.

    Args:
        caption: with line feeds as line ends.
        delimiter: that separates tags.
    """
    parts: list[Part] = []
    lines = re.split(r"(\n\s*)", caption)  # line ends at odd places
    for place in range(0, len(lines), 2):
        line = list(line_parts(lines[place], delimiter))
        if place + 1 < len(lines) and line:
            line[-1] = replace(line[-1], joiner=line[-1].joiner + lines[place + 1])
        elif place + 1 < len(lines):
            line = [Part("", True, lines[place + 1])]
        parts.extend(line)
    return parts


def kind_of(caption: str, delimiter: str) -> Literal["tags", "sentences", "both", "empty"]:
    """Return what a caption is made of."""
    kinds = {part.is_prose for part in caption_parts(caption, delimiter) if part.text.strip()}
    if not kinds:
        return "empty"
    return "both" if len(kinds) == 2 else "sentences" if kinds == {True} else "tags"


def line_parts(line: str, delimiter: str) -> Iterator[Part]:
    """Yield the parts of one line."""
    if line and END.search(line) is None and SENTENCE_WORDS.isdisjoint(WORD.findall(line.lower())):  # as most are
        yield Part(line, False)
        return
    merged: list[Part] = []
    for piece in pieces_of(line):
        for part in with_tags_in_front(piece, delimiter, after_prose=bool(merged) and merged[-1].is_prose):
            before = merged[-1] if merged else None
            if before is not None and part.is_prose and is_abbreviation(before):
                before = replace(before, is_prose=True)
            if before is not None and before.is_prose == part.is_prose:
                merged[-1] = Part(before.text + before.joiner + part.text, part.is_prose, part.joiner)
            else:
                merged.append(part)
    yield from merged


def pieces_of(line: str) -> Iterator[Part]:
    """Yield a line cut behind each mark that may end a sentence; what each piece is, is open."""
    start = 0
    for end in END.finditer(line):
        if end.start() < start or is_shortened(line, end):
            continue
        joiner = JOINER.match(line, end.end())
        assert joiner is not None
        yield Part(line[start : end.end()], False, joiner[0])
        start = joiner.end()
    if line[start:]:
        yield Part(line[start:], False)


def is_shortened(line: str, end: re.Match[str]) -> bool:
    """Return True if a mark is the full stop of a shortened word, as in `Dr. Smith` or `e.g. a hat`."""
    before, behind = line[: end.start()], line[end.end() :].lstrip()
    if end[1] != ".":
        return False
    return TITLE.search(before) is not None or (SHORTENED.search(before) is not None and behind[:1].islower())


def with_tags_in_front(piece: Part, delimiter: str, after_prose: bool) -> Iterator[Part]:
    """Yield a piece as tags, as prose, or as at least two tags and the sentence behind them."""
    clauses = piece.text.split(delimiter)
    first = 0
    while first < len(clauses) and is_tag(clauses[first]):
        first += 1
    if 2 <= first < len(clauses) and is_prose(delimiter.join(clauses[first:]), False):
        yield Part(delimiter.join(clauses[:first]), False, delimiter)
        yield Part(delimiter.join(clauses[first:]), True, piece.joiner)
    else:
        yield replace(piece, is_prose=is_prose(piece.text, after_prose))


def is_prose(text: str, after_prose: bool) -> bool:
    """Return True if a piece reads as prose: it ends as a sentence does, or its clauses are long, and has its words."""
    clauses = [clause.split() for clause in re.split("[,;]", text)]
    longest, mean = max(map(len, clauses)), sum(map(len, clauses)) / len(clauses)
    found = [sentence_words(clause) for clause in clauses]
    in_long = [words for words, clause in zip(found, clauses, strict=True) if len(clause) > 2]
    ending = END.search(text.rstrip(), max(0, len(text.rstrip()) - 8))
    if ending is None or ending.end() != len(text.rstrip()):
        # As in "a girl in red, her hair wet" or "She is here, smiling"; "sitting on a chair", a tag, has one such word.
        begins = len(clauses[0]) > 2 and bool(sentence_words(clauses[0][:1])) and sum(map(len, in_long)) > 1
        return any(in_long) and (mean >= NUM_WORDS or begins or any(len(set(words)) > 1 for words in in_long))
    short = [set(words) for words, clause in zip(found, clauses, strict=True) if len(clause) == 2]
    has_words = any(in_long) or any(words - ARTICLES for words in short)
    begins_large = text.lstrip(f" {QUOTES}")[:1].isupper()
    is_full_width = ending[1][0] in "。！？"
    return after_prose or has_words or is_full_width or (begins_large and longest >= NUM_WORDS) or mean >= 2 * NUM_WORDS


def sentence_words(clause: list[str]) -> list[str]:
    """Return the words of a clause, in small letters, that sentences have, and tags do not."""
    plain = [word.lower().strip(f"{QUOTES}(") for word in clause]
    is_name = clause[:1] == ["the"]
    return [word for word in plain[1 if is_name else 0 :] if word in SENTENCE_WORDS]


def is_tag(clause: str) -> bool:
    """Return True if a clause can only be a tag: short, in small letters, without a word that sentences have."""
    words = clause.split()
    return len(words) <= MAX_TAG_WORDS and not clause.lstrip()[:1].isupper() and not sentence_words(words)


def is_abbreviation(part: Part) -> bool:
    """Return True for a piece such as "No.", whose mark ends no sentence, or for what somebody says in one."""
    if part.text[:1] in QUOTES and part.text[-1:] in QUOTES and part.joiner == " ":
        return True
    is_short = len(part.text.split()) <= MAX_ABBREVIATION and "," not in part.text
    return not part.is_prose and is_short and part.text[:1].isupper() and part.joiner == " "


def map_tags(caption: str, delimiter: str, change: Callable[[list[str]], list[str]]) -> str:
    """Return the caption with the tags of each run of tags changed; prose and line ends stay.

    Empty tags vanish. A run that has no tag left is left out, together with what joins it to the next part. A first
    line of one word or name, as `ye-pop`, which names the dataset that pictures are from, stays too.

    Args:
        caption: as `caption_parts` takes it.
        delimiter: that separates tags.
        change: of the tags of one run to those that stay, in their order.
    """
    parts = caption_parts(caption, delimiter)
    found: list[Part] = []
    for part in parts:
        is_dataset = part is parts[0] and len(parts) > 1 and "\n" in part.joiner and delimiter not in part.text
        if part.is_prose or is_dataset:
            found.append(part)
        elif tags := change(tags_in(part.text, delimiter)):
            found.append(replace(part, text=delimiter.join(tags)))
    if not found:
        return ""
    return "".join(part.text + part.joiner for part in found[:-1]) + found[-1].text


def tags_in(text: str, delimiter: str) -> list[str]:
    """Return the tags of a run of tags, without empty ones and without a delimiter at the end.

    What stands in quotation marks is one tag, with its commas.
    """
    mark = delimiter.strip()
    text = text.rstrip().removesuffix(mark) if mark else text
    tags: list[str] = []
    is_open = False
    for piece in text.split(delimiter):
        if is_open:
            tags[-1] += delimiter + piece
            is_open = '"' not in piece
        else:
            tags.append(piece)
            is_open = OPEN_QUOTE.search(piece) is not None and piece.count('"') == 1
    if is_open:  # it is never closed: a mark like any other
        return [tag for tag in text.split(delimiter) if tag.strip(mark + " \n\t" if mark else None)]
    return [tag for tag in tags if tag.strip(mark + " \n\t" if mark else None)]


def tags_of(caption: str, delimiter: str) -> list[str]:
    """Return the tags of a caption, without its sentences."""
    return [
        tag for part in caption_parts(caption, delimiter) if not part.is_prose for tag in tags_in(part.text, delimiter)
    ]
