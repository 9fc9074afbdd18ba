"""The reading of TOML files and --set into tables."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

from anima_train.config.paths import suggest
from anima_train.core.errors import ConfigError
from anima_train.core.settings import describe_value, quoted

Table = dict[str, Any]

MAX_DEPTH = 32
TOO_DEEP = f"{{}}: tables or lists stand in each other more than {MAX_DEPTH} deep, as in no configuration"


def read_toml(path: Path) -> Table:
    """Read a TOML file, with or without a BOM.

    Raises:
        ConfigError: missing (with the nearest name there is), not UTF-8, or a syntax error with line and column.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: does not exist{suggest(str(path), Path())}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = position(data[: error.start].decode(errors="replace"))
        found = f"found byte 0x{data[error.start]:02x} at line {line}, column {column}"
        raise ConfigError(f"{path}: {found}, expected text in UTF-8; save it in that encoding") from error
    try:
        return expect_shallow(tomllib.loads(text), str(path))
    except RecursionError as error:
        raise ConfigError(TOO_DEEP.format(path)) from error
    except ValueError as error:  # TOMLDecodeError, or an integer with thousands of digits
        message = str(error)
        line, column = position(text)
        message = message.replace("(at end of document)", f"(at line {line}, column {column}, the end of the file)")
        hint = ""
        if re.search(r"\\|escape|hex value", message, re.IGNORECASE):
            hint = r"; write Windows paths in single quotes: 'C:\models\anima.safetensors'"
        raise ConfigError(f"{path}: syntax error: {message}{hint}") from error


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
        reason = str(error).partition(" (at")[0]  # where in our own line means nothing to the user
        if key.endswith("api_key"):
            hint = "text needs quotes"
        elif value.lower() in ("true", "false"):
            hint = f"write {value.lower()}"
        else:
            hint = f"text needs quotes: --set {shlex.quote(f'{key}={quoted(value)}')}"
        raise ConfigError(f"--set {key}: the value is not TOML ({reason}); {hint}") from error
    if len(parsed) > 1:
        raise ConfigError(f"--set {key}: found several lines, expected one value")
    return parsed["value"]
