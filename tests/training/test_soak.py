"""The long run of `scripts/benchmark.py`: it looks at what a process holds, and fails where that grows."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("benchmark", REPO / "scripts" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark"] = module  # where dataclasses look for it
    yield spec.loader.exec_module(module) or module
    del sys.modules["benchmark"]


def looks(benchmark, megabytes=lambda step: 400.0, descriptors=lambda step: 6):
    return [
        benchmark.Look(step, int(megabytes(step) * 1e6), descriptors(step), 10, step) for step in range(1, 101)
    ]  # fmt: skip


def test_a_run_that_stays_as_it_is_passes_whatever_it_did_at_first(benchmark, capsys):
    benchmark.judge(looks(benchmark, lambda step: 300 if step < 25 else 400 + step % 3), 100)
    assert re.search(r"memory: [+-]0\.0\d%", capsys.readouterr().out)


@pytest.mark.parametrize(
    "grows", [{"megabytes": lambda step: 400 + step * 0.2}, {"descriptors": lambda step: 6 + step // 40}]
)
def test_growth_of_memory_or_descriptors_fails(benchmark, grows):
    with pytest.raises(SystemExit, match="it grows"):
        benchmark.judge(looks(benchmark, **grows), 100)


@pytest.mark.slow
def test_a_run_of_the_tiny_model_holds_no_more_files_at_its_end(benchmark, command):
    """Its memory is judged by the 2,000 steps of the script alone: allocators settle in hundreds of steps."""
    result = command([sys.executable, str(REPO / "scripts" / "benchmark.py"), "soak", "--steps", "200"])
    rows = re.findall(r"^ *([\d,]+) +([\d,]+) +([\d.]+) +(\d+) +(\d+) +([\d,]+)$", result.stdout, re.MULTILINE)
    assert len(rows) == 4, result.stderr
    assert rows[3][0] == "200"
    before, after = re.search(r"descriptors: (\d+) in the second quarter, (\d+) in the last", result.stdout).groups()
    assert int(after) <= int(before)
    assert re.search(r"memory: [+-]\d+\.\d\d% from the second quarter", result.stdout)
