"""Pieces of a page that needs nothing from elsewhere, is readable without scripts and in the dark, and is harmless."""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape

from anima_train.core.format import printable

MAX_LINES = 200  # of one list

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --paper: #fff; --faint: #6b6b70; --line: #d9d9de; --bar: #4b7bec }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf0; --paper: #17171a; --faint: #9a9aa2; --line: #38383e; --bar: #6d93f2 }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1080px;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .6rem } h2 { border-bottom: 1px solid var(--line); padding-bottom: .3rem }
table { border-collapse: collapse } td, th { padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top }
th { color: var(--faint); font-weight: 500 } td.n { text-align: right; font-variant-numeric: tabular-nums }
td.b { width: 22rem; min-width: 8rem; vertical-align: middle }
.bar { height: .8rem; min-width: 1px; background: var(--bar); border-radius: 2px }
.note, figcaption { color: var(--faint); font-size: 13px } li { margin: .1rem 0 }
.pictures { display: flex; flex-wrap: wrap; gap: .8rem } figure { margin: 0; width: 160px }
figcaption { max-height: 4.6em; overflow: hidden }
"""


def text(value: object) -> str:
    """Anything as text that no browser takes for markup and no character of which is invisible."""
    return escape(printable(str(value)))


def document(title: str, parts: Iterable[str], style: str = "", script: str = "") -> str:
    """The whole page: the title, then the parts.

    The browser is told to load nothing, and to run no script but this one: its hash is in the page's policy.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    source = f"'sha256-{digest}'" if script else "'none'"
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {source}"
    code = f"<script>{script}</script>\n" if script else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<h1>{text(title)}</h1>\n"
        + "\n".join(parts)
        + f"\n{code}</body>\n</html>\n"
    )


def note(sentence: str) -> str:
    """A remark in small print."""
    return f'<p class="note">{text(sentence)}</p>'


def bulleted(title: str, lines: Sequence[object]) -> str:
    """A list with its title and number; nothing if it is empty."""
    if not lines:
        return ""
    items = "\n".join(f"<li>{text(line)}</li>" for line in lines[:MAX_LINES])
    more = note(f"... and {len(lines) - MAX_LINES:,} more") if len(lines) > MAX_LINES else ""
    return f"<h3>{text(title)}: {len(lines):,}</h3>\n<ul>\n{items}\n</ul>{more}"


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; numbers stand to the right."""
    lines = ["<tr>" + "".join(f"<th>{text(heading)}</th>" for heading in headings) + "</tr>"]
    for row in rows:
        cells = (f'<td class="n">{c:,}</td>' if isinstance(c, int) else f"<td>{text(c)}</td>" for c in row)
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def bars(rows: Sequence[tuple[str, int]]) -> str:
    """A line for each (label, number), with a bar; the longest is the largest number."""
    largest = max((number for _, number in rows), default=0) or 1
    lines = [
        f'<tr><td>{text(label)}</td><td class="n">{number:,}</td>'
        f'<td class="b"><div class="bar" style="width:{100 * number / largest:.1f}%"></div></td></tr>'
        for label, number in rows
    ]
    return "<table>\n" + "\n".join(lines) + "\n</table>"
