"""What a terminal and a log see of a run."""

import contextlib
import io
import re

import pytest

from anima_train.run.progress import LINE_EVERY, DrawingBar, ProgressBar, Trend


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
        r"style: step 31 of 100 \(31%\): loss 0\.\d{4} falling, 2\.50 images/s, 1 min left, evaluation at 200, 3\.0 GiB"
    )
    assert re.fullmatch(expected, lines[1])
    assert lines[-2].startswith("style: step 100 of 100 (100%): ")
    assert ", done, " in lines[-2]
    assert lines[-1] == "saved x"


def test_the_time_left_counts_from_where_the_run_went_on():
    lines = run(io.StringIO(), num_steps=100, start=90, seconds=60.0).splitlines()
    assert "9 min left" in lines[0]


def test_the_time_left_is_of_steps_alone_whatever_is_done_before_and_between_them():
    stream, clock = io.StringIO(), Clock()
    progress = ProgressBar("style", 16, 0, True, stream, clock)
    for step in range(1, 12):
        with contextlib.suppress(KeyError), progress.doing("evaluation"):
            clock.now += 50.0
            with progress.doing("saving"):
                clock.now += 40.0
            raise KeyError
        clock.now += 2.0
        progress.update(step, 0.5, 2.5, 2**30, "")
    lines = [line for line in stream.getvalue().splitlines() if "left" in line]
    assert ", 30 s left, " in lines[0]
    assert ", 10 s left, " in lines[-1]


def test_a_terminal_gets_one_live_line():
    text = run(Terminal())
    assert text.count("\r") > 1
    assert "images/s, done, evaluation at 200\n" in text
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


def shown(stream):
    """The states of a live line, one after the other, as a terminal of 80 columns shows them."""
    return [part.strip() for part in stream.getvalue().replace("\n", "\r").split("\r") if part.strip()]


@pytest.mark.parametrize("name", ["style-20261130-120000", "n" * 150, "\u7d75" * 60])
@pytest.mark.parametrize("num_steps", [10, 1_000_000])
def test_80_columns_show_step_loss_speed_and_time_left_whatever_the_name(name, num_steps):
    stream, clock = Terminal(), Clock()
    progress = ProgressBar(name, num_steps, 0, True, stream, clock)
    for step in (1, 2):
        clock.now += 3.5
        progress.update(step, 123.4567, 12.34, 23 * 2**30, "training state at 1,000,000")
    progress.bar.refresh()
    progress.close()
    last = shown(stream)[-1]
    assert re.match(rf"step 2/{num_steps:,}, loss 123\.4567 level, 12\.34 images/s, [\d,hmins. ]+ left", last)
    assert len(last) < 80
    assert name not in last  # as there is no room for it


def test_the_live_line_says_what_the_run_is_doing_between_steps_and_then_no_more():
    stream, clock = Terminal(), Clock()
    progress = ProgressBar("style", 4, 0, True, stream, clock)
    with progress.doing("evaluation"):
        assert shown(stream)[-1] == "step 0/4, evaluation ..., style"
    clock.now += 1
    progress.update(1, 0.5, 2.5, 2**30, "preview at 2")
    with contextlib.suppress(KeyError), progress.doing("preview"):
        during = shown(stream)[-1]
        raise KeyError
    assert re.match(r"step 1/4, preview \.\.\., loss 0\.5000 level, 2\.50 images/s, 3 s left", during)
    assert "preview ..." not in shown(stream)[-1]
    progress.close()


def test_a_log_says_what_takes_long_between_steps():
    stream, clock = io.StringIO(), Clock()
    progress = ProgressBar("style", 4, 0, True, stream, clock)
    with progress.doing("evaluation"):
        pass
    with progress.doing("preview"):  # a moment later
        pass
    clock.now += LINE_EVERY
    with progress.doing("saving"):
        pass
    assert stream.getvalue() == "style: step 0 of 4 (0%): evaluation ...\nstyle: step 0 of 4 (0%): saving ...\n"


def test_pictures_have_a_bar_that_counts_steps_not_passes(capsys):
    stream, clock = Terminal(), Clock()
    bar = DrawingBar([2, 3], stream=stream, clock=clock)
    for levels in ([1.0, 1.0, 0.5, 0.5, 0.5], [1.0, 0.6, 0.3]):
        for level in levels:
            clock.now += 0.1
            bar.tell(level)
        clock.now += 1
        bar.finished("out/x.png")
    bar.close()
    states = shown(stream)
    assert states[0] == "picture 1/2, step 1/2"
    assert any(re.fullmatch(r"picture 1/2, step 2/2, [\d.]+ s left", state) for state in states)
    assert states[-1].startswith("picture 2/2, step 3/3, ")
    assert not any("step 3/2" in state or "step 4" in state for state in states)
    assert capsys.readouterr().out == "out/x.png\n" * 2


def test_pictures_in_a_log_are_their_paths_alone(capsys):
    stream = io.StringIO()
    bar = DrawingBar([2], stream=stream)
    bar.tell(1.0)
    bar.finished("out/x.png")
    bar.close()
    assert stream.getvalue() == ""
    assert capsys.readouterr().out == "out/x.png\n"
