"""Threads that share a limit of memory."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from anima_train.core.budget import ByteBudget


def test_threads_never_hold_more_together_than_the_budget_and_all_get_their_turn():
    budget, most, lock = ByteBudget(100), [], threading.Lock()

    def work(num_bytes):
        with budget.hold(num_bytes):
            with lock:
                most.append(budget.held)
            return num_bytes

    sizes = [60, 60, 30, 10, 99, 1, 100, 50, 50, 50] * 20
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, sizes)) == sizes
    assert max(most) <= 100
    assert budget.held == 0


def test_what_is_larger_than_the_budget_waits_until_it_is_alone():
    budget, entered, release = ByteBudget(100), threading.Event(), threading.Event()

    def small():
        with budget.hold(1):
            entered.set()
            release.wait(10)

    def large():
        with budget.hold(500):
            return budget.held

    with ThreadPoolExecutor(2) as pool:
        pool.submit(small)
        entered.wait(10)
        waiting = pool.submit(large)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.1)
        release.set()
        assert waiting.result(timeout=10) == 500


def test_an_error_gives_back_what_was_held():
    budget = ByteBudget(100)
    with pytest.raises(ValueError, match="x"), budget.hold(70):
        raise ValueError("x")
    with budget.hold(100):
        assert budget.held == 100
