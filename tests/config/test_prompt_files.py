"""Requests from flags and from files: what counts, and what is said about mistakes."""

import pytest

from anima_train.config.prompt_files import make_requests, read_requests
from anima_train.core.errors import ConfigError
from anima_train.sampling.generate import Request


def refused(path, settings=None):
    with pytest.raises(ConfigError) as caught:
        read_requests(path, settings or {})
    return caught.value.problems


def test_flags_hold_for_every_prompt():
    assert make_requests(["a", ""], {"seed": 3, "steps": 5}, {}) == [
        Request(prompt="a", seed=3, steps=5),
        Request(prompt="", seed=3, steps=5),
    ]


def test_wrong_flags_are_all_named_as_they_were_written_with_or_without_a_prompt():
    with pytest.raises(ConfigError) as caught:
        make_requests([], {"steps": 0, "width": 100, "sampler": "eular"}, {"steps": "--steps", "width": "--size"})
    size, steps, sampler = caught.value.problems
    assert size == "--size: found 100 (an integer), expected a multiple of 16"
    assert steps == "--steps: found 0 (an integer), expected at least 1"
    assert sampler.startswith('sampler: found "eular" (text), expected one of "euler"')
    assert sampler.endswith('did you mean "euler"?')


def test_each_line_of_a_text_is_a_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffeins, (zwei:1.2)\r\n\r\n  drei  \n".encode())
    assert read_requests(path, {"seed": 4}) == [
        Request(prompt="eins, (zwei:1.2)", seed=4),
        Request(prompt="drei", seed=4),
    ]


def test_tables_override_what_holds_for_all(tmp_path):
    path = tmp_path / "prompts.toml"
    path.write_text('[[prompt]]\nprompt = "a"\n[[prompt]]\nprompt = """b\nc"""\nseed = 9\nwidth = 832\ncfg = 2\n')
    assert read_requests(path, {"seed": 4, "negative_prompt": "bad"}) == [
        Request(prompt="a", seed=4, negative_prompt="bad"),
        Request(prompt="b\nc", seed=9, width=832, cfg=2.0, negative_prompt="bad"),
    ]


def test_mistakes_in_tables_are_all_named_with_a_suggestion(tmp_path):
    path = tmp_path / "prompts.toml"
    path.write_text(
        '[[prompt]]\nprompt = "a"\nstep = 3\n[[prompt]]\nsize = "1x1"\nsteps = 2.5\n[[prompt]]\nprompt = "c"\ncfg = 1\n'
    )
    assert refused(path, {"negative_prompt": "bad"}) == [
        "prompts.toml: prompt[0].step: unknown key; did you mean steps?",
        "prompts.toml: prompt[1].steps: found 2.5 (a number), expected an integer",
        "prompts.toml: prompt[1].prompt: missing, and required",
        "prompts.toml: prompt[1].size: unknown key; it is called width and height",
        "prompts.toml: prompt[2].negative_prompt: has no effect with cfg 1 (of Turbo the default); leave it out, or "
        "write another cfg",
    ]


@pytest.mark.parametrize("text", ["", "prompt = []\n", "seed = 3\n", "prompt = 'a'\n", "prompt = ['a']\n", "[[prompt"])
def test_a_table_of_another_form_is_an_error(tmp_path, text):
    path = tmp_path / "prompts.toml"
    path.write_text(text)
    assert "prompts.toml" in refused(path)[0]


def test_texts_that_cannot_be_used_are_errors(tmp_path):
    path = tmp_path / "prompts.txt"
    assert "cannot be read" in refused(path)[0]
    path.write_text("\n \n")
    assert "holds no prompt" in refused(path)[0]
    path.write_bytes(b"caf\xe9")
    assert "is not text in UTF-8" in refused(path)[0]
