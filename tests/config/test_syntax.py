"""The help with a line that is no TOML: what is written instead, and never a wrong advice."""

import tomllib

import pytest

from anima_train.config.syntax import WIDTH, describe_error, pointed_at


def advice(text):
    """The first line of what is said about a text that is no TOML."""
    with pytest.raises(tomllib.TOMLDecodeError) as caught:
        tomllib.loads(text)
    return describe_error(text, caught.value).split("\n")[0]


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("save_dtype = bfloat16", 'save_dtype = "bfloat16"'),
        ("output_dir = runs/today", 'output_dir = "runs/today"'),
        ("run_name = mine # the first", 'run_name = "mine"'),
        ("run_name = “mine”", 'run_name = "mine"'),
        ("run_name = ‘mine’", "run_name = 'mine'"),
        ("run_name = «mine»", 'run_name = "mine"'),
        ("compile = True", "compile = true"),
        ("compile = OFF", "compile = false"),
        ("lr = 0,00005", "lr = 0.00005"),
        ("lr = 2,5e-5", "lr = 2.5e-5"),
        ("lr = .5", "lr = 0.5"),
        ("lr = 1.e-4", "lr = 1.0e-4"),
        ("lr = 5 * 10^-5", "lr = 5e-5"),
        ("lr = 1e−4", "lr = 1e-4"),
        ("seed = 007", "seed = 7"),
        ("warmup_steps = 100 steps", "warmup_steps = 100"),
        ("max_steps = 2k", "max_steps = 2000"),
        ("max_steps = 2 000", "max_steps = 2000"),
        ("epochs 10", "epochs = 10"),
        ("epochs: 10", "epochs = 10"),
        ('"epochs": 10,', "epochs = 10"),
        ("epochs := 10", "epochs = 10"),
        ("epochs = 10,", "epochs = 10"),
        ("epochs = 10; # all", "epochs = 10"),
        ("--epochs 10", "epochs = 10"),
        ("--offline", "offline = true"),
        ("\u00a0epochs\u00a0= 10", "epochs = 10"),
        ("epochs ＝ 10", "epochs = 10"),
        ("output dir = 'runs'", "output_dir = 'runs'"),
        ("epochs = 10 // all", "epochs = 10"),
        ("// all", "# all"),
        ('vae_path = "D:\\models\\vae.safetensors"', "vae_path = 'D:\\models\\vae.safetensors'"),
        ("vae_path = D:\\models\\vae.safetensors", "vae_path = 'D:\\models\\vae.safetensors'"),
        ("vae_path = “D:\\models\\vae.safetensors”", "vae_path = 'D:\\models\\vae.safetensors'"),
        ('prompts = ["C:\\x", "D:\\b"]', "prompts = ['C:\\x', 'D:\\b']"),
        ("run_name = 'mine", "run_name = 'mine'"),
        ("run_name = mine'", 'run_name = "mine"'),
        ("run_name = 'mine\"", 'run_name = "mine"'),
        ('prompts = ["a "b" c"]', "prompts = ['a \"b\" c']"),
        ('run_name = "a "b" c"', "run_name = 'a \"b\" c'"),
        ("resolutions = (512, 1024)", "resolutions = [512, 1024]"),
        ("resolutions = 512, 1024", "resolutions = [512, 1024]"),
        ("resolutions = 1024,1024", "resolutions = [1024,1024]"),
        ("resolutions = [512 1024]", "resolutions = [512, 1024]"),
        ("resolutions = [512, 1024", "resolutions = [512, 1024]"),
        ("prompts = [1girl, solo]", None),
        ("protected_tags = [solo, blue hair]", 'protected_tags = ["solo", "blue hair"]'),
        ("[adapter", "[adapter]"),
        ("adapter:", "[adapter]"),
        ("[[directory]", "[[directory]]"),
        ("[directory", "[[directory]]"),
        ("sampler = { type: 'heun' }", "sampler = { type = 'heun' }"),
        ("sampler = { type = 'heun', }", "sampler = { type = 'heun' }"),
        ('prompts = ["1girl, blue eyes", "tag \\(x, y\\)"]', "prompts = [\"1girl, blue eyes\", 'tag \\(x, y\\)']"),
        ('prompts = ["one, two", three]', 'prompts = ["one, two", "three"]'),
        ('prompts = ["one two" "three"]', 'prompts = ["one two", "three"]'),
        ('prompts = ["say \\"a, b\\"", True]', 'prompts = ["say \\"a, b\\"", true]'),
        ('prompts = ["a "b, c" d"]', None),
        (
            "eval_datasets = [{ name = 'a', role = 'b' } { name = 'c' }]",
            "eval_datasets = [{ name = 'a', role = 'b' }, { name = 'c' }]",
        ),
        ("resolutions = [[512 768], [1024, 1024]]", "resolutions = [[512, 768], [1024, 1024]]"),
        ("resolutions = [512,, 768]", "resolutions = [512, 768]"),
        ("resolutions = [[512, x]", None),
        ('directory = [{ path = "D:\\cats" }]', "directory = [{ path = 'D:\\cats' }]"),
        ('directory = [{ path: "D:\\new", weight: 1 }]', "directory = [{ path = 'D:\\new', weight = 1 }]"),
        ("max_steps = 1,000", "max_steps = 1000"),
        ("max_steps = 12,000", "max_steps = 12000"),
        ("resolutions = 512,768", "resolutions = [512,768]"),
        ("max_steps = 1,200,000", "max_steps = 1200000"),
        ("lr = 0,001", "lr = 0.001"),
        ("max caption tokens = 512", "max_caption_tokens = 512"),
        ("a b c d e f = 3", None),
        ("t5_tokenizer_path = tokenizers/t5", 't5_tokenizer_path = "tokenizers/t5"'),
        ("lr = 2e-5 5", None),
        ("= 5", None),
        ("[]", None),
    ],
)
def test_a_line_is_shown_as_it_is_written(line, meant):
    found = advice(line)
    assert found.startswith("line 1: ")
    assert found.endswith(f": {meant}") if meant else " = " not in found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "a = 1\n\n[model]\ntype = 'x'\n[model]\n",
            "line 5: the table [model] begins here a second time, after line 3",
        ),
        ("[directory]\na = 1\n[directory]\n", "line 3: for more than one write [[directory]] each time"),
        ("seed = 1\nseed = 2", "line 2: seed stands here a second time, after line 1; keep one of the two"),
        ("prompts = [\n  'a',\n  'b'\n\n[model]\n", "line 5: the list that begins in line 1 is not closed with ]"),
        (
            "prompts = [\n  'a'\n  'b',\n]",
            "line 3: the list that begins in line 1 is not closed with ], or lacks a comma",
        ),
        (
            "lr_scheduler = {\n  type = 'rex'\n}",
            "line 1: a table in braces stands on one line; on several, write [lr_sched",
        ),
        (
            "directory = [{ path = 'a' }]\n[[directory]]\npath = 'b'",
            "line 2: for more than one write [[directory]] each time",
        ),
        (
            "a = 1\nmodel = { dtype = 'x' }\nmodel.attention = 'y'\n",
            "line 3: model.attention belongs into the braces of model, in line 2",
        ),
        ("a = 1\n<<<<<<< mine\nb = 2", "line 2: the mark of a merge that was not finished"),
        ("epochs = none", "line 1: epochs has no value; write one behind the =, or leave the key out"),
        ("epochs =", "line 1: epochs has no value; write one behind the =, or leave the key out"),
        ("a = 1\nb = '''x\ny", "line 3: a text in three quotes is not closed; the first of them begins in line 2"),
    ],
)
def test_what_does_not_show_in_one_line_is_said(text, said):
    assert advice(text).startswith(said)


def test_a_message_has_three_lines_however_long_the_text_is():
    line = "prompts = ['" + "x" * 5000 + "' '']"
    with pytest.raises(tomllib.TOMLDecodeError) as caught:
        tomllib.loads(line)
    first, shown, caret = describe_error(line, caught.value).split("\n")
    assert len(first) < 160
    assert len(shown) <= WIDTH + 2
    assert caret.index("^") < len(shown)


def test_the_caret_is_below_the_letter_after_wide_letters_and_tabs():
    assert pointed_at("a = 日本 x", 8).split("\n") == ["  a = 日本 x", " " * 11 + "^"]
    assert pointed_at("a\t= x", 5).split("\n") == ["  a = x", " " * 6 + "^"]


@pytest.mark.parametrize("before", ["x = [1]", "x = {}", "[x]", "[[x]]"])
@pytest.mark.parametrize("line", ["[[x]]", "[x.y]", "x = 1", "x.y = 'z'"])
def test_no_line_is_repaired_to_itself(before, line):
    assert not advice(f"{before}\n{line}\n{line}\n= 3").endswith(f": {line}")


@pytest.mark.parametrize(
    ("line", "is_shown"),
    [
        ("hf_token = x-y", False),
        ("wandb_api_key = x y", False),
        ("keep_tokens_separator = |", True),
        ("max_caption_tokens = 5 1 2", True),
    ],
)
def test_lines_with_secrets_alone_are_not_shown(line, is_shown):
    with pytest.raises(tomllib.TOMLDecodeError) as caught:
        tomllib.loads(line)
    assert (line in describe_error(line, caught.value)) == is_shown
