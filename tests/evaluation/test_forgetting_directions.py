"""The directions that docs/forgetting.md tells of hold, on the toy of `scripts/forgetting_experiment.py`."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

REPO = Path(__file__).parents[2]
METHODS = (
    "early", "plain", "regularization 20", "preservation on retention 20", "preservation on retention 50",
)  # fmt: skip

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
def runs(command, tmp_path_factory, tables):
    """What the runs of one seed have logged, by method; losses only."""
    folder = tmp_path_factory.mktemp("forgetting")
    script, base = REPO / "scripts" / "forgetting_experiment.py", REPO / "tests" / "data_files" / "forgetting"
    result = command(
        [sys.executable, str(script), str(folder), "--seeds", "0", "--only", ",".join(METHODS), "--no-pictures",
         "--base", str(base)],
        timeout=1800,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads((folder / "results.json").read_text())["runs"]
    return {run["method"]: {0: tables.with_points(run)} for run in found}


def test_the_base_uses_captions(runs):
    losses = runs["early"][0]["base_losses"]
    worse = np.subtract(losses["miscaptioned"], losses["known"])
    assert worse.mean() > 5 * worse.std(ddof=1) / math.sqrt(len(worse))


def test_paired_differences_see_forgetting_at_the_first_checkpoint_where_unpaired_ones_miss_it(runs):
    run = runs["early"][0]
    point, losses = run["evaluations"][-1], run["base_losses"]["known"]
    change = point["known/difference_from_base"]
    assert change > 5 * point["known/difference_from_base_stderr"]
    assert change < 3 * math.sqrt(2 / len(losses)) * np.std(losses, ddof=1)


@pytest.mark.parametrize(
    ("method", "most"),
    [("regularization 20", 0.8), ("preservation on retention 20", 0.8), ("preservation on retention 50", 0.55)],
)
def test_bounds_leave_a_part_of_the_forgetting_at_equal_loss(runs, tables, method, most):
    level = 0.85 * max(point[tables.LEARNING] for point in runs["plain"][0]["evaluations"])
    (ratio,) = tables.ratios(runs, method, tables.LEARNING, {0: level})
    assert ratio < most


def test_the_drift_from_captions_alone_tells_the_forgetting(runs, tables):
    points = [point for method in runs if method != "early" for point in runs[method][0]["evaluations"][1:]]
    drift = [point["drawn/drift"] for point in points]
    change = [point[tables.FORGETTING] for point in points]
    assert np.corrcoef(tables.ranks(drift), tables.ranks(change))[0, 1] > 0.9
    ends = [runs[method][0]["evaluations"][-1] for method in runs if method != "early"]
    assert all(0.8 < point[tables.FORGETTING] / point["known/drift"] < 1.2 for point in ends)


def test_forgetting_grows_with_the_strength_from_zero(runs):
    found = [(each["strength"], each["metrics"]) for each in runs["plain"][0]["strengths"]]
    changes = [metrics["known/difference_from_base"] for _, metrics in found]
    drifts = [metrics["drawn/drift"] for _, metrics in found]
    assert [strength for strength, _ in found] == sorted(strength for strength, _ in found)
    assert changes[0] == drifts[0] == 0
    assert drifts == sorted(drifts)
    assert changes == sorted(changes)
