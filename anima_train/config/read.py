"""The reading of TOML files and --set into tables."""

import re
import tomllib
from datetime import datetime
from pathlib import Path
from typing import Any

from anima_train.config.paths import suggest
from anima_train.config.syntax import SECRET, describe_error, other_format, pointed_at, value_advice
from anima_train.core.errors import ConfigError
from anima_train.core.settings import describe_value, quoted

Table = dict[str, Any]

MAX_DEPTH = 32
TOO_DEEP = f"{{}}: tables or lists stand in each other more than {MAX_DEPTH} deep, as in no configuration"
MAX_BYTES = 16 * 2**20
EXPECTED = "  expected TOML, a `key = value` in each line, as in configs/style_lora.toml"
UTF_16 = {"UTF-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"), "UTF-16": (b"\xff\xfe", b"\xfe\xff")}
SIGNATURES = {
    b"PK\x03\x04": "a zip archive, or a checkpoint in pickle",
    b"\x80\x02": "a pickle",
    b"\x80\x04": "a pickle",
    b"GGUF": "a GGUF model",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GIF8": "a picture",
    b"%PDF": "a PDF",
    b"\x1f\x8b": "a compressed file",
    b"\x7fELF": "a program",
}


def read_toml(path: Path) -> Table:
    """Read a TOML file, with or without a BOM.

    Raises:
        ConfigError: missing (with the nearest name there is), another kind of file, not UTF-8, or no TOML: with the
            line, and how it is written.
    """
    try:
        if path.is_dir():
            inside = path / "config.toml"
            remedy = f"; give the file, such as {inside}" if inside.is_file() else "; give the .toml file"
            raise ConfigError(f"{path}: is a folder{remedy}")
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        whole = Path(f"{path}.toml")
        remedy = f"; did you mean {quoted(str(whole))}?" if whole.is_file() else suggest(str(path), Path())
        raise ConfigError(f"{path}: does not exist{remedy}") from None
    except (OSError, ValueError) as error:  # a zero character in the name is a ValueError
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from error
    if (kind := foreign_kind(data)) is not None:
        raise ConfigError(f"{path}: {kind}\n{EXPECTED}")
    text = decode(path, data)
    try:
        return expect_shallow(tomllib.loads(text), str(path))
    except RecursionError as error:
        raise ConfigError(TOO_DEEP.format(path)) from error
    except ValueError as error:  # TOMLDecodeError, or an integer with thousands of digits
        if (name := other_format(text)) is not None:
            raise ConfigError(f"{path}: is {name}\n{EXPECTED}") from error
        raise ConfigError(f"{path}: {describe_error(text, error)}") from error


def foreign_kind(data: bytes) -> str | None:
    """Return what a file is that is no text, and what to do with it; None for what may be text."""
    if len(data) > MAX_BYTES and data[8:9] != b"{":
        return f"has more than {MAX_BYTES // 2**20} MiB, which no configuration has"
    if data[8:9] == b"{" and data[7:8] == b"\0":
        return "is a model or a LoRA, not a configuration, which names such files"
    for start, name in SIGNATURES.items():
        if data.startswith(start):
            return f"is {name}"
    return None


def decode(path: Path, data: bytes) -> str:
    """Return the text of a file in UTF-8.

    Raises:
        ConfigError: it is in another encoding, with the place.
    """
    encoding = next((name for name, marks in UTF_16.items() if data.startswith(marks)), None)
    if encoding is None and data[:400].count(0) > len(data[:400]) // 4:
        encoding = "UTF-16"
    if encoding is not None:
        raise ConfigError(
            f"{path}: is in {encoding}; save it as UTF-8 (Notepad: Save as, Encoding UTF-8;\n"
            f"  PowerShell: (Get-Content {path.name}) | Set-Content -Encoding utf8 {path.name})"
        )
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode(errors="replace")
        number, column = position(before)
        line = data.split(b"\n")[number - 1].decode(errors="replace")
        shown = "" if SECRET.search(line) else f"\n{pointed_at(line, column)}"
        raise ConfigError(
            f"{path}: line {number}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8{shown}"
        ) from error


def expect_shallow(value: Any, name: str) -> Any:
    """Return a value of TOML in which tables and lists are nested no deeper than `MAX_DEPTH`.

    Raises:
        ConfigError: they are nested deeper.
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        tables = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [inside for table in tables for inside in table]
    if level:
        raise ConfigError(TOO_DEEP.format(name))
    return value


def position(text: str) -> tuple[int, int]:
    """Return the line and column, each from 1, of what follows this text."""
    return text.count("\n") + 1, len(text) - text.rfind("\n")


def apply_override(data: Table, text: str) -> str:
    """Set one `key.path=value`, the value in TOML; return the path of the topmost thing that it set or made.

    Raises:
        ConfigError: no `=`, a value that is no TOML, or a path through something that is no table.
    """
    key, equals, value = (part.strip() for part in text.partition("="))
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise ConfigError(f"--set {quoted(text)}: expected KEY.PATH=VALUE, such as --set adapter.rank=16")
    if re.search(r"\[|\.\d+(\.|$)", key):
        raise ConfigError(
            f"--set {key}: entries of a list cannot be set one by one; set the whole list, or edit the file"
        )
    if len(parts) > MAX_DEPTH:
        raise ConfigError(TOO_DEEP.format(f"--set {parts[0]}"))
    parsed = expect_shallow(parse_value(key, value), f"--set {key}")
    table, top = data, ""
    for depth, part in enumerate(parts[:-1], start=1):
        if part not in table:
            top = top or ".".join(parts[:depth])
            table[part] = {}
        if not isinstance(table[part], dict):
            inside = ".".join(parts[:depth])
            remedy = "edit the file it names" if part == "dataset" else "set it whole, or edit the file"
            raise ConfigError(f"--set {key}: {inside} is {describe_value(table[part])}, expected a table; {remedy}")
        table = table[part]
    table[parts[-1]] = parsed
    return top or ".".join(parts)


def parse_value(key: str, value: str) -> Any:
    """Return the TOML value after `key=`.

    Raises:
        ConfigError: no value, or several lines; with the text as it should have been written.
    """
    try:
        parsed = tomllib.loads(f"value = {value}")
    except RecursionError as error:
        raise ConfigError(TOO_DEEP.format(f"--set {key}")) from error
    except ValueError as error:
        hint = "text needs quotes" if SECRET.search(key) else value_advice(key, value)
        raise ConfigError(f"--set {key}: the value is not TOML; {hint}") from error
    if len(parsed) > 1:
        raise ConfigError(f"--set {key}: found several lines, expected one value")
    return parsed["value"]


def name_by_time(path: Path) -> str:
    """Return a name for a run of a configuration that gives it none."""
    # Files have the name with a step number and a temporary suffix, in at most 255 bytes.
    stem = path.stem.encode(errors="replace")[:130].decode(errors="ignore")
    return f"{stem}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"


def replace_tables(data: Table) -> dict[str, Any]:
    """Return a main table in which paths stand for the datasets that are tables."""
    data = {key: "" if key == "dataset" and isinstance(value, dict) else value for key, value in data.items()}
    if isinstance(entries := data.get("eval_datasets"), list):
        data["eval_datasets"] = [
            entry | {"config": ""} if isinstance(entry, dict) and isinstance(entry.get("config"), dict) else entry
            for entry in entries
        ]
    return data
