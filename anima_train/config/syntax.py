"""The help with a line that is no TOML: the line itself, where reading stopped, and how it is written.

Repairs are tried on the line alone, one after the other, and the first whose result is TOML is shown: a wrong advice
would be worse than none.
"""

import json
import re
import shlex
import tomllib
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from anima_train.core.format import printable
from anima_train.core.settings import quoted

WIDTH = 72  # columns of a line that are shown
SECRET = re.compile(r"api_?key|token\b|password|secret", re.IGNORECASE)  # max_caption_tokens is none
STATEMENT = re.compile(r"\s*([\w.\"'-]+)\s*=\s*(.*?)\s*")
OPEN_TABLE = re.compile(r"\s*([\w.-]+)\s*=\s*\{[^}]*")
QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'")
BACKSLASHED = re.compile(r"\"([^\"']*\\[^\"']*)\"")
MISSING_COMMA = re.compile(QUOTED.pattern + r"|(?<=[\w\"'\]}])\s+(?=[\w\"'\[{.-])")
ITEM = re.compile(  # of a list: a table, a list, a text, or what stands between commas
    r"\{[^}]*\}|\[[^\[\]]*\]|(?:\"(?:[^\"\\]|\\.)*\"|\"[^\"]*\"|'[^']*')(?=\s*(?:,|$)|\s+[\"'{\[])"
    r"|[^,\s\[\]{}][^,\[\]{}]*"
)
LISTS_OF_TABLES = ("directory", "eval_datasets", "prompt")
BACKSLASH = "a text with a backslash stands in single quotes"
NOTHING = ("none", "null", "nil", "~")
LOOKALIKES = str.maketrans("＝，［］｛｝．＃−–：\u200b\ufeff\u2060", "=,[]{}.#--:   ")
SMART_QUOTES = str.maketrans("“”„‟«»″〝〞‘’‚‛‹›′`", '"' * 9 + "'" * 8)

Repairs = Sequence[tuple[str, str, str]]  # what is wrong, the pattern that the whole text matches, what to write

# Of a line; each goes on with what the one before made of it.
LINE_REPAIRS: Repairs = (
    ("comments begin with #", r"(?://|;|-- |%|REM |<!--)\s*(.*)", r"# \1"),
    ("comments begin with #", r"(.*\S)\s+(?://|;)\s.*", r"\1"),
    ("flags become keys", r"--([\w-]+)[ =]\s*(\S.*)", r"\1 = \2"),
    ("flags become keys", r"--([\w-]+)", r"\1 = true"),
    ("keys stand on lines of their own, without commas", r"(.*\S)\s*[,;](?:\s*#.*)?", r"\1"),
    ("headings of tables are in brackets", r"\[+\s*([\w.-]+)\s*\]*:?|([\w.-]+)(?:\]+|:)", r"[\1\2]"),
    ("keys and values are parted by =", r"[\"']?([\w.-]+)[\"']?\s*:\s*([^=].*)", r"\1 = \2"),
    ("keys and values are parted by =", r"([\w.-]+)\s*(?:==|:=|=>|\+=)\s*(.*)", r"\1 = \2"),
    ("nothing stands in front of a key", r"(?:let |const |export |set |\$|- )\s*(\S.*)", r"\1"),
    *(("keys have no blanks", r"(\w+) (\w[\w ]*?)\s*=\s*(.*)", r"\1_\2 = \3"),) * 3,  # a blank each
    ("the = is missing", r"([A-Za-z_][\w.-]*)[ \t]+([\"'].*|[^=\s][^=]*)", r"\1 = \2"),
)
# Of the value behind a key, or an item of a list; each by itself.
VALUE_REPAIRS: Repairs = (
    ("true and false are in small letters", r"(?i:true|yes|on)", "true"),
    ("true and false are in small letters", r"(?i:false|no|off)", "false"),
    ("several values are a list", r"([\d.]+(?:,\s+[\d.]+)+|\d{3,},\d{3,})", r"[\1]"),
    ("several values are a list", r"(\d+)[x×](\d+)", r"[\1, \2]"),
    ("a number has no commas", r"([1-9]\d{0,2}),(\d{3})(?:,(\d{3}))?", r"\1\2\3"),
    ("the decimal sign is a point", r"([-+]?\d+),(\d+(?:[eE][-+]?\d+)?)", r"\1.\2"),
    ("a number begins with a digit", r"([-+]?)\.(\d\S*)", r"\g<1>0.\2"),
    ("a point has digits on both sides", r"([-+]?\d+)\.([eE]\S+)?", r"\1.0\2"),
    ("a number does not begin with 0", r"([-+]?)0+(\d[\d.eE+-]*)", r"\1\2"),
    ("a number has no unit", r"([\d.]+(?:[eE][-+]?\d+)?)\s*(?:f|px|pixels|steps|epochs|images|minutes|Gi?B)", r"\1"),
    ("a number has no unit", r"(\d+)\s*[kK]", r"\g<1>000"),
    ("a number has no blanks", r"(\d{1,3}) (\d{3})", r"\1\2"),
    ("powers of ten are written with e", r"([\d.]+)\s*[*x×]\s*10\s*(?:\^|\*\*)\s*(-?\d+)", r"\1e\2"),
    ("powers of ten are written with e", r"10\s*(?:\^|\*\*)\s*(-?\d+)", r"1e\1"),
    ("lists are in square brackets", r"\((.*)\)", r"[\1]"),
    ("the bracket is not closed", r"(\[.*[^\]])", r"\1]"),
    ("the bracket is not closed", r"(\[\[.*\])", r"\1]"),
    ("the bracket is not closed", r"(\{.*[^}])", r"\1 }"),
    (BACKSLASH, r"\"([^\"']*\\[^\"']*)\"?|([^\"'\[{][^\"']*\\[^\"']*)", r"'\1\2'"),
    ("a text has the same quote at both ends", r"\"([^\"']*)'|'([^\"']*)\"", r'"\1\2"'),
    ("the quote is not closed", r"(\"[^\"]*)", r'\1"'),
    ("the quote is not closed", r"('[^']*)", r"\1'"),
    ("the quote is not opened", r"([^\"']*)[\"']", r'"\1"'),
    ("a text with quotes in it has the other kind around it", r"\"([^']*)\"", r"'\1'"),
    ("a text with quotes in it has the other kind around it", r"'([^\"]*)'", r'"\1"'),
)


def describe_error(text: str, error: ValueError) -> str:
    """Return what is wrong with a text that is no TOML, in up to three lines: the advice, the line, and a caret.

    Args:
        text: of the file.
        error: what tomllib said about it.
    """
    message = str(error)
    lines = text.split("\n")
    match = re.search(r"\(at line (\d+), column (\d+)\)", message)
    if match is None and "at end of document" not in message:  # an integer with thousands of digits
        return f"syntax error: {message[:100]}"
    number, column = (int(match[1]), int(match[2])) if match else (len(lines), len(lines[-1]) + 1)
    reason = message.partition(" (at ")[0]
    line = lines[number - 1] if number <= len(lines) else ""
    advice = block_advice(lines, number, reason) or line_advice(line) or f"{reason[:1].lower()}{reason[1:]}"
    is_shown = line.strip() and not SECRET.search(line)
    return f"line {number}: {advice}" + (f"\n{pointed_at(line, column)}" if is_shown else "")


def pointed_at(line: str, column: int) -> str:
    """Return a line with a caret below its column, both cut to what a terminal shows."""
    start = max(0, min(column - 1 - WIDTH // 2, len(line) - WIDTH))
    part = "".join(letter if letter.isprintable() else " " for letter in line[start : start + WIDTH])
    before = part[: column - 1 - start]
    margin = sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in before)
    return f"  {part}\n  {' ' * margin}^"


def line_advice(line: str) -> str | None:
    """Return how a line is written, by the first repair that makes it TOML; None if none does."""
    if SECRET.search(line):
        key = re.match(r"[\s\"']*([\w.-]*)", line)
        return f'text needs quotes: {key[1] if key else ""} = "..."'
    if is_toml(line):  # by itself: what is wrong is before it
        return None
    for reason, repaired in repairs(line):
        if is_toml(repaired):
            return f"{reason}: {printable(shortened(repaired))}"
    return None


def value_advice(key: str, value: str) -> str:
    """Return what is wrong with the value of `key=value` from the command line, and the argument to write."""
    found = (each for each in value_repairs(plain_letters(value)) if is_toml(f"a = {each[1]}"))
    reason, repaired = next(found, ("text needs quotes", quoted(value)))
    parsed = tomllib.loads(f"a = {repaired}")["a"]
    if isinstance(parsed, str):
        reason, repaired = "text needs quotes", quoted(parsed)  # double ones, which a shell leaves alone in single ones
    return f"{reason}: --set {shlex.quote(f'{key}={repaired}')}"


def is_toml(text: str) -> bool:
    """Return True if a text is TOML by itself."""
    try:
        tomllib.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def repairs(line: str) -> Iterator[tuple[str, str]]:
    """Yield (what is wrong, the line without it), for a line as it stands, and as each repair of it leaves it."""
    forms = list(line_repairs(line))
    for reason, form in forms:
        if reason:
            yield reason, form
        yield from ((reason or why, repaired) for why, repaired in with_values(form, value_repairs))
    for reason, form in reversed(forms):
        yield from ((reason or why, repaired) for why, repaired in with_values(form, as_text))


def line_repairs(line: str) -> Iterator[tuple[str, str]]:
    """Yield ("", the line as it stands), and (what is wrong with it, the line) for each repair that fits."""
    plain = plain_letters(line)
    straight = plain.translate(SMART_QUOTES)
    reason = "quotes must be straight" if straight != plain else ""
    if plain != line.strip():
        reason = reason or "letters that only look like those of TOML"
    yield reason, straight
    for why, pattern, replacement in LINE_REPAIRS:
        if match := re.fullmatch(pattern, straight):
            straight = match.expand(replacement)
            if (name := straight.strip("[]")) in LISTS_OF_TABLES:
                straight = f"[[{name}]]"
            yield reason or why, straight


def plain_letters(line: str) -> str:
    """Return a line with TOML's signs and blanks in the place of those that look like them."""
    blanked = "".join(" " if unicodedata.category(letter) == "Zs" else letter for letter in line)
    return blanked.translate(LOOKALIKES).strip()


def with_values(line: str, change: Callable[[str], Iterator[tuple[str, str]]]) -> Iterator[tuple[str, str]]:
    """Yield (what is wrong, `key = value` with a changed value), for a line of that form."""
    if statement := re.fullmatch(STATEMENT, line):
        key, value = statement.groups()
        without_comment = value.partition(" #")[0].rstrip()
        for each in dict.fromkeys((without_comment, value)):
            yield from ((why, f"{key} = {changed}") for why, changed in change(each))


def as_text(value: str) -> Iterator[tuple[str, str]]:
    """Yield a value in quotes, if it may be meant as text."""
    if value[:1].isalpha() or value[:1] in ("/", ".", "~", "_", "@"):
        yield "text needs quotes", quoted(value)


def value_repairs(value: str, is_item: bool = False) -> Iterator[tuple[str, str]]:
    """Yield (what is wrong, the value without it), for a value that is not TOML."""
    for why, pattern, replacement in VALUE_REPAIRS:
        if match := re.fullmatch(pattern, value):
            yield why, match.expand(replacement)
    if value.startswith(("{", "[")):
        yield BACKSLASH, BACKSLASHED.sub(in_single_quotes, value)
    if value.startswith("{"):
        pairs = re.sub(r"[\"']?([\w-]+)[\"']?\s*:\s*(?![\\/])", r"\1 = ", BACKSLASHED.sub(in_single_quotes, value))
        yield "keys and values are parted by =", pairs
        yield "a table in braces ends without a comma", re.sub(r",\s*\}", " }", pairs)
    elif value.startswith("[") and not is_item:
        yield "values are parted by commas", MISSING_COMMA.sub(lambda found: found[0].strip() or ", ", value)
        inside = value.removeprefix("[").removesuffix("]")
        if not ITEM.sub("", inside).strip(", \t"):
            items = [mended_item(item.strip()) for item in ITEM.findall(inside)]
            why = next((why for why, _ in items if why), "values are parted by one comma each")
            yield why, f"[{', '.join(item for _, item in items)}]"


def in_single_quotes(found: re.Match[str]) -> str:
    """Return a text of `BACKSLASHED` in single quotes, if its backslashes are meant as such."""
    return f"'{found[1]}'" if has_plain_backslash(found[1]) else found[0]


def has_plain_backslash(text: str) -> bool:
    """Return True if a text in double quotes has a backslash that escapes neither a quote nor a backslash."""
    return "\\" in re.sub(r"\\[\\\"]", "", text)


def mended_item(item: str) -> tuple[str, str]:
    """Return (what is wrong, the item of a list as it is written); nothing is wrong with most."""
    candidates = chain(value_repairs(item, is_item=True), as_text(item))
    found = (each for each in candidates if is_toml(f"a = {each[1]}"))
    is_right = is_toml(f"a = {item}") and (item.startswith("'") or not has_plain_backslash(item))
    return ("", item) if is_right else next(found, ("", item))


def shortened(line: str) -> str:
    """Return a line without what is behind its first columns."""
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def block_advice(lines: list[str], number: int, reason: str) -> str | None:
    """Return the advice about a mistake that does not show in a line alone; None if it is none of these."""
    line = lines[number - 1] if number <= len(lines) else ""
    if re.match(r"<<<<<<<|=======|>>>>>>>", line):
        return "the mark of a merge that was not finished; keep one of its two sides"
    if statement := STATEMENT.fullmatch(line):
        value = statement[2].partition("#")[0].strip()
        if not value or value.lower() in NOTHING:
            return f"{statement[1]} has no value; write one behind the =, or leave the key out"
    if any(word in reason.lower() for word in ("overwrite", "twice", "immutable")):
        return repetition(lines, number)
    opened = number if re.fullmatch(OPEN_TABLE, line) else opened_before(lines, number)
    if opened is not None:
        if table := re.fullmatch(OPEN_TABLE, lines[opened - 1]):
            return f"a table in braces stands on one line; on several, write [{table[1]}] and its keys below"
        return f"the list that begins in line {opened} is not closed with ], or lacks a comma"
    for mark in ('"""', "'''"):
        if lines[-1:] and number == len(lines) and "\n".join(lines).count(mark) % 2:
            first = next(index for index, each in enumerate(lines, 1) if mark in each)
            return f"a text in three quotes is not closed; the first of them begins in line {first}"
    return None


def repetition(lines: list[str], number: int) -> str | None:
    """Return the advice about a key or a table in line `number` that is there already."""
    line = lines[number - 1]
    key = line.partition("=")[0].strip() if "=" in line else line.strip()
    same = [index for index, each in enumerate(lines[: number - 1], 1) if each.partition("=")[0].strip() == key]
    before = f", after line {same[-1]}" if same else ""
    top = key.partition(".")[0]
    in_braces = re.compile(rf"\s*{re.escape(top)}\s*=\s*\{{")
    braces = next((index for index, each in enumerate(lines[: number - 1], 1) if in_braces.match(each)), None)
    if "=" in line and top != key and braces is not None:
        return f"{printable(key)[:40]} belongs into the braces of {printable(top)[:40]}, in line {braces}"
    if "=" in line:
        return f"{printable(key)[:40]} stands here a second time{before}; keep one of the two"
    name = key.strip("[] ")
    if name in LISTS_OF_TABLES:
        return f"for more than one write [[{name}]] each time, the first time too"
    return f"the table [{printable(name)[:40]}] begins here a second time{before}; keep one heading"


def opened_before(lines: list[str], number: int) -> int | None:
    """Return the earlier line in which a list or a table begins that is still open in line `number`, or None."""
    depths = ""
    for index in range(number - 1, 0, -1):
        line = re.sub(r"#.*", "", QUOTED.sub("", lines[index - 1]))
        depths = line + depths
        if re.match(r"\s*[\w.\"'-]+\s*=\s*[\[{]", line):
            is_open = any(depths.count(left) > depths.count(right) for left, right in ("[]", "{}"))
            return index if is_open else None
        if re.match(r"\s*\[+[A-Za-z]", line):
            return None
    return None


def other_format(text: str) -> str | None:
    """Return the format of a text that is not meant as TOML at all, or None."""
    start = text.lstrip()
    if start.startswith(("{", "[{")):
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return "JSON" if re.match(r"[\[{]\s*\"", start) else None
        return "JSON"
    if re.match(r"---\s|%YAML", start) or yaml_share(text) > 0.5:
        return "YAML"
    if re.match(r"#!|import |from \w+ import |def ", start):
        return "a program"
    return "a web page" if re.match(r"<\?xml|<!DOCTYPE|<html", start, re.IGNORECASE) else None


def yaml_share(text: str) -> float:
    """Return the share of the lines that are written as in YAML."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    as_yaml = [line for line in lines if re.match(r"\s*(- |[\w.\"'-]+:(\s|$))", line)]
    return len(as_yaml) / len(lines) if lines else 0.0
