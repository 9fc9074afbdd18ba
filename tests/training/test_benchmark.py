"""`scripts/benchmark.py` prints values as JSON lines, and nothing beside them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCHMARK = Path(__file__).parents[2] / "scripts" / "benchmark.py"
SMALL = ["--width", "128", "--blocks", "1", "--side", "64", "--rank", "4", "--rounds", "1"]


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(BENCHMARK), *arguments], capture_output=True, text=True, check=False)


def lines(*arguments: str) -> list[dict]:
    found = benchmark(*arguments, "--json")
    assert found.returncode == 0, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()]


def test_step_gives_a_ratio_for_each_case():
    found = lines("step", "--cases", "eager,checkpointing", *SMALL)
    assert [line["case"] for line in found] == ["eager", "checkpointing"]
    assert all(line["ratio"] > 0 for line in found)
    assert found[1]["kept_ratio"] < found[0]["kept_ratio"] <= 1


def test_counts_gives_kernels_bytes_and_what_is_kept():
    found = {line.pop("case"): line for line in lines("counts", "--cases", "eager,checkpointing,int8,diffusers")}
    assert all(set(line) == {"kernels", "elementwise_gb", "kept_gib"} for line in found.values())
    assert found["eager"]["kernels"] < found["checkpointing"]["kernels"]
    assert found["checkpointing"]["kept_gib"] < 1 < found["eager"]["kept_gib"] < found["diffusers"]["kept_gib"]
    assert found["int8"]["kept_gib"] == pytest.approx(found["eager"]["kept_gib"], rel=0.01)
    assert found["int8"]["elementwise_gb"] > found["eager"]["elementwise_gb"]
    assert found["eager"]["elementwise_gb"] < found["diffusers"]["elementwise_gb"]


def test_start_gives_seconds_for_each_command():
    found = lines("start", "--rounds", "1")
    assert [line["command"] for line in found][:2] == ["anima --help", "anima --version"]
    assert all(0 < line["seconds"] < 60 for line in found)


def test_a_table_has_no_json_and_an_unknown_policy_is_refused():
    assert "no --json" in benchmark("vae", "--json").stderr
    refused = benchmark("step", "--cases", "magic", *SMALL)
    assert refused.returncode != 0
    assert '"magic"' in refused.stderr
    assert refused.stdout == ""
