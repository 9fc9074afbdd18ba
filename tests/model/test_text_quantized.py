"""The text encoder in 8 and 4 bits: its states are near those in float32, and told as what they are."""

import importlib.util
import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from anima_train.caching.entries import text_identity
from anima_train.caching.text_encoding import CaptionEncoder
from anima_train.config.load import load_config
from anima_train.core.errors import ConfigError
from anima_train.evaluation.previews import Previews
from anima_train.model.loading import ModelSpec
from anima_train.model.safetensors_io import open_header
from anima_train.model.text import load_text_encoder, load_tokenizers, tokenize
from anima_train.model.text_quantized import check_library, stored_bytes
from anima_train.model.tiny import tiny_paths
from anima_train.sampling.generate import Request

CPU = torch.device("cpu")
CAPTION = "1girl, red circle, simple background"
KINDS = {"float8": 0.05, "nf4": 0.25}  # the largest error of the tiny model's states


@pytest.fixture(scope="module")
def files(tiny):
    return tiny_paths(tiny)


@pytest.fixture(scope="module")
def tokenizers(files):
    return load_tokenizers(files.tokenizer, files.t5_tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_near_the_exact_ones_and_the_error_is_told(files, tokenizers, kind, error, caplog):
    tokens = [tokenize(tokenizers, CAPTION)]
    [exact] = load_text_encoder(files.llm, tokenizers, CPU).encode(tokens)
    with caplog.at_level(logging.INFO):
        encoder = load_text_encoder(files.llm, tokenizers, CPU, kind)
    [found] = encoder.encode(tokens)
    assert found.source.dtype == torch.float32
    assert 0.1 * KINDS[kind] < error(found.source, exact.source) < KINDS[kind]
    [line] = [record.getMessage() for record in caplog.records if "text encoder is in" in record.getMessage()]
    told = float(line.partition("off by ")[2].partition(" %")[0]) / 100
    assert told == pytest.approx({"float8": 0.026, "nf4": 0.09}[kind], rel=0.15)


@pytest.mark.parametrize("kind", KINDS)
def test_the_linears_of_the_layers_alone_are_quantised_and_bytes_are_counted(files, tokenizers, kind):
    exact = load_text_encoder(files.llm, tokenizers, CPU).model
    model = load_text_encoder(files.llm, tokenizers, CPU, kind).model
    kinds = {type(module) for name, module in model.named_modules() if name.endswith("_proj")}
    assert len(kinds) == 1
    assert nn.Linear not in kinds
    norms = {name: each for name, each in exact.named_parameters() if "norm" in name}
    assert norms
    for name, parameter in norms.items():
        assert torch.equal(model.get_parameter(name), parameter)
    ids = torch.arange(5)
    assert torch.equal(model.embed_tokens(ids), exact.embed_tokens(ids))
    entries = open_header(files.llm).entries.items()
    counted = sum(stored_bytes(name.removeprefix("model."), entry, kind) for name, entry in entries)
    held = sum(each.nbytes for each in model.parameters())
    assert held <= counted * 1.35  # scales, and small weights that are padded to whole blocks
    assert held < 0.7 * sum(each.nbytes for each in exact.parameters())


def test_the_key_of_a_caption_depends_on_it(files):
    plain, nf4, float8 = (text_identity(files, True, torch.bfloat16, kind) for kind in (None, "nf4", "float8"))
    assert len({each.key(CAPTION) for each in (plain, nf4, float8)}) == 3
    assert plain == text_identity(files, True, torch.bfloat16)


def test_it_is_in_force_for_captions_and_for_the_prompts_of_previews(files, tokenizers, error):
    exact = ModelSpec(files, torch.float32, torch.float32, trains_llm_adapter=False, device=CPU, text_device=CPU)
    rounded = replace(exact, text_quantization="float8")
    captions = [CaptionEncoder(spec, tokenizers).encode([CAPTION])[0]["context"] for spec in (rounded, exact)]
    requests = [Request(prompt=CAPTION, cfg=1)]
    drawn = [Previews.of(requests, spec, files.llm.parent, "x") for spec in (rounded, exact)]
    previews = [each.frozen_contexts[CAPTION] for each in drawn]
    for found, expected in (captions, previews):
        assert 1e-3 < error(found, expected) < 0.2


def test_a_missing_library_is_told_with_its_command_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_library(None)
    check_library("float8")
    with pytest.raises(ConfigError, match=r'text_encoder_nf4: needs bitsandbytes; install it with pip install "anima-'):
        check_library("nf4")


@pytest.mark.slow
@pytest.mark.parametrize("key", ["text_encoder_nf4", "text_encoder_fp8"])
def test_a_run_trains_on_what_it_encodes_and_caches_it_anew(trainer, key):
    plain = trainer("plain", max_steps=1)
    rounded = trainer("rounded", max_steps=1, model={key: True})
    assert plain.losses != rounded.losses
    assert plain.losses == pytest.approx(rounded.losses, rel=0.1)
    assert load_config(trainer.config(model={key: True}), []).config.model.text_quantization is not None
