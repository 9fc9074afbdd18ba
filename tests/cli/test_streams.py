"""A run goes on when nobody reads what it prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


@pytest.fixture
def quickstart(tmp_path):
    """Start 3 steps of the quickstart below `tmp_path`; the process, and where its weights will be."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "quickstart").symlink_to(REPO / "examples" / "quickstart")

    def start(**options):
        command = [sys.executable, "-m", "anima_train", str(REPO / "configs" / "quickstart.toml")]
        command += ["--set", "max_steps=3", "--set", 'cache_dir="cache"']
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "ACCELERATE_USE_CPU": "1"}
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, **options)
        return process, tmp_path / "out" / "quickstart" / "weights" / "quickstart.safetensors"

    return start


@pytest.mark.slow
def test_readers_that_go_away_stop_nothing(quickstart):
    process, weights = quickstart(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert weights.exists()


@pytest.mark.slow
def test_output_that_was_closed_from_the_beginning_stops_nothing(quickstart):
    process, weights = quickstart(preexec_fn=lambda: (os.close(1), os.close(2)))
    assert process.wait(timeout=120) == 0
    assert weights.exists()


@pytest.mark.slow
def test_a_full_disk_under_the_log_stops_nothing(quickstart):
    with open("/dev/full", "w") as full:
        process, weights = quickstart(stdout=full, stderr=full)
        assert process.wait(timeout=120) == 0
    assert weights.exists()
