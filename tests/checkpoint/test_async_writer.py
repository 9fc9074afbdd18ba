"""What is written behind the training's back is what was handed over, and its errors are not lost."""

import signal
import threading

import pytest
import torch

from anima_train.checkpoint import async_writer as writer_module
from anima_train.checkpoint.async_writer import AsyncWriter
from anima_train.core.errors import SpaceError


def test_training_goes_on_while_the_values_of_then_are_written():
    go_on, seen = threading.Event(), []
    weight = torch.nn.Parameter(torch.arange(4.0))

    def job(groups):
        assert go_on.wait(10)
        seen.append(groups["weights"]["a"])

    with AsyncWriter() as writer:
        writer.write({"weights": {"a": weight}}, job)
        with torch.no_grad():
            weight.mul_(10)
        assert seen == []
        go_on.set()
        writer.wait()
        assert torch.equal(seen[0], torch.arange(4.0))


def test_jobs_are_done_in_order_and_all_before_the_end():
    done = []
    with AsyncWriter() as writer:
        for number in range(10):
            writer.write({}, lambda _, number=number: done.append(number))
    assert done == list(range(10))


def test_an_error_is_raised_in_the_training_by_the_next_check_or_at_the_end():
    def full(_):
        raise SpaceError("the disk is full")

    with AsyncWriter() as writer:
        writer.write({}, full)
        with pytest.raises(SpaceError, match="the disk is full"):
            writer.wait()
        writer.check()  # once
        writer.write({}, lambda _: None)
    with pytest.raises(SpaceError), AsyncWriter() as writer:
        writer.write({}, full)


def test_a_run_that_fails_waits_for_what_is_being_written_and_keeps_its_own_error():
    done = []

    def slow(_):
        threading.Event().wait(0.2)
        done.append(True)

    with pytest.raises(ZeroDivisionError), AsyncWriter() as writer:  # noqa: PT012  # the error comes from inside
        writer.write({}, slow)
        print(1 / 0)
    assert done == [True]


def test_a_second_interruption_does_not_wait():
    never = threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a script it is ignored
    try:
        with pytest.raises(KeyboardInterrupt), AsyncWriter() as writer:  # noqa: PT012
            writer.write({}, lambda _: never.wait())
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert writer.thread.is_alive()
    never.set()
    assert writer.close()


def test_where_memory_is_short_nothing_is_copied(monkeypatch):
    monkeypatch.setattr(writer_module, "RESERVE", 2**60)
    weight, seen = torch.zeros(3), []
    with AsyncWriter() as writer:
        writer.write({"weights": {"a": weight}}, lambda groups: seen.append(groups["weights"]["a"]))
        assert seen[0] is weight
