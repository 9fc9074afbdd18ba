"""`scripts/gpu_check.py` runs to its end on a CPU, and one part of it that fails does not stop the others."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
SCRIPT = REPO / "scripts" / "gpu_check.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look for their module there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_check"]


@pytest.mark.slow
def test_a_part_that_fails_is_told_with_its_reason(script):
    found = script.measured(script.Part("no such part", 60), smoke=True, seconds=60)
    assert found["rows"] == []
    assert found["problem"] == "failed (exit code 1): KeyError: 'no such part'"


def test_a_part_is_left_out_where_there_is_no_time_and_ended_where_it_takes_too_long(script, monkeypatch):
    part = script.Part("device", 60)
    assert script.measured(part, True, seconds=1)["problem"] == "left out: the time of the whole check has run out"
    slow = "import time; print('{\"row\": 1}', flush=True); time.sleep(60)"
    monkeypatch.setattr(script, "command_of", lambda part, smoke: [sys.executable, "-c", slow])
    monkeypatch.setattr(script, "LEAST_SECONDS", 1)
    found = script.measured(part, True, seconds=4)
    assert found["rows"] == [{"row": 1}]
    assert found["problem"] == "ended after its 4 s; the rows until then are kept"


def test_steps_get_their_ratios(script):
    def step(case, ms, side=1024, batch=1):
        return {"part": case, "rows": [{"case": case, "side": side, "batch": batch, "ms": ms}]}

    facts = {"part": "device", "rows": [{"device": "NVIDIA H200"}, {"gemm_tflops": 700.0}]}
    parts = [facts, step("ours eager", 100.0), step("diffusers eager", 200.0), step("ours compiled", 81.9)]
    script.add_ratios(parts)
    eager, theirs, compiled = (part["rows"][0] for part in parts[1:])
    assert eager["to_floor"] == pytest.approx(100 / 81.9)
    assert eager["to_diffusers"] == 0.5
    assert theirs["to_floor"] == pytest.approx(200 / 81.9)
    assert "to_diffusers" not in theirs
    assert compiled["to_floor"] == pytest.approx(1)
    assert "to_diffusers" not in compiled  # theirs is not compiled
    # Another device: what the products take at its rate. A size without a floor has no ratio.
    parts = [
        {"part": "device", "rows": [{"device": "other"}, {"gemm_tflops": 100.0}]},
        step("ours eager", 427.0, batch=2),
    ]
    parts.append(step("ours selective", 1.0, side=96))
    script.add_ratios(parts)
    assert parts[1]["rows"][0]["to_floor"] == pytest.approx(0.5)
    assert "to_floor" not in parts[2]["rows"][0]


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(script, command, tmp_path):
    path = tmp_path / "check.json"
    # About 90 s on an idle machine; the whole check's limit is for a busy one.
    result = command([sys.executable, str(SCRIPT), "--smoke", "--minutes", "15", "--json", str(path)], timeout=1000)
    assert result.returncode == 0, result.stderr
    found = {part["part"]: part for part in json.loads(path.read_text())["parts"]}
    assert found.keys() == {part.name for part in script.PARTS}
    assert [part["problem"] for part in found.values() if "problem" in part] == []
    assert all(part["rows"] for part in found.values())
    steps = ("eager", "compiled", "checkpointing", "int8", "compiled int8")
    for name in (*(f"ours {policy}" for policy in steps), "diffusers eager", "diffusers compiled"):
        assert all(row["ms"] > 0 for row in found[name]["rows"]), name
    assert "skipped" in found["tests"]["rows"][0]["result"] or "passed" in found["tests"]["rows"][0]["result"]
    curves = found["curve"]["rows"]
    assert [curve["case"].split()[2] for curve in curves] == ["bfloat16", "int8", "float8"]
    assert all(0 < curve["mean_relative_difference"] < 0.1 for curve in curves)
