"""The long run of `scripts/benchmark.py`: it looks at what a process holds, and fails where that grows."""

import importlib
import re
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def soak():
    """The benchmark as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPO / "scripts"))
        yield importlib.import_module("benchmarks.soak")


def looks(soak, megabytes=lambda step: 400.0, descriptors=lambda step: 6):
    return [
        soak.Look(step, int(megabytes(step) * 1e6), descriptors(step), 10, step) for step in range(1, 101)
    ]  # fmt: skip


def test_a_run_that_stays_as_it_is_passes_whatever_it_did_at_first(soak, capsys):
    soak.judge(looks(soak, lambda step: 300 if step < 25 else 400 + step % 3), 100)
    assert re.search(r"memory: [+-]0\.0\d%", capsys.readouterr().out)


@pytest.mark.parametrize(
    "grows", [{"megabytes": lambda step: 400 + step * 0.2}, {"descriptors": lambda step: 6 + step // 40}]
)
def test_growth_of_memory_or_descriptors_fails(soak, grows):
    with pytest.raises(SystemExit, match="it grows"):
        soak.judge(looks(soak, **grows), 100)


@pytest.mark.slow
def test_a_run_of_the_tiny_model_holds_no_more_files_at_its_end(soak, command):
    """Its memory is judged by the 2,000 steps of the script alone: allocators settle in hundreds of steps."""
    result = command([sys.executable, str(REPO / "scripts" / "benchmark.py"), "soak", "--steps", "200"])
    rows = re.findall(r"^ *([\d,]+) +([\d,]+) +([\d.]+) +(\d+) +(\d+) +([\d,]+)$", result.stdout, re.MULTILINE)
    assert len(rows) == 4, result.stderr
    assert rows[3][0] == "200"
    before, after = re.search(r"descriptors: (\d+) in the second quarter, (\d+) in the last", result.stdout).groups()
    assert int(after) <= int(before)
    assert re.search(r"memory: [+-]\d+\.\d\d% from the second quarter", result.stdout)
