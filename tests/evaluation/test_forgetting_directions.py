"""The directions that docs/forgetting.md tells of hold, on the toy of `scripts/forgetting_experiment.py`."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

REPO = Path(__file__).parents[2]
METHODS = (
    "early", "plain", "regularization 20", "preservation on retention 20", "preservation on retention 50",
)  # fmt: skip
SEEDS = (1, 2)  # two: the ratios of methods differ by 0.05 from seed to seed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tables():
    """The module that makes the tables."""
    sys.path.insert(0, str(REPO / "scripts"))
    try:
        from forgetting import tables
    finally:
        sys.path.pop(0)
    return tables


@pytest.fixture(scope="module")
def runs(command, tmp_path_factory, worker_id, tables):
    """What the runs have logged, by method and seed; losses only. One process makes them, for all."""
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "forgetting"
    script, base = REPO / "scripts" / "forgetting_experiment.py", REPO / "tests" / "data_files" / "forgetting"
    options = ["--seeds", ",".join(map(str, SEEDS)), "--only", ",".join(METHODS), "--no-pictures", "--base", str(base)]
    with FileLock(f"{folder}.lock"):  # runs that are there are not made again
        result = command([sys.executable, str(script), str(folder), *options], timeout=1800)
    assert result.returncode == 0, result.stderr
    found = json.loads((folder / "results.json").read_text())["runs"]
    return {
        method: {run["seed"]: tables.with_points(run) for run in found if run["method"] == method} for method in METHODS
    }


def test_the_base_uses_captions(runs):
    losses = runs["early"][1]["base_losses"]
    worse = np.subtract(losses["miscaptioned"], losses["known"])
    assert worse.mean() > 5 * worse.std(ddof=1) / math.sqrt(len(worse))


def test_paired_differences_see_forgetting_at_the_first_checkpoint_where_unpaired_ones_miss_it(runs):
    run = runs["early"][1]
    point, losses = run["evaluations"][-1], run["base_losses"]["known"]
    change = point["known/difference_from_base"]
    assert change > 5 * point["known/difference_from_base_stderr"]
    assert change < 3 * math.sqrt(2 / len(losses)) * np.std(losses, ddof=1)


@pytest.mark.parametrize(
    ("method", "most"),
    [("regularization 20", 0.8), ("preservation on retention 20", 0.8), ("preservation on retention 50", 0.55)],
)
def test_bounds_leave_a_part_of_the_forgetting_at_equal_loss(runs, tables, method, most):
    best = {seed: max(point[tables.LEARNING] for point in run["evaluations"]) for seed, run in runs["plain"].items()}
    ratios = tables.ratios(runs, method, tables.LEARNING, {seed: 0.85 * gain for seed, gain in best.items()})
    assert len(ratios) == len(SEEDS)
    assert sum(ratios) / len(ratios) < most


def test_the_drift_from_captions_alone_tells_the_forgetting(runs, tables):
    traces = [run["evaluations"] for method in runs if method != "early" for run in runs[method].values()]
    points = [point for trace in traces for point in trace[1:]]
    drift = [point["drawn/drift"] for point in points]
    change = [point[tables.FORGETTING] for point in points]
    assert np.corrcoef(tables.ranks(drift), tables.ranks(change))[0, 1] > 0.9
    assert all(0.8 < trace[-1][tables.FORGETTING] / trace[-1]["known/drift"] < 1.2 for trace in traces)


def test_forgetting_grows_with_the_strength_from_zero(runs):
    found = [(each["strength"], each["metrics"]) for each in runs["plain"][1]["strengths"]]
    changes = [metrics["known/difference_from_base"] for _, metrics in found]
    drifts = [metrics["drawn/drift"] for _, metrics in found]
    assert [strength for strength, _ in found] == sorted(strength for strength, _ in found)
    assert changes[0] == drifts[0] == 0
    assert drifts == sorted(drifts)
    assert changes == sorted(changes)
