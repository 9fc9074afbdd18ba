"""Ctrl-C before a run, or in another command: one line, and its exit code."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PRESS = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
SWALLOWED = f"try:\n    exec({PRESS!r})\nexcept BaseException:\n    pass\n"


@pytest.mark.parametrize("module", [PRESS, SWALLOWED])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_ctrl_c_while_libraries_are_imported_is_one_line(tmp_path, module, rank):
    (tmp_path / "torch.py").write_text(module)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPO}", "RANK": rank, "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "anima_train", str(REPO / "configs" / "quickstart.toml")]
    done = subprocess.run(
        command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=60, check=False,
        preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "\nstopped: Ctrl-C\n" if rank == "0" else "")


def heed_ctrl_c():
    """Heed SIGINT, where these tests run in the background of a script, too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
