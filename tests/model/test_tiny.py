"""The tiny stand-in model: layout, bytes, and that every loader takes it for the real one."""

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage

from anima_train.core.files import sha256_file
from anima_train.core.text_batch import pad_states
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.file_kinds import LLM_ADAPTER_PREFIX, identify
from anima_train.model.llm_adapter import LLMAdapter, LLMAdapterShape
from anima_train.model.safetensors_io import load_into, open_header
from anima_train.model.text import find_tokenizer_folder, load_text_encoder, load_tokenizers, tokenize
from anima_train.model.tiny import CAPTIONS, tiny_paths, write_tiny
from anima_train.model.vae import load_vae, wan_key

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def hashes(folder):
    return {str(path.relative_to(folder)): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def load_transformer(path):
    file = open_header(path).stripped("net.")
    with torch.device("meta"):
        adapter = LLMAdapter(LLMAdapterShape.of(file.stripped(LLM_ADAPTER_PREFIX).entries))
        model = MiniTrainDIT(TransformerShape.of(file.entries), adapter)
    load_into(model, file, "model.transformer_path", torch.float32, CPU)
    return model


def test_layout_is_the_official_one(tiny):
    folder = tiny.tokenizer.parent
    assert tiny == tiny_paths(folder)
    assert set(hashes(folder)) == {
        "split_files/diffusion_models/anima-tiny.safetensors",
        "split_files/text_encoders/qwen_3_tiny.safetensors",
        "split_files/vae/qwen_image_vae.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "t5_tokenizer/tokenizer.json",
        "t5_tokenizer/tokenizer_config.json",
    }


def test_each_file_is_recognised_and_saved_as_the_real_one_is(tiny):
    for path, kind in ((tiny.transformer, "transformer"), (tiny.llm, "text_encoder"), (tiny.vae, "vae")):
        file = open_header(path)
        assert identify(file) == kind
        assert file.metadata == {"format": "pt"}
        assert {entry.dtype for entry in file.entries.values()} == {torch.bfloat16}
    assert all(name.startswith("net.") for name in open_header(tiny.transformer).entries)
    assert all(name.startswith("model.") for name in open_header(tiny.llm).entries)


def test_vae_has_every_tensor_of_the_real_one(tiny):
    with torch.device("meta"):
        real = AutoencoderKLQwenImage().state_dict()
    entries = open_header(tiny.vae).entries
    assert set(entries) == {wan_key(name) for name in real}
    assert all(len(entries[wan_key(name)].shape) == tensor.dim() for name, tensor in real.items())


@pytest.mark.slow
def test_same_seed_gives_the_same_bytes_in_another_process(tiny, tmp_path):
    script = "import sys, pathlib; from anima_train.model.tiny import write_tiny; write_tiny(pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env=environment)
    assert hashes(tmp_path) == hashes(tiny.tokenizer.parent)


def test_another_seed_gives_other_weights_and_the_same_tokenizers(tiny, tmp_path):
    first, second = hashes(tiny.tokenizer.parent), hashes(write_tiny(tmp_path, seed=1).tokenizer.parent)
    assert {name for name in first if first[name] == second[name]} == {name for name in first if "tokenizer" in name}


def test_writing_takes_less_than_five_seconds(tmp_path):
    start = time.perf_counter()
    write_tiny(tmp_path)
    assert time.perf_counter() - start < 5


def test_every_loader_takes_it_and_a_caption_becomes_a_velocity(tiny):
    tokenizers = load_tokenizers(
        find_tokenizer_folder("tokenizer", tiny.llm), find_tokenizer_folder("t5_tokenizer", tiny.llm)
    )
    encoder = load_text_encoder(tiny.llm, tokenizers, CPU)
    texts = texts_of(encoder, tokenizers, [CAPTIONS[0], "", CAPTIONS[-1]])
    model = load_transformer(tiny.transformer)
    latents = load_vae(tiny.vae, torch.float32, CPU).encode(pictures(3, 64, 48))
    with torch.no_grad():
        velocity = model(latents, torch.tensor([[0.1], [0.5], [0.9]]), texts)
        other = model(latents, torch.tensor([[0.1], [0.5], [0.9]]), texts_of(encoder, tokenizers, ["", "", "solo"]))
    assert velocity.shape == latents.shape
    assert 0.02 < velocity.std() < 1  # small beside the target, whose deviation is about 1.4, but alive
    changed = (velocity - other).abs().mean(dim=(1, 2, 3, 4))
    assert changed[1] < 1e-5  # the same empty caption, padded differently
    assert changed[[0, 2]].min() > 1e-4  # the text matters


def texts_of(encoder, tokenizers, captions):
    return pad_states(encoder.encode([tokenize(tokenizers, caption) for caption in captions]))


def test_every_block_takes_part(tiny):
    model = load_transformer(tiny.transformer)
    x = torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    context = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(1))
    model.requires_grad_(True)
    model(x, torch.tensor([[0.5]]), context).square().mean().backward()
    for name, parameter in model.named_parameters():
        if not name.startswith("llm_adapter."):
            assert parameter.grad.abs().max() > 1e-8, name


def test_tokenizers_know_their_captions(tiny):
    tokenizers = load_tokenizers(tiny.tokenizer, tiny.t5_tokenizer)
    for caption in CAPTIONS:
        tokens = tokenize(tokenizers, caption)
        assert tokenizers.qwen.decode(tokens.qwen_ids) == caption
        assert 2 not in tokens.t5_ids  # <unk>
        assert tokenizers.t5.decode(tokens.t5_ids, skip_special_tokens=True) == caption
    unknown = tokenize(tokenizers, "日本")
    assert tokenizers.qwen.decode(unknown.qwen_ids) == "日本"
    assert 2 in unknown.t5_ids
    rows = open_header(tiny.transformer).entries["net.llm_adapter.embed.weight"].shape[0]
    assert rows > len(tokenizers.t5)


def pictures(number, height, width, seed=5):
    """Smooth random pictures, made otherwise than those the calibration uses."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(number, 3, 6, 6, generator=generator) * 2 - 1
    return F.interpolate(small, size=(height, width), mode="bilinear")


@pytest.mark.parametrize("kind", ["smooth", "noise"])
def test_latents_of_pictures_have_the_spread_of_the_real_ones(tiny, kind):
    noise = torch.rand(16, 3, 96, 64, generator=torch.Generator().manual_seed(6)) * 2 - 1
    latents = load_vae(tiny.vae, torch.float32, CPU).encode(pictures(16, 96, 64) if kind == "smooth" else noise)
    deviations = latents.std(dim=(0, 2, 3, 4))
    assert deviations.min() > 1 / 3
    assert deviations.max() < 3
    assert latents.mean(dim=(0, 2, 3, 4)).abs().max() < 1.5


def test_latents_depend_on_the_picture_more_than_on_the_place(tiny):
    latents = load_vae(tiny.vae, torch.float32, CPU).encode(pictures(16, 96, 64))
    between_pictures = latents.var(dim=0).mean(dim=(1, 2, 3))
    assert (between_pictures / latents.var(dim=(0, 2, 3, 4))).mean() > 0.5


@pytest.mark.slow
def test_comfy_size_is_the_smallest_that_comfyui_loads(tmp_path):
    paths = write_tiny(tmp_path, comfy=True)
    file = open_header(paths.transformer).stripped("net.")
    assert TransformerShape.of(file.entries) == TransformerShape(
        num_blocks=10, width=256, head_dim=16, in_channels=16, context_width=1024, adaln_lora_dim=256
    )
    adapter = file.stripped(LLM_ADAPTER_PREFIX).entries
    assert LLMAdapterShape.of(adapter) == LLMAdapterShape(
        num_blocks=6, width=1024, head_dim=64, source_width=1024, target_width=1024, vocab_size=32128
    )
    assert len(adapter) == 118  # as many tensors and parameters as the real adapter
    assert sum(torch.Size(entry.shape).numel() for entry in adapter.values()) == 134_663_680
    tokenizers = load_tokenizers(paths.tokenizer, paths.t5_tokenizer)
    encoder = load_text_encoder(paths.llm, tokenizers, CPU)
    config = encoder.model.config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (1024, 2, 3072)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (16, 8, 128)
    context = load_transformer(paths.transformer).context(texts_of(encoder, tokenizers, ["solo", ""]))
    assert context.rows.shape[1] + context.num_zeros == 512
    assert context.rows.shape == (2, 16, 1024)
    assert torch.isfinite(context.rows).all()
