"""When evaluations and saves are due, and what the terminal says comes next."""

from pathlib import Path

import pytest

from anima_train.data.buckets import Size
from anima_train.data.cache import Cache
from anima_train.data.plan import EpochSchedule, Plan
from anima_train.data.samples import Picture, Sample
from anima_train.data.settings import DirectoryOptions
from anima_train.run.intervals import Interval, next_event


def timetable(repeats: float = 1.0, epochs: int = 12) -> EpochSchedule:
    """Epochs of five images, one in a step."""
    options = DirectoryOptions(num_repeats=repeats)
    paths = [Path(f"{number}.png") for number in range(5)]
    pictures = [Picture(path, path, path.stem, 64, 64) for path in paths]
    samples = [
        Sample(f"0/{picture.path}@64", picture, Size(64, 64), 64, 0, options, Cache(Path("unused")))
        for picture in pictures
    ]
    return EpochSchedule.of(Plan(samples, 0, 1, 1), epochs, None)


def steps_of(due: Interval, table: EpochSchedule) -> list[int]:
    """The steps after which it was due, of a run that sees an image a step."""
    return [
        step + 1
        for step in range(table.num_steps)
        if due.after(step + 1, table.locate(step)[0], table.epochs_done(step), step, step + 1)
    ]


@pytest.mark.parametrize(
    ("due", "expected"),
    [
        (Interval(), []),
        (Interval(steps=25), [25, 50]),
        (Interval(epochs=4), [20, 40, 60]),
        (Interval(examples=30), [30, 60]),
        (Interval(epochs=6, steps=25), [25, 30, 50, 60]),
    ],
)
def test_things_are_due_at_their_multiples_and_said_to_be(due: Interval, expected: list[int]):
    table = timetable()
    assert steps_of(due, table) == expected
    whole = due.count(range(table.num_steps), range(12), range(table.num_steps))
    parts = [due.count(range(*step), range(step[0] // 5, step[1] // 5), range(*step)) for step in ((0, 25), (25, 60))]
    assert len(expected) <= whole == sum(parts) <= len(expected) + 1  # two reasons at one step are counted twice
    if due.examples is None:
        for step in range(table.num_steps):
            assert due.following(step, table) == min((at for at in expected if at > step), default=None)


def test_no_multiple_of_epochs_is_jumped_over_where_epochs_have_no_step():
    table = timetable(repeats=0.05, epochs=80)  # one step in every fourth epoch
    assert table.num_steps == 20
    assert (
        len(steps_of(Interval(epochs=3), table)) == 19
    )  # a multiple of three lies in every four, but not behind the last
    assert len(steps_of(Interval(epochs=8), table)) == 10


def test_the_terminal_is_told_the_nearest():
    table = timetable()
    events = {"evaluation": Interval(steps=25), "save": Interval(epochs=4), "training state": Interval(minutes=5)}
    assert [next_event(events, step, table) for step in (0, 20, 25, 59)] == [
        "save at 20",
        "evaluation at 25",
        "save at 40",
        "save at 60",
    ]
    assert next_event({}, 0, table) == ""
