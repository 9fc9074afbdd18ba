"""`start`: the seconds until a command that does next to nothing is done, the median of several runs in turn."""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.timing import child_environment

TRAIN, TOOLS = "train_main", "main"  # the functions of `anima-train` and `anima`
REFUSED = 'adapter = { type = "lora", rnak = 16 }\n'


@dataclass(frozen=True)
class Command:
    """A command whose start is measured."""

    shown: str
    function: str
    arguments: tuple[str, ...]
    exit_code: int = 0


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the time of each command."""
    with tempfile.TemporaryDirectory() as name:
        config = Path(name) / "refused.toml"
        config.write_text(REFUSED, encoding="utf-8")
        commands = (
            Command("anima --help", TOOLS, ("--help",)),
            Command("anima --version", TOOLS, ("--version",)),
            Command("anima-train --help", TRAIN, ("--help",)),
            Command("anima-train refused.toml", TRAIN, (str(config),), exit_code=2),
        )
        rounds = [[seconds(command) for command in commands] for _ in range(options.rounds + 1)][1:]
    for command, times in zip(commands, zip(*rounds, strict=True), strict=True):
        yield {"command": command.shown, "seconds": round(statistics.median(times), 3)}


def seconds(command: Command) -> float:
    """Return the time that a command takes, by the clock on the wall.

    Raises:
        SystemExit: it ended as it should not.
    """
    code = f"from anima_train.cli.main import {command.function}; {command.function}()"
    started = time.perf_counter()
    found = subprocess.run(
        [sys.executable, "-c", code, *command.arguments], env=child_environment(), capture_output=True, check=False
    )
    taken = time.perf_counter() - started
    if found.returncode != command.exit_code:
        raise SystemExit(f"{command.shown} ended with {found.returncode}: {found.stderr.decode()}")
    return taken
