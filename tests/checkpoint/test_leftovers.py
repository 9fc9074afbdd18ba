"""What a kill leaves is removed by the run's next start, and by no other run."""

import os
import signal
import subprocess
import sys

import pytest
from filelock import FileLock

from anima_train.checkpoint.leftovers import remove_leftovers
from anima_train.core.files import temporary_beside
from anima_train.data.cache import Cache, entry_key
from anima_train.run.folder import RunFolder

NAME = "a style of " + "very " * 8 + "long name"


def fill(folder):
    """Temporary files of everything that a run writes, made as the run makes them; and what is none of its own."""
    written = [
        folder.weights_path(None), folder.weights_path(20), folder.path / "samples" / "s000002_00.png",
        folder.metrics_path, folder.manifest_path, folder.config_path, folder.seen_path, folder.base_path,
        folder.strengths_path, folder.strengths_folder / "0.5" / "s000002_00.png",
    ]  # fmt: skip
    left = [temporary_beside(path, None) for path in written]
    for name in (".step-000003.tmp", ".step-000001.old.tmp", "unused-step-000004", "unused-step-000004-2"):
        (folder.checkpoints / name).mkdir(parents=True)
        (folder.checkpoints / name / "weights.safetensors").write_bytes(b"w")
    others = [
        folder.path / "notes.tmp", folder.path / "weights" / ".mine.tmp", folder.checkpoints / "step-000002" / "x",
        folder.path / "samples" / "s000002_00.png", temporary_beside(folder.path / "report.html", None),
    ]  # fmt: skip
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return left, others


@pytest.mark.parametrize("name", ["run", NAME])
def test_everything_of_its_own_is_removed_and_nothing_else(tmp_path, name):
    folder = RunFolder(tmp_path, name)
    left, others = fill(folder)
    removed = remove_leftovers(folder)
    assert not [path for path in left if path.exists()]
    assert sorted(os.listdir(folder.checkpoints)) == ["step-000002"]
    assert all(path.exists() for path in others)
    assert len(removed) == len(left) + 2
    assert remove_leftovers(folder) == []


def test_the_next_start_of_a_run_removes_them(trainer, capsys):
    first = trainer("run", max_steps=2, checkpoint_every_n_steps=1)
    folder = RunFolder(first.path.parent, "run")
    left, others = fill(folder)
    entry = Cache(trainer.folder / "cache").path("latent", entry_key("latent", image="a"))
    trainer("run", resume=True, max_steps=3, checkpoint_every_n_steps=1)
    assert not [path for path in left if path.exists()]
    assert all(path.exists() for path in others)
    assert not list(folder.checkpoints.glob("unused-*"))
    assert "note: removed what an earlier start has left: " in capsys.readouterr().out
    assert not entry.exists()


def entries_of(folder):
    cache = Cache(folder)
    key = entry_key("latent", image="a")
    paths = [cache.path("latent", key), cache.path("text", key), cache.rejection(key)]
    return cache, [temporary_beside(path, None) for path in paths]


def test_unfinished_entries_of_a_cache_are_removed(tmp_path):
    cache, left = entries_of(tmp_path / "cache")
    mine = left[0].with_name(".notes.tmp")
    mine.write_text("x")
    cache.remove_unfinished()
    assert not [path for path in left if path.exists()]
    assert mine.exists()
    Cache(tmp_path / "none").remove_unfinished()
    assert not (tmp_path / "none").exists()


def test_those_of_a_run_that_is_filling_the_cache_stay(tmp_path):
    cache, left = entries_of(tmp_path / "cache")
    lock = str(cache.folder / ".lock")
    code = f"from filelock import FileLock; lock = FileLock({lock!r}); lock.acquire(); print(1, flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    try:
        holder.stdout.readline()
        cache.remove_unfinished()
        assert all(path.exists() for path in left)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    cache.remove_unfinished()  # its lock is gone with it
    assert not [path for path in left if path.exists()]


def test_links_in_a_cache_are_not_followed(tmp_path):
    cache, left = entries_of(tmp_path / "cache")
    elsewhere = tmp_path / "elsewhere"
    left[0].parent.rename(elsewhere)
    left[0].parent.symlink_to(elsewhere)
    cache.remove_unfinished()
    assert (elsewhere / left[0].name).exists()
    assert not FileLock(cache.folder / ".lock").is_locked
