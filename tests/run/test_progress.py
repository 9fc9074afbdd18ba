"""What a terminal and a log see of a run."""

import io
import re

import pytest

from anima_train.run.progress import LINE_EVERY, ProgressBar, Trend


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def run(stream, num_steps=100, start=0, seconds=1.0, is_shown=True):
    clock = Clock()
    progress = ProgressBar("style", num_steps, start, is_shown, stream, clock)
    for step in range(start + 1, num_steps + 1):
        clock.now += seconds
        progress.update(step, 1 / step, 2.5, 3 * 2**30, "evaluation at 200")
    progress.say("saved x")
    progress.close()
    return stream.getvalue()


def test_a_log_gets_whole_lines_now_and_then_and_always_the_last_step():
    lines = run(io.StringIO()).splitlines()
    assert len(lines) == 1 + 100 // LINE_EVERY + 1 + 1  # the first, one each half minute, the last, and what is said
    assert not any("\r" in line or "\x1b" in line for line in lines)
    expected = (
        r"style: step 31 of 100 \(31%\): loss 0\.\d{4} falling, 2\.50 images/s, 3\.0 GiB, evaluation at 200, 1 min left"
    )
    assert re.fullmatch(expected, lines[1])
    assert lines[-2].startswith("style: step 100 of 100 (100%): ")
    assert lines[-2].endswith("done")
    assert lines[-1] == "saved x"


def test_the_time_left_counts_from_where_the_run_went_on():
    lines = run(io.StringIO(), num_steps=100, start=90, seconds=60.0).splitlines()
    assert lines[0].endswith("9 min left")


def test_a_terminal_gets_one_live_line():
    text = run(Terminal())
    assert text.count("\r") > 1
    assert "images/s, 3.0 GiB, evaluation at 200" in text
    assert "saved x\n" in text


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_other_processes_say_nothing(stream):
    assert run(stream(), is_shown=False) == ""


def test_the_trend_sees_through_noise_and_has_no_start_up_bias():
    falling, level, rising = Trend(), Trend(), Trend()
    for step in range(300):
        noise = 0.05 * (-1) ** step
        falling.add(1 + noise - step / 600)
        level.add(1 + 0.001 * (-1) ** step)
        rising.add(1 + noise + step / 600)
        if step == 0:
            assert falling.fast.value == pytest.approx(1.05)
    assert (falling.word, level.word, rising.word) == ("falling", "level", "rising")


def test_a_line_cannot_command_the_terminal():
    stream = io.StringIO()
    ProgressBar("style", 1, 0, True, stream).say("a\x1b[2J\x07.png\u202e: \x9b1A\nb")
    assert stream.getvalue() == "a\\x1b[2J\\x07.png\\u202e: \\x9b1A\nb\n"
