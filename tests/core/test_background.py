"""A thread behind the training's back loses nothing, and holds nothing up."""

import sys
import threading
import time

import pytest

from anima_train.core.background import BackgroundThread


def test_what_has_no_room_is_said_and_what_has_is_done_in_order():
    gate, done = threading.Event(), []
    with BackgroundThread("test", max_waiting=2) as thread:
        thread.submit(lambda: gate.wait(30))
        while not thread.jobs.empty():  # until the first is being done
            time.sleep(0.001)
        assert [thread.submit(lambda number=number: done.append(number), timeout=0) for number in range(3)] == [
            True, True, False,
        ]  # fmt: skip
        assert not thread.close(patience=0.01)
        gate.set()
    assert done == [0, 1]


def test_an_error_is_raised_once_and_later_jobs_are_done():
    done = []
    with BackgroundThread("test", max_waiting=2) as thread:
        thread.submit(lambda: 1 / 0)
        thread.submit(lambda: done.append(1))
        with pytest.raises(ZeroDivisionError):
            thread.wait()
        thread.check()
    assert done == [1]


def test_a_job_that_hangs_does_not_hold_the_exit(command):
    script = (
        "import threading; from anima_train.core.background import BackgroundThread\n"
        "thread = BackgroundThread('test', 1); thread.submit(threading.Event().wait); print(thread.close(0.1))"
    )
    result = command([sys.executable, "-c", script], timeout=60)
    assert (result.returncode, result.stdout.strip()) == (0, "False"), result.stderr
