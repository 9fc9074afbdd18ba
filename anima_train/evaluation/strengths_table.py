"""The record of an adapter at several strengths as a table; read without torch."""

from collections.abc import Mapping, Sequence
from itertools import compress
from statistics import fmean
from typing import Any


def strengths_table(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of a record: differences from the base with their larger standard error, drift, and
    the mean score of the pictures.

    Raises:
        LookupError, TypeError, ValueError: it is damaged.
    """
    columns: list[tuple[str, str, tuple[str, ...]]] = []  # heading, format, the keys of which the largest number counts
    for each in record["sets"]:
        change = f"{each['name']}/difference_from_base"
        columns += [
            (f"{each['name']} ({each['role']})", "+.5f", (change,)),
            ("standard error", ".5f", (f"{change}_stderr", f"{change}_stderr_kinds")),
            (f"at {each['highest_level']}", "+.5f", (f"{change}_{each['highest_level']}",)),
            ("drift, relative", ".5f", (f"{each['name']}/drift_relative",)),
        ]
    judge = next((str(row["judge"]) for row in record["strengths"] if "judge" in row), "")
    rows = []
    for row in record["strengths"]:
        cells = [f"{row['strength']:g}"]
        for _, style, keys in columns:
            found = [row["metrics"][key] for key in keys if key in row["metrics"]]
            cells.append(format(max(found), style) if found else "")
        rows.append([*cells, f"{fmean(row['scores']):.4g}" if "judge" in row else ""])
    is_known = [any(column) for column in zip(*rows, strict=True)]
    headings = ["strength", *(heading for heading, *_ in columns), judge]
    return list(compress(headings, is_known)), [list(compress(row, is_known)) for row in rows]


def table_lines(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as lines of text."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (headings, *rows)
    ]
