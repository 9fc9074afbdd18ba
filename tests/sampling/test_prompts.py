"""Prompts as ComfyUI reads them, and where that is not how captions are trained."""

import os
from pathlib import Path

import pytest
import torch

from anima_train.caching.text_encoding import CaptionEncoder
from anima_train.core.errors import ConfigError
from anima_train.model.loading import ModelSpec, load_llm_adapter
from anima_train.model.text import load_text_encoder, load_tokenizers, tokenize
from anima_train.model.tiny import write_tiny
from anima_train.sampling.prompts import context_of, prompt_states, tokenize_prompt, weighted_pieces

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).parents[2]
REAL = Path(os.environ.get("ANIMA_TOKENIZERS", REPOSITORY.parent / "shared" / "tokenizers"))
LONG = "1girl, solo, " * 200


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizers(files):
    return load_tokenizers(files.tokenizer, files.t5_tokenizer)


@pytest.fixture(scope="module")
def encode(files, tokenizers):
    """A prompt's context."""
    text_encoder = load_text_encoder(files.llm, tokenizers, CPU)
    adapter = load_llm_adapter(files, torch.float32, CPU)
    return lambda prompt: context_of(prompt_states(prompt, tokenizers, text_encoder), adapter)


@pytest.fixture(scope="module")
def trained(files, tokenizers):
    """What training caches for a caption."""
    model = ModelSpec(files, torch.float32, torch.float32, trains_llm_adapter=False, device=CPU, text_device=CPU)
    encoder = CaptionEncoder(model, tokenizers)
    return lambda caption: encoder.encode([caption])[0]["context"]


# Weights: what ComfyUI's own functions gave for these


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", []),
        ("a, b", [("a, b", 1.0)]),
        ("a (b:1.2) c", [("a ", 1.0), ("b", 1.2), (" c", 1.0)]),
        ("(a)", [("a", 1.1)]),
        ("((a))", [("a", 1.1 * 1.1)]),
        ("(a (b) c)", [("a ", 1.1), ("b", 1.1 * 1.1), (" c", 1.1)]),
        ("((a:1.2) b:1.5)", [("a", 1.2), (" b", 1.5)]),  # a number holds, whatever is around it
        ("((a) b:1.5)", [("a", 1.5 * 1.1), (" b", 1.5)]),
        ("(a (b:1.2))", [("a ", 1.1), ("b", 1.2)]),
        ("(a:1.2)(b)", [("a", 1.2), ("b", 1.1)]),
        ("(a:b:1.3)", [("a:b", 1.3)]),
        ("(a: 1.2 )", [("a", 1.2)]),
        ("(a:-0.5)", [("a", -0.5)]),
        ("(a:0)", [("a", 0.0)]),
        ("(a:1e1)", [("a", 10.0)]),
        # not numbers
        ("(a:)", [("a:", 1.1)]),
        ("(a:1,2)", [("a:1,2", 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(:1.2)", [(":1.2", 1.1)]),
        ("a:1.2", [("a:1.2", 1.0)]),
        ("(a:1.2(b))", [("a:1.2", 1.1), ("b", 1.1 * 1.1)]),
        # parentheses that do not match
        ("a (b", [("a ", 1.0), ("(b", 1.0)]),
        ("a) b", [("a) b", 1.0)]),
        ("a) (b:1.2)", [("a) (b:1.2)", 1.0)]),
        (") (a) ((b:1.2) c)", [(") (a) (", 1.0), ("b", 1.2), (" c)", 1.0)]),
        ("((a)", [("(a", 1.1)]),
        ("((a) b", [("((a) b", 1.0)]),
        ("()", []),
        ("(", [("(", 1.0)]),
        # escapes
        (r"name \(series\)", [("name (series)", 1.0)]),
        (r"(name \(series\):1.2)", [("name (series)", 1.2)]),
        (r"(a\)", [("(a)", 1.0)]),
        (r"\(a)", [("(a)", 1.0)]),
        (r"\\(a\\)", [(r"\(a\)", 1.0)]),
        (r"a\b", [(r"a\b", 1.0)]),
        # no weights
        ("[a] {b} <c:1.2>", [("[a] {b} <c:1.2>", 1.0)]),
    ],
)
def test_pieces_have_comfyuis_weights(prompt, expected):
    assert weighted_pieces(prompt) == expected


@pytest.mark.parametrize("number", ["inf", "nan", "-infinity", "1e999"])
def test_a_weight_that_is_not_finite_is_an_error_with_a_remedy(tokenizers, number):
    with pytest.raises(ConfigError, match=r'"to" has the weight .*; write \\\( and \\\) for'):
        tokenize_prompt(tokenizers, f"from here (to:{number})")


# Tokens


def check_tokens(tokenizers):
    tokens, weights = tokenize_prompt(tokenizers, r"1girl, (solo, smile:1.3), name \(series\) (x)")
    texts = ["1girl, ", "solo, smile", ", name (series) ", "x"]
    assert tokens.qwen_ids == [
        token for text in texts for token in tokenizers.qwen(text, add_special_tokens=False)["input_ids"]
    ]
    t5 = [tokenizers.t5(text)["input_ids"][:-1] for text in texts]
    weighted = [(token, weight) for ids, weight in zip(t5, [1.0, 1.3, 1.0, 1.1], strict=True) for token in ids]
    assert list(zip(tokens.t5_ids, weights, strict=True)) == [*weighted, (1, 1.0)]
    assert tokens.t5_ids != tokenize(tokenizers, "1girl, solo, smile, name (series) x").t5_ids


def test_each_piece_is_tokenized_by_itself_in_both_streams(tokenizers):
    check_tokens(tokenizers)


def test_the_same_with_the_real_tokenizers():
    if not (REAL / "qwen3_06b").is_dir():
        pytest.skip("the real tokenizers are not here; ANIMA_TOKENIZERS names their folder")
    real = load_tokenizers(REAL / "qwen3_06b", REAL / "t5")
    check_tokens(real)
    assert tokenize_prompt(real, "")[0].qwen_ids == [151643]
    assert tokenize_prompt(real, "")[0].t5_ids == [1]


@pytest.mark.parametrize("prompt", ["", "()"])
def test_an_empty_prompt_is_one_padding_token_and_the_end_of_t5(tokenizers, prompt):
    tokens, weights = tokenize_prompt(tokenizers, prompt)
    assert tokens.qwen_ids == [tokenizers.qwen.pad_token_id]
    assert (tokens.t5_ids, weights) == ([1], [1.0])


def test_nothing_is_cut_off(tokenizers):
    tokens, _ = tokenize_prompt(tokenizers, LONG)
    assert tokens.qwen_ids == tokenizers.qwen(LONG, add_special_tokens=False)["input_ids"]
    assert tokens.t5_ids == tokenizers.t5(LONG)["input_ids"]
    assert min(len(tokens.qwen_ids), len(tokens.t5_ids)) > 512


# Contexts


@pytest.mark.parametrize("text", ["x", "1girl, solo, blue eyes", "a sign: open", "1girl, solo, " * 30])
def test_a_plain_prompt_is_what_training_caches_for_the_caption(encode, trained, text):
    context, caption = encode(text), trained(text)
    assert context.shape == (1, 512, 64)
    assert torch.equal(context[0, : len(caption)], caption)
    assert not context[0, len(caption) :].any()


def test_the_empty_prompt_is_not_what_training_caches_for_the_empty_caption(encode, trained, error):
    assert error(encode("")[0, :1], trained("")) > 0.01


def test_a_long_prompt_has_a_row_for_each_token(encode, trained, tokenizers):
    assert encode(LONG).shape[1] == len(tokenize_prompt(tokenizers, LONG)[0].t5_ids) > 512
    assert len(trained(LONG)) == 512


def test_weights_multiply_rows_of_the_adapters_output(encode, tokenizers):
    plain, weighted = encode("(1girl:1.0) (solo:1.0)")[0], encode("(1girl:1.5) (solo:-2)")[0]
    first, space, second = (len(tokenizers.t5(text)["input_ids"]) - 1 for text in ("1girl", " ", "solo"))
    factors = torch.tensor([*[1.5] * first, *[1.0] * space, *[-2.0] * second, 1.0])
    assert torch.equal(weighted[: len(factors)], plain[: len(factors)] * factors[:, None])
    assert not weighted[len(factors) :].any()
