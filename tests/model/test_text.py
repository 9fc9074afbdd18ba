"""Tokenizers and the text encoder against transformers' own loaders."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import tokenizers as tokenizers_library
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3Model

from anima_train.core.errors import ModelFileError
from anima_train.core.text_batch import EncodedText, pad_states
from anima_train.model.text import (
    MAX_TOKENS,
    Tokens,
    count_tokens,
    find_tokenizer_folder,
    load_text_encoder,
    load_tokenizers,
    num_positions,
    text_encoder_identity,
    tokenize,
    tokenizer_identity,
)
from anima_train.model.tiny import write_tiny

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).parents[2]
REAL = Path(os.environ.get("ANIMA_TOKENIZERS", REPOSITORY.parent / "shared" / "tokenizers"))
CAPTIONS = ["1girl, solo, long hair", "", "a cat sleeps on a pile of old books, " * 4, "x"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizers(tiny):
    return load_tokenizers(tiny.tokenizer, tiny.t5_tokenizer)


@pytest.fixture(scope="module")
def real():
    if not (REAL / "qwen3_06b").is_dir():
        pytest.skip("the real tokenizers are not here; ANIMA_TOKENIZERS names their folder")
    return load_tokenizers(REAL / "qwen3_06b", REAL / "t5")


def save_qwen(folder, vocab_size=416, theta=1e6, **options):
    """A random Qwen3 in bfloat16, saved by transformers."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    model = Qwen3Model(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    model.bfloat16().save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory):
    return save_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def qwen_file(qwen_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "qwen.safetensors"
    save_file({f"model.{name}": tensor for name, tensor in load_file(qwen_folder / "model.safetensors").items()}, path)
    return path


def oracle_states(folder, ids):
    model = Qwen3Model.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        return model(torch.tensor([ids])).last_hidden_state[0]


# Tokens


def test_empty_caption_is_no_qwen_token_and_the_end_of_t5(tokenizers):
    assert tokenize(tokenizers, "") == Tokens(qwen_ids=[], t5_ids=[1])


def test_nothing_is_added_but_the_end_of_t5(tokenizers):
    caption = "1girl, solo, blue eyes"
    tokens = tokenize(tokenizers, caption)
    assert tokenizers.qwen.decode(tokens.qwen_ids) == caption
    assert tokens.t5_ids == tokenizers.t5(caption)["input_ids"]
    assert tokens.t5_ids.count(1) == 1


@pytest.mark.parametrize("words", [255, 256, 300])
def test_tokens_past_the_limit_are_cut_and_counted(tokenizers, words):
    tokens = tokenize(tokenizers, "solo, " * words)
    counts = count_tokens(tokenizers, ["solo, " * words])["solo, " * words]
    qwen = tokenizers.qwen("solo, " * words, add_special_tokens=False)["input_ids"]
    t5 = tokenizers.t5("solo, " * words)["input_ids"]  # two tokens a word and the end
    assert len(t5) == 2 * words + 1
    assert tokens.qwen_ids == qwen[:512]
    assert tokens.t5_ids == (t5 if words == 255 else [*t5[:511], 1])
    assert (counts.qwen, counts.t5) == (len(qwen), len(t5))
    assert counts.lost == max(0, len(qwen) - 512, len(t5) - 512)
    assert MAX_TOKENS == 512


def test_long_captions_log_nothing(tiny):
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    pair = load_tokenizers(tiny.tokenizer, tiny.t5_tokenizer)
    for tokenizer in (pair.qwen, pair.t5):
        tokenizer.model_max_length = 4
    logger.addHandler(handler)
    try:
        assert len(tokenize(pair, "solo, " * 20).t5_ids) == 41
        assert not records
        pair.qwen("solo, " * 20)
        assert records  # what would have been logged
    finally:
        logger.removeHandler(handler)


def test_truncation_and_padding_saved_in_a_tokenizer_are_not_used(tiny, tmp_path):
    folder = shutil.copytree(tiny.t5_tokenizer, tmp_path / "t5")
    saved = tokenizers_library.Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved.enable_truncation(8)
    saved.enable_padding(length=64)
    saved.save(str(folder / "tokenizer.json"))
    assert len(tokenize(load_tokenizers(tiny.tokenizer, folder), "solo, " * 10).t5_ids) == 21
    pair, plain = load_tokenizers(tiny.tokenizer, folder), load_tokenizers(tiny.tokenizer, tiny.t5_tokenizer)
    assert tokenize(pair, "solo") == tokenize(plain, "solo")
    assert count_tokens(pair, ["solo"]) == count_tokens(plain, ["solo"])


def test_real_qwen_tokenizer(real):
    assert tokenize(real, "").qwen_ids == []
    assert real.qwen.pad_token_id == 151643
    caption = "1girl, solo, \\(series\\), {x} ~ 日本 {}\nsecond line"
    ids = tokenize(real, caption).qwen_ids
    assert real.qwen.decode(ids) == caption
    assert max(ids) < 151643  # no special token


def test_real_t5_tokenizer_equals_its_own_file(real):
    assert tokenize(real, "").t5_ids == [1]
    assert len(real.t5) == 32100
    oracle = tokenizers_library.Tokenizer.from_file(str(REAL / "t5" / "tokenizer.json"))
    for caption in ["1girl, solo", "  two   spaces ", "ﬁne ｆｕｌｌ ① é", "日本 {x}~", "line\nbreak", "@artist_(name)"]:
        assert tokenize(real, caption).t5_ids == oracle.encode(caption).ids, caption


def test_real_tokenizers_cut_at_512(real):
    tokens = tokenize(real, "cat, " * 300)
    counts = count_tokens(real, ["cat, " * 300])["cat, " * 300]
    assert (len(tokens.qwen_ids), counts.qwen) == (512, 601)
    assert (len(tokens.t5_ids), counts.t5, tokens.t5_ids[-1]) == (512, 601, 1)


@pytest.mark.parametrize("limit", [513, 600, 601, 4096])
def test_real_tokenizers_read_as_far_as_they_are_told(real, limit):
    caption = "cat, " * 300
    tokens = tokenize(real, caption, limit)
    counts = count_tokens(real, [caption], limit)[caption]
    assert len(tokens.qwen_ids) == len(tokens.t5_ids) == min(601, limit)
    assert tokens.t5_ids[-1] == 1
    assert counts.lost == max(0, 601 - limit)


# Tokenizer folders


@pytest.mark.parametrize("slot", ["tokenizer", "t5_tokenizer"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "not a model", "pointer"])
def test_a_folder_that_is_no_tokenizer_is_an_error_that_names_its_key(tiny, tmp_path, slot, damage):
    folders = {"tokenizer": tiny.tokenizer, "t5_tokenizer": tiny.t5_tokenizer}
    bad = folders[slot] = tmp_path / "bad"
    if damage != "missing":
        bad.mkdir()
    if damage in ("truncated", "not a model", "pointer"):
        content = (tiny.tokenizer / "tokenizer.json").read_bytes()
        replacement = {
            "truncated": content[:500],
            "not a model": b"{}",
            "pointer": b"version https://git-lfs.github.com",
        }
        (bad / "tokenizer.json").write_bytes(replacement[damage])
    with pytest.raises(ModelFileError, match=rf"model\.{slot}_path: .*expected .*tokenizer\.json") as caught:
        load_tokenizers(folders["tokenizer"], folders["t5_tokenizer"])
    assert str(bad) in str(caught.value)


def test_a_damaged_vocabulary_is_an_error(tiny, tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0, ')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(ModelFileError, match=r"model\.tokenizer_path: .*damaged"):
        load_tokenizers(tmp_path, tiny.t5_tokenizer)


def test_swapped_tokenizers_are_noticed(tiny):
    with pytest.raises(ModelFileError, match=r"model\.tokenizer_path: .*is not Qwen3's tokenizer.*'<pad>'"):
        load_tokenizers(tiny.t5_tokenizer, tiny.tokenizer)
    with pytest.raises(ModelFileError, match=r"model\.t5_tokenizer_path: .*is not T5's tokenizer"):
        load_tokenizers(tiny.tokenizer, tiny.tokenizer)


def test_code_in_a_tokenizer_folder_is_not_run(tiny, tmp_path):
    folder = shutil.copytree(tiny.tokenizer, tmp_path / "qwen")
    (folder / "code.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\nclass Own: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", "code.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFileError, match="trust_remote_code"):
        load_tokenizers(folder, tiny.t5_tokenizer)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("place", ["llm", "llm/..", "llm/../.."])
@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("name", ["tokenizer", "t5_tokenizer"])
def test_tokenizers_are_found_beside_and_up_to_two_folders_above(tiny, tmp_path, place, kind, name):
    llm = tmp_path / "a" / "b" / "llm"
    llm.mkdir(parents=True)
    (llm / "model.safetensors").touch()
    folder = (llm.parent / place).resolve() / name
    shutil.copytree(tiny.tokenizer, folder)
    assert find_tokenizer_folder(name, llm if kind == "folder" else llm / "model.safetensors") == folder


def test_folders_without_a_vocabulary_and_farther_away_are_not_tokenizers(tiny, tmp_path):
    llm = tmp_path / "a" / "b" / "c"
    (llm / "tokenizer").mkdir(parents=True)
    shutil.copytree(tiny.tokenizer, tmp_path / "tokenizer")
    assert find_tokenizer_folder("tokenizer", llm / "model.safetensors") is None


def test_a_text_encoder_folder_can_be_its_own_tokenizer(tiny):
    assert find_tokenizer_folder("tokenizer", tiny.tokenizer) == tiny.tokenizer
    assert find_tokenizer_folder("t5_tokenizer", tiny.tokenizer) == tiny.t5_tokenizer


def test_tokenizer_identity_is_that_of_its_files(tiny, tmp_path):
    copy = shutil.copytree(tiny.tokenizer, tmp_path / "copy")
    identity = tokenizer_identity(tiny.tokenizer)
    (copy / "README.md").write_text("not part of it")
    assert tokenizer_identity(copy) == identity
    (copy / "special_tokens_map.json").write_text("{}")
    with_map = tokenizer_identity(copy)
    assert with_map != identity
    (copy / "special_tokens_map.json").rename(copy / "added_tokens.json")
    assert tokenizer_identity(copy) not in (identity, with_map)
    assert tokenizer_identity(tiny.t5_tokenizer) != identity


# The text encoder


@pytest.mark.parametrize("layout", ["model.", "bare", "with head and buffers", "folder", "shards"])
def test_every_layout_equals_from_pretrained(qwen_folder, tokenizers, tmp_path, error, layout):
    weights = load_file(qwen_folder / "model.safetensors")
    path = tmp_path / "qwen.safetensors"
    if layout == "model.":
        save_file({f"model.{name}": tensor for name, tensor in weights.items()}, path)
    elif layout == "bare":
        save_file(weights, path)
    elif layout == "with head and buffers":
        extra = {"lm_head.weight": torch.ones(416, 48), "model.rotary_emb.inv_freq": torch.ones(8)}
        save_file({**{f"model.{name}": tensor for name, tensor in weights.items()}, **extra}, path)
    elif layout == "folder":
        path = qwen_folder
    else:
        path = save_qwen(tmp_path / "shards", max_shard_size="40KB")
        assert len(list(path.glob("*.safetensors"))) > 1
    encoder = load_text_encoder(path, tokenizers, CPU)
    tokens = tokenize(tokenizers, CAPTIONS[0])
    [text] = encoder.encode([tokens])
    assert text.source.dtype == torch.float32
    assert error(text.source, oracle_states(qwen_folder, tokens.qwen_ids)) < 1e-6
    assert text.t5_ids.tolist() == tokens.t5_ids


def test_a_folder_keeps_the_rope_base_of_its_config(tokenizers, tmp_path, error):
    folder = save_qwen(tmp_path, theta=1e4)
    tokens = tokenize(tokenizers, CAPTIONS[0])
    [text] = load_text_encoder(folder, tokenizers, CPU).encode([tokens])
    assert error(text.source, oracle_states(folder, tokens.qwen_ids)) < 1e-6


def test_rotary_frequencies_are_exact(qwen_file, tokenizers):
    model = load_text_encoder(qwen_file, tokenizers, CPU).model
    expected = (1e6 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)).float()
    torch.testing.assert_close(model.rotary_emb.inv_freq, expected, rtol=1e-6, atol=0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_batch_equals_one_by_one_and_padding_is_removed(qwen_file, tokenizers, error):
    encoder = load_text_encoder(qwen_file, tokenizers, CPU)
    tokens = [tokenize(tokenizers, caption) for caption in CAPTIONS]
    together = encoder.encode(tokens)
    assert [len(text.source) for text in together] == [len(item.qwen_ids) for item in tokens]
    for text, item in zip(together, tokens, strict=True):
        [alone] = encoder.encode([item])
        assert error(text.source, alone.source) < 1e-5
        assert torch.equal(text.t5_ids, alone.t5_ids)
        assert text.t5_ids.tolist() == item.t5_ids
        assert text.source.untyped_storage().nbytes() == text.source.numel() * 4


def test_empty_captions_give_no_rows(qwen_file, tokenizers):
    encoder = load_text_encoder(qwen_file, tokenizers, CPU)
    for text in encoder.encode([tokenize(tokenizers, "")] * 2):
        assert text.source.shape == (0, 48)
        assert text.source.dtype == torch.float32
        assert text.t5_ids.tolist() == [1]
    assert encoder.encode([]) == []


def test_another_kind_of_file_is_named(tiny, tokenizers):
    with pytest.raises(
        ModelFileError, match=r"model\.llm_path: expects a Qwen3 text encoder.*looks like the Qwen-Image"
    ):
        load_text_encoder(tiny.vae, tokenizers, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("embed_tokens.weight"), r"embed_tokens\.weight is missing"),
        (
            lambda weights: weights.pop("layers.1.self_attn.k_norm.weight"),
            r"1 keys missing: layers\.1\.self_attn\.k_norm",
        ),
        (lambda weights: weights.update(extra=torch.ones(1)), "1 keys unexpected: extra"),
        (lambda weights: weights.update({"norm.weight": torch.ones(3)}), r"1 shapes differ: norm\.weight \(3,\)"),
        (lambda weights: weights["norm.weight"].fill_(torch.nan), r"tensor norm\.weight: 48 of its 48 values are NaN"),
    ],
)
def test_keys_shapes_and_values_have_to_be_right(qwen_folder, tokenizers, tmp_path, change, message):
    weights = load_file(qwen_folder / "model.safetensors")
    change(weights)
    path = tmp_path / "qwen.safetensors"
    save_file(weights, path)
    with pytest.raises(ModelFileError, match=message) as caught:
        load_text_encoder(path, tokenizers, CPU)
    assert str(path) in str(caught.value)


def break_folder(folder, damage):
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "no weights":
        weights.unlink()
    elif damage == "twice":
        shutil.copy(weights, folder / "copy.safetensors")
    elif damage == "no config":
        config.unlink()
    elif damage == "broken config":
        config.write_text("{")
    elif damage == "another model":
        config.write_text(config.read_text().replace('"qwen3"', '"llama"'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no weights", r"holds no \.safetensors file"),
        ("twice", r"holds 24 tensors more than once"),
        ("no config", r"config\.json cannot be read"),
        ("broken config", r"config\.json cannot be read"),
        ("another model", r'model_type is "llama", expected "qwen3"'),
    ],
)
def test_a_broken_folder_is_an_error(qwen_folder, tokenizers, tmp_path, damage, message):
    folder = shutil.copytree(qwen_folder, tmp_path / "qwen")
    break_folder(folder, damage)
    with pytest.raises(ModelFileError, match=rf"model\.llm_path: .*{message}"):
        load_text_encoder(folder, tokenizers, CPU)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_an_error(tokenizers, tmp_path):
    folder = save_qwen(tmp_path, vocab_size=399)
    with pytest.raises(ModelFileError, match=r"embeddings for 399 tokens.*model\.tokenizer_path has 400"):
        load_text_encoder(folder, tokenizers, CPU)


def test_text_encoder_identity_is_that_of_weights_and_config(qwen_folder, qwen_file, tmp_path):
    folder = shutil.copytree(qwen_folder, tmp_path / "qwen")
    identity = text_encoder_identity(folder)
    assert identity == text_encoder_identity(qwen_folder)
    (folder / "README.md").write_text("not part of it")
    assert text_encoder_identity(folder) == identity
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("1000000", "10000"))
    assert text_encoder_identity(folder) != identity
    copy = tmp_path / "other_name.safetensors"
    shutil.copy(qwen_file, copy)
    assert text_encoder_identity(copy) == text_encoder_identity(qwen_file)
    with open(copy, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x11")
    assert text_encoder_identity(copy) != text_encoder_identity(qwen_file)


def test_a_text_encoder_says_how_much_it_reads(qwen_folder, qwen_file):
    assert (
        num_positions(qwen_folder) == json.loads((qwen_folder / "config.json").read_text())["max_position_embeddings"]
    )
    assert num_positions(qwen_file) == 32_768


# Batches


def test_pad_states_pads_with_zeros_and_masks_them():
    first = EncodedText(torch.ones(3, 4), torch.tensor([5, 6, 1]))
    second = EncodedText(torch.full((1, 4), 2.0), torch.tensor([7, 8, 9, 1]))
    empty = EncodedText(torch.empty(0, 4), torch.tensor([1]))
    states = pad_states([first, second, empty])
    assert states.source[:, :, 0].tolist() == [[1, 1, 1], [2, 0, 0], [0, 0, 0]]
    assert states.source.dtype == torch.float32
    assert states.source_mask.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert states.t5_ids.tolist() == [[5, 6, 1, 0], [7, 8, 9, 1], [1, 0, 0, 0]]
    assert states.t5_mask.tolist() == [[True, True, True, False], [True] * 4, [True, False, False, False]]


def test_pad_states_of_empty_captions_only_has_one_masked_row():
    states = pad_states([EncodedText(torch.empty(0, 4), torch.tensor([1]))] * 2)
    assert states.source.shape == (2, 1, 4)
    assert not states.source.any()
    assert states.source_mask.tolist() == [[False], [False]]
    assert states.t5_mask.tolist() == [[True], [True]]


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_config_of_a_folder_cannot_name_code_on_the_hub(qwen_folder, tokenizers, tmp_path, key):
    """transformers would fetch these kernels and run them."""
    folder = shutil.copytree(qwen_folder, tmp_path / "qwen")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: "owner/kernels", "auto_map": {"AutoModel": "a.b"}}))
    assert load_text_encoder(folder, tokenizers, CPU).model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "large"), ("hidden_size", -1), ("hidden_act", "none"), ("num_attention_heads", 0),
        ("layer_types", ["a"]), ("rope_parameters", "x"), ("num_hidden_layers", None),
    ],
)  # fmt: skip
def test_config_of_a_folder_that_makes_no_sense_is_an_error(qwen_folder, tokenizers, tmp_path, key, value):
    folder = shutil.copytree(qwen_folder, tmp_path / "qwen")
    config = json.loads((folder / "config.json").read_text())
    config.pop("head_dim", None)
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ModelFileError, match=r"model\.llm_path: "):
        load_text_encoder(folder, tokenizers, CPU)
