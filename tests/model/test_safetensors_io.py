"""Model files: recognised and checked from the header alone, read exactly, refused with a diagnosis."""

import io
import json
import os
import pickle
import random
import struct
import time
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from anima_train.core.errors import ModelFileError
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.file_kinds import LLM_ADAPTER_PREFIX, TRANSFORMER_PREFIXES, identify, key_prefix, validate_kind
from anima_train.model.llm_adapter import LLMAdapter, LLMAdapterShape
from anima_train.model.safetensors_io import DTYPES, fingerprint, load_into, open_header, read_tensors, write_tensors

CPU = torch.device("cpu")


# Small files with the keys of real ones ------------------------------------------------------------------------------


def zeros(shapes, prefix=""):
    return {prefix + name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}


def transformer_shapes(with_llm_adapter=True):
    with torch.device("meta"):
        adapter = LLMAdapter(LLMAdapterShape(1, 16, 8, 12, 20, 30)) if with_llm_adapter else None
        model = MiniTrainDIT(TransformerShape(2, 48, 24, 16, 20, 8), adapter)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def adapter_shapes():
    shapes = transformer_shapes()
    return {name.removeprefix(LLM_ADAPTER_PREFIX): shape for name, shape in shapes.items() if name.startswith("llm_")}


def llm_shapes(qk_norm=True, bias=False, **extra):
    layer = {
        "input_layernorm.weight": (8,),
        "post_attention_layernorm.weight": (8,),
        **{f"self_attn.{name}_proj.weight": (8, 8) for name in "qkvo"},
        **{f"mlp.{name}_proj.weight": (8, 8) for name in ("gate", "up", "down")},
        **({f"self_attn.{name}_norm.weight": (4,) for name in "qk"} if qk_norm else {}),
        **({f"self_attn.{name}_proj.bias": (8,) for name in "qkv"} if bias else {}),
        **extra,
    }
    layers = {f"layers.{number}.{name}": shape for number in range(2) for name, shape in layer.items()}
    return {"embed_tokens.weight": (32, 8), "norm.weight": (8,), **layers}


WAN_VAE = {
    "conv1.weight": (32, 32, 1, 1, 1),
    "conv2.weight": (16, 16, 1, 1, 1),
    "encoder.conv1.weight": (4, 3, 3, 3, 3),
    "encoder.downsamples.0.residual.0.gamma": (4, 1, 1, 1),
    "decoder.upsamples.0.residual.2.weight": (4, 4, 3, 3, 3),
    "decoder.head.2.weight": (3, 4, 3, 3, 3),
}
OURS = {
    "transformer": zeros(transformer_shapes(), "net."),
    "cosmos": zeros(transformer_shapes(with_llm_adapter=False), "net."),
    "llm_adapter": zeros(adapter_shapes()),
    "text_encoder": zeros(llm_shapes(), "model."),
    "vae": zeros(WAN_VAE),
}
FOREIGN = {
    "a LoRA": (
        zeros({"diffusion_model.blocks.0.mlp.layer1.lora_A.weight": (2, 8)}),
        zeros({"lora_unet_blocks_0_mlp_layer1.lora_down.weight": (2, 8), "lora_unet_blocks_0_mlp_layer1.alpha": ()}),
        zeros({"base_model.model.blocks.0.mlp.layer1.lora_B.weight": (8, 2)}),
        zeros({"transformer.transformer_blocks.0.attn1.to_q.lora.up.weight": (8, 2)}),
    ),
    "an adapter that is no plain LoRA": (
        zeros({"lycoris_blocks_0_mlp_layer1.lokr_w1": (2, 2)}),
        zeros({"lora_unet_blocks_0_mlp_layer1.hada_w1_a": (2, 2)}),
        zeros({"diffusion_model.final_layer.linear.diff": (2, 2)}),
    ),
    "an adapter of a kind that is not read": (
        zeros({"lllite_unet_blocks_1_self_attn_q_proj.down.0.weight": (2, 2)}),
        zeros({"oft_unet_blocks_0_mlp_layer1.oft_blocks": (2, 2, 2)}),
        zeros({"base_model.model.blocks.0.mlp.layer1.lora_magnitude_vector.weight": (8,)}),
    ),
    "Cosmos-Predict1": (zeros({"net.x_embedder.proj.1.weight": (8, 68), "net.blocks.block0.blocks.0.x": (1,)}),),
    "another prefix": (zeros(transformer_shapes(), "module.net."),),
    "Stable Diffusion XL": (
        zeros(
            {
                "model.diffusion_model.input_blocks.0.0.weight": (4, 4, 3, 3),
                "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": (8, 4),
                "first_stage_model.encoder.down.0.block.0.conv1.weight": (4, 4, 3, 3),
            }
        ),
    ),
    "Stable Diffusion 1": (
        zeros({"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (8, 4)}),
    ),
    "U-Net": (zeros({"input_blocks.0.0.weight": (4, 4, 3, 3)}),),
    "Flux transformer": (
        zeros({"double_blocks.0.img_attn.qkv.weight": (8, 8)}),
        zeros({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (8, 8)}),
    ),
    "Wan video": (zeros({"blocks.0.cross_attn.norm_q.weight": (8,), "patch_embedding.weight": (8, 16, 1, 2, 2)}),),
    "diffusers names, not in ComfyUI's": (zeros({"transformer_blocks.0.attn1.to_q.weight": (8, 8)}),),
    "Gemma": (zeros(llm_shapes(**{"pre_feedforward_layernorm.weight": (8,)}), "model."),),
    "mixture-of-experts": (zeros(llm_shapes(**{"mlp.experts.0.up_proj.weight": (8, 8)}), "model."),),
    "Qwen2": (zeros(llm_shapes(qk_norm=False, bias=True), "model."), zeros(llm_shapes(qk_norm=False, bias=True))),
    "not Qwen3": (zeros(llm_shapes(qk_norm=False), "model."), zeros(llm_shapes(), "model.language_model.")),
    "CLIP": (zeros({"text_model.encoder.layers.0.self_attn.q_proj.weight": (8, 8)}),),
    "T5": (
        zeros({"shared.weight": (8, 8), "encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8)}),
        zeros({"encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8)}),
    ),
    "Wan 2.2": (zeros({"encoder.downsamples.0.downsamples.0.residual.0.gamma": (4, 1, 1, 1)}),),
    "SD or Flux VAE": (zeros({"encoder.conv_in.weight": (4, 3, 3, 3), "encoder.down.0.block.0.norm1.weight": (4,)}),),
    "VAE in diffusers names": (
        zeros({"encoder.conv_in.weight": (4, 3, 3, 3, 3), "encoder.mid_block.resnets.0.conv1.weight": (4, 4, 3, 3, 3)}),
    ),
    r"unknown kind \(its first key is a\)": (zeros({"b": (1,), "a": (1,)}),),
    r"unknown kind \(it holds no tensors\)": ({},),
}
SLOTS = {
    "transformer": ("model.transformer_path", ("transformer",), "an Anima transformer"),
    "llm_adapter": ("model.llm_adapter_path", ("llm_adapter", "transformer"), "an Anima LLM adapter"),
    "text_encoder": ("model.llm_path", ("text_encoder",), "a Qwen3 text encoder"),
    "vae": ("model.vae_path", ("vae",), "the Qwen-Image VAE in Wan names"),
}
LOOKS = {
    "transformer": "an Anima transformer",
    "cosmos": r"a Cosmos-Predict2 transformer \(no LLM adapter\)",
    "llm_adapter": "an Anima LLM adapter",
    "text_encoder": "a Qwen3 text encoder",
    "vae": "the Qwen-Image VAE in Wan names",
}


def saved(folder, tensors, name="model.safetensors", **options):
    path = folder / name
    save_file(tensors, path, **options)
    return path


@pytest.mark.parametrize("kind", OURS)
def test_each_kind_is_recognised_and_accepted_in_its_slot(tmp_path, kind):
    file = open_header(saved(tmp_path, OURS[kind]))
    assert identify(file) == kind
    slot = "transformer" if kind == "cosmos" else kind
    validate_kind(file, slot, kind)


@pytest.mark.parametrize("prefix", TRANSFORMER_PREFIXES)
@pytest.mark.parametrize("with_llm_adapter", [True, False])
def test_transformer_is_recognised_under_every_accepted_prefix(tmp_path, prefix, with_llm_adapter):
    shapes = transformer_shapes(with_llm_adapter)
    tensors = zeros(shapes, prefix) | {f"{prefix}pos_embedder.seq": torch.arange(4)}  # derived buffers do not count
    file = open_header(saved(tmp_path, tensors))
    kind = "transformer" if with_llm_adapter else "cosmos"
    assert identify(file) == kind
    validate_kind(file, "transformer", kind)
    assert key_prefix(file, kind) == prefix
    assert set(file.stripped(prefix).entries) == {*shapes, "pos_embedder.seq"}


@pytest.mark.parametrize("prefix", ["", "llm_adapter.", "net.llm_adapter."])
def test_adapter_is_recognised_under_any_prefix(tmp_path, prefix):
    file = open_header(saved(tmp_path, zeros(adapter_shapes(), prefix)))
    assert identify(file) == "llm_adapter"
    assert key_prefix(file, "llm_adapter") == prefix
    validate_kind(file, "llm_adapter")


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_qwen3_is_recognised_with_and_without_its_prefix_and_head(tmp_path, prefix):
    tensors = zeros(llm_shapes(), prefix) | {"lm_head.weight": torch.zeros(32, 8)}
    validate_kind(open_header(saved(tmp_path, tensors)), "text_encoder")


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("kind", OURS)
def test_our_own_files_in_the_wrong_slot_are_named(tmp_path, slot, kind):
    key, accepted, expected = SLOTS[slot]
    if kind in accepted:
        return
    path = saved(tmp_path, OURS[kind])
    with pytest.raises(
        ModelFileError, match=f"^{key}: expects {expected}; .*model.safetensors looks like {LOOKS[kind]}"
    ):
        validate_kind(open_header(path), slot, *accepted)


@pytest.mark.parametrize(("looks", "tensors"), [(looks, file) for looks, files in FOREIGN.items() for file in files])
def test_foreign_files_are_named_in_every_slot(tmp_path, looks, tensors):
    file = open_header(saved(tmp_path, tensors))
    for slot, (key, accepted, expected) in SLOTS.items():
        with pytest.raises(ModelFileError, match=f"^{key}: expects {expected}; .* looks like .*{looks}"):
            validate_kind(file, slot, *accepted)


def test_wrong_slot_tells_where_the_file_belongs(tmp_path):
    file = open_header(saved(tmp_path, OURS["vae"]))
    with pytest.raises(ModelFileError, match=r"it belongs in model\.vae_path$"):
        validate_kind(file, "transformer")
    file = open_header(saved(tmp_path, OURS["cosmos"]))
    with pytest.raises(ModelFileError, match=r"give the LLM adapter as model\.llm_adapter_path"):
        validate_kind(file, "transformer")


def test_kind_is_told_from_the_header_alone(tmp_path):
    # 128 GiB of holes: reading them would take minutes.
    shapes = {name: [1] * len(shape) for name, shape in transformer_shapes().items()}
    shapes["blocks.0.mlp.layer1.weight"] = [2**36]
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw(described(shapes)))
    os.truncate(path, path.stat().st_size + sum(2 * (2**36 if shape == [2**36] else 1) for shape in shapes.values()))
    started = time.monotonic()
    with pytest.raises(ModelFileError, match="looks like an Anima transformer"):
        validate_kind(open_header(path), "vae")
    validate_kind(open_header(path), "transformer")
    assert time.monotonic() - started < 2


# Files that are something else ---------------------------------------------------------------------------------------


def described(shapes, dtype="BF16", size=2):
    """A header for these shapes, one tensor after the other."""
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + size * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    return header


def raw(header, data=b"", pad_to=0):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (pad_to - len(text))
    return struct.pack("<Q", len(text)) + text + data


def refused(tmp_path, content, match):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=match) as caught:
        open_header(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "diagnosis"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "git-lfs pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html><head><title>404</title>", "HTML page.*download it again"),
        (b"\xef\xbb\xbf\r\n  <HTML>{", "HTML page"),
        (b"<html{}{}{}{}", "HTML page"),
        (b"GGUF\x03\x00\x00\x00{\x00\x00\x00\x00\x00\x00\x00", "GGUF file.*bf16"),
        (b"PK\x03\x04\x14\x00\x00\x00{", "pickle.*never loaded"),
        (b'{"error": "not found"}', "not a safetensors file"),
        (b"\x00" * 100, "not a safetensors file"),
        (b"\x93NUMPY\x01\x00v\x00{'descr'", "not a safetensors file"),
    ],
)
def test_other_files_are_diagnosed(tmp_path, content, diagnosis):
    refused(tmp_path, content, diagnosis)


def test_missing_file_and_folder_are_told_apart(tmp_path):
    with pytest.raises(ModelFileError, match="there is no such file"):
        open_header(tmp_path / "missing.safetensors")
    with pytest.raises(ModelFileError, match="this is a folder"):
        open_header(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ModelFileError, match="there is no such file"):
        open_header(tmp_path / "pipe.safetensors")
    with pytest.raises(ModelFileError, match="cannot be read"):
        open_header(tmp_path / ("x" * 300))


class Canary:
    """Unpickling one makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", 0, 1, 2, 3, 4, 5])
def test_pickles_are_named_and_never_executed(tmp_path, form):
    canary = tmp_path / "canary"
    if isinstance(form, int):
        content = pickle.dumps(Canary(canary), protocol=form)
        pickle.loads(content)
    else:
        buffer = io.BytesIO()
        torch.save({"state_dict": Canary(canary)}, buffer, _use_new_zipfile_serialization=form == "zip")
        content = buffer.getvalue()
        torch.load(io.BytesIO(content), weights_only=False)
    canary.rmdir()  # it was there: the file does run code when it is opened
    refused(tmp_path, content, "pickle.*never loaded; use .safetensors")
    assert not canary.exists()


@pytest.mark.parametrize("pad_to", [0x280, 0x380, 0x480, 0x580, 0x0A08, 0x2020])
def test_header_lengths_that_look_like_a_pickle_or_text_are_no_matter(tmp_path, pad_to):
    path = tmp_path / "model.safetensors"
    content = raw(described({"a": [2]}), b"\x00" * 4, pad_to=pad_to)
    path.write_bytes(content)
    assert torch.equal(dict(read_tensors(open_header(path)))["a"], torch.zeros(2, dtype=torch.bfloat16))
    refused(tmp_path, content[:-1], "truncated")
    refused(tmp_path, content[:100], "truncated")


def test_a_file_cut_anywhere_is_truncated(tmp_path):
    tensors = {name: torch.randn(shape) for name, shape in (("a", (3, 5)), ("b", (7,)), ("c", ()))}
    content = saved(tmp_path, tensors).read_bytes()
    (header_end,) = struct.unpack("<Q", content[:8])
    for length in range(len(content)):
        kind = "truncated" if length > 8 else "only its first bytes" if length else "empty"
        message = refused(tmp_path, content[:length], kind)
        assert "download it again" in message
        if length >= 8 + header_end:
            assert f"needs {len(content):,} bytes, and has {length:,}" in message


def test_a_file_that_shrinks_after_the_header_was_read_is_truncated(tmp_path):
    path = saved(tmp_path, {"a": torch.zeros(100), "b": torch.zeros(100)})
    file = open_header(path)
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(ModelFileError, match="tensor b: the file ends in the middle"):
        list(read_tensors(file))
    with pytest.raises(ModelFileError, match="tensor b: the file ends in the middle"):
        fingerprint(file)


# Header attacks ------------------------------------------------------------------------------------------------------

GOOD = {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}


def attack(**changed):
    return raw({"a": {**GOOD, **changed}}, b"\x00" * 4)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{" + b" " * 100,
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 10**8 + 1) + b"{}",
        struct.pack("<Q", 0) + b"{}",
        struct.pack("<Q", 1) + b"{}",
        raw(b"[]"),
        raw(b"{"),
        raw(b"{}{}"),
        raw(b"{'a': 1}"),
        raw(b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        raw(b'{"a": ' + b'{"a": ' * 200_000 + b"1" + b"}" * 200_001),
        raw(b'{"a\xff": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}', b"\x00" * 4),
        raw('{"a": 1}'.encode("utf-16")),
        raw(b'{"a": ' + b"9" * 10_000 + b"}"),
        raw(f'{{"a": {json.dumps(GOOD)}, "a": {json.dumps(GOOD)}}}'.encode(), b"\x00" * 4),
        raw(b'{"a": {"dtype": "BF16", "dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}', b"\x00" * 4),
        raw({"a": 1}),
        raw({"a": None}),
        raw({"a": []}),
        raw({"a": "BF16"}),
        raw({"a": {}}),
        raw({"__metadata__": 1}),
        raw({"__metadata__": []}),
        raw({"__metadata__": {"a": 1}}),
        raw({"__metadata__": {"a": None}}),
        raw({"a\x1b[31m": GOOD}, b"\x00" * 4),
        raw({"a\ud800": GOOD}, b"\x00" * 4),
        raw({"a" * 10_000: GOOD}, b"\x00" * 4),
        attack(dtype="bf16"),
        attack(dtype="F4"),
        attack(dtype="x" * 10_000),
        attack(dtype="\x1b[31m"),
        attack(dtype=16),
        attack(dtype=None),
        attack(dtype=["BF16"]),
        attack(shape=2),
        attack(shape="2"),
        attack(shape=None),
        attack(shape={"0": 2}),
        attack(shape=[2.0]),
        attack(shape=[True, 2]),
        attack(shape=["2"]),
        attack(shape=[[2]]),
        attack(shape=[-2]),
        attack(shape=[-1, -2]),
        attack(shape=[3]),
        attack(shape=[1] * 5000 + [2]),
        attack(shape=[2**64 + 2]),
        attack(shape=[2**63, 2]),
        attack(shape=[2**62, 4, 0], data_offsets=[0, 0]),
        attack(shape=[2**63, 0], data_offsets=[0, 0]),
        attack(data_offsets=None),
        attack(data_offsets=4),
        attack(data_offsets=[4]),
        attack(data_offsets=[0, 2, 4]),
        attack(data_offsets=[0.0, 4.0]),
        attack(data_offsets=[False, 4]),
        attack(data_offsets=["0", "4"]),
        attack(data_offsets=[-4, 0]),
        attack(data_offsets=[4, 0]),
        attack(data_offsets=[4, 8]),
        attack(data_offsets=[0, 2**64]),
        raw({"a": GOOD, "b": GOOD}, b"\x00" * 4),
        raw({"a": GOOD, "b": {**GOOD, "data_offsets": [2, 6]}}, b"\x00" * 6),
        raw({"a": GOOD, "b": {**GOOD, "data_offsets": [6, 10]}}, b"\x00" * 10),
        raw({"a": {**GOOD, "data_offsets": [2, 6]}}, b"\x00" * 6),
        raw({"a": GOOD}, b"\x00" * 5),
        raw({}, b"\x00"),
    ],
    ids=lambda content: str(content[8:60]),
)
def test_a_header_that_no_writer_makes_is_refused_as_such(tmp_path, content):
    message = refused(tmp_path, content, "damaged|not a safetensors file|cannot be read|truncated")
    assert message.isprintable()
    assert len(message) < 1500


def test_empty_but_valid_headers_are_read(tmp_path):
    path = tmp_path / "model.safetensors"
    for header in ({}, {"__metadata__": None}, {"__metadata__": {}}):
        path.write_bytes(raw(header))
        assert open_header(path).entries == {}
    path.write_bytes(raw({"a": {**GOOD, "more": 1}}, b"\x00" * 4, pad_to=4000))
    assert open_header(path).entries["a"].shape == (2,)


def test_flipped_bytes_give_an_error_of_ours_or_a_file_that_reads(tmp_path):
    tensors = {f"net.{name}": torch.randn(shape) for name, shape in (("blocks.0.mlp.layer1.weight", (3, 4)), ("b", ()))}
    tensors |= {name: tensor[:1] for name, tensor in OURS["llm_adapter"].items() if tensor.dim()}
    content = saved(tmp_path, tensors, metadata={"format": "pt"}).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    path = tmp_path / "flipped.safetensors"
    dice = random.Random(0)
    outcomes = {"refused": 0, "read": 0}
    for _ in range(500):
        changed = bytearray(content)
        for _ in range(dice.choice((1, 1, 2, 5))):
            changed[dice.randrange(8 + length)] = dice.choice((dice.randrange(256), *b'"{}[]:,0123456789-'))
        path.write_bytes(changed)
        try:
            file = open_header(path)
            dict(read_tensors(file))
            fingerprint(file)
            for slot, (_, accepted, _) in SLOTS.items():
                validate_kind(file, slot, *accepted)
        except ModelFileError:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
    assert outcomes["refused"] > 400


# What a file of the right kind may lack ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("transformer", {"net.blocks.0.self_attn.q_norm.weight": None}, r"q_norm\.weight is missing"),
        ("transformer", {"net.llm_adapter.embed.weight": None}, r"the tensor embed\.weight is missing"),
        ("transformer", {"net.x_embedder.proj.1.weight": (3,)}, r"weight has the shape \(3,\), expected 2 sides"),
        ("transformer", {"net.blocks.0.cross_attn.k_proj.weight": (0, 4)}, r"has the shape \(0, 4\)"),
        ("transformer", {"net.blocks.999999999.x": (1,)}, "1 blocks missing among 3: 2$"),
        ("transformer", {"net.llm_adapter.blocks.7.x": (1,)}, "1 blocks missing among 2: 1$"),
        ("transformer", {f"vae.{n}": (1,) for n in range(6)}, r"6 keys unexpected: vae\.0, .* vae\.4, \.\.\.$"),
        ("llm_adapter", {"blocks.0.cross_attn.k_proj.weight": None}, r"k_proj\.weight is missing"),
        ("text_encoder", {"model.embed_tokens.weight": None}, r"embed_tokens\.weight is missing"),
        ("text_encoder", {"extra": (1,)}, "1 keys unexpected: extra"),
        ("vae", {"encoder.downsamples.0.residual.0.gamma": ()}, r"has the shape \(\), expected 4 sides"),
    ],
)
def test_files_from_which_no_module_can_be_built_are_refused(tmp_path, kind, changes, message):
    tensors = OURS[kind] | zeros({name: shape for name, shape in changes.items() if shape is not None})
    for name in [name for name, shape in changes.items() if shape is None]:
        del tensors[name]
    _, accepted, _ = SLOTS[kind]
    with pytest.raises(ModelFileError, match=message):
        validate_kind(open_header(saved(tmp_path, tensors)), kind, *accepted)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
def test_quantised_files_are_refused(tmp_path, dtype):
    tensors = dict(OURS["transformer"])
    for name in ("net.blocks.0.mlp.layer1.weight", "net.blocks.1.mlp.layer1.weight"):
        tensors[name] = tensors[name].to(dtype)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ModelFileError, match=rf"model.transformer_path: .* is quantised \(2 {kind} tensors\).*bf16"):
        validate_kind(open_header(saved(tmp_path, tensors)), "transformer")


def small():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 8))


def meta_small():
    with torch.device("meta"):
        return small()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_into_gives_every_parameter_its_values_in_the_dtype_asked_for(tmp_path, dtype):
    source = small()
    module = meta_small()
    load_into(module, open_header(saved(tmp_path, source.state_dict())), "what", dtype, CPU)
    for (name, found), (_, expected) in zip(module.named_parameters(), source.named_parameters(), strict=True):
        assert torch.equal(found, expected.detach().to(dtype)), name
        assert not found.requires_grad


def test_load_into_lists_missing_unexpected_and_misshapen_keys_with_their_number(tmp_path):
    tensors = {f"extra.{number}": torch.zeros(1) for number in range(7)}
    tensors |= {"0.weight": torch.zeros(3, 4), "0.bias": torch.zeros(4)}
    module = meta_small()
    with pytest.raises(ModelFileError) as caught:
        load_into(module, open_header(saved(tmp_path, tensors)), "model.x", torch.float32, CPU)
    assert caught.value.problems == [
        "model.x: 2 keys missing: 1.weight, 1.bias",
        "model.x: 7 keys unexpected: extra.0, extra.1, extra.2, extra.3, extra.4, ...",
        "model.x: 1 shapes differ: 0.weight (3, 4) instead of (4, 3)",
    ]
    assert all(parameter.is_meta for parameter in module.parameters())


# Reading and writing -------------------------------------------------------------------------------------------------


def every_dtype():
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        values = torch.randint(0, 2, (3, 5), generator=generator)
        tensors[f"matrix.{name}"] = values.to(dtype) if dtype != torch.float8_e8m0fnu else values.float().to(dtype)
        tensors[f"scalar.{name}"] = tensors[f"matrix.{name}"][1, 2].clone()
        tensors[f"empty.{name}"] = tensors[f"matrix.{name}"][:, :0].clone()
    tensors["odd"] = torch.randn(7, 3, generator=generator).to(torch.float8_e4m3fn)
    tensors["float"] = torch.randn(1000, generator=generator)
    return tensors


def equal(found, expected):
    return (
        found.dtype == expected.dtype
        and found.shape == expected.shape
        and torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
    )


def test_tensors_are_read_as_the_safetensors_library_reads_them(tmp_path):
    tensors = {name: tensor for name, tensor in every_dtype().items() if "E8M0" not in name}
    path = saved(tmp_path, tensors)
    oracle = load_file(path)
    found = dict(read_tensors(open_header(path)))
    assert set(found) == set(oracle) == set(tensors)
    assert all(equal(found[name], oracle[name]) for name in oracle)


def test_tensors_come_in_file_order_and_only_those_wanted(tmp_path):
    path = saved(tmp_path, {"b": torch.zeros(2), "a": torch.ones(3), "c": torch.zeros(4, dtype=torch.float64)})
    file = open_header(path)
    names = [name for name, _ in read_tensors(file)]
    assert names == sorted(names, key=lambda name: file.entries[name].start)
    assert [name for name, _ in read_tensors(file, ["b", "a"])] == [name for name in names if name != "c"]


def test_written_files_are_what_the_safetensors_library_reads(tmp_path):
    tensors = {name: tensor for name, tensor in every_dtype().items() if "E8M0" not in name}
    tensors["parameter"] = nn.Parameter(torch.randn(4, 4))
    tensors["transposed"] = torch.randn(4, 6).T
    path = tmp_path / "ours.safetensors"
    write_tensors(path, tensors, {"title": 'Ünï "x"\n', "format": "pt"})
    oracle = load_file(path)
    assert set(oracle) == set(tensors)
    assert all(equal(oracle[name], tensors[name].detach().contiguous()) for name in tensors)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"title": 'Ünï "x"\n', "format": "pt"}
    assert open_header(path).metadata == {"title": 'Ünï "x"\n', "format": "pt"}


def test_every_dtype_survives_writing_and_reading(tmp_path):
    path = tmp_path / "ours.safetensors"
    write_tensors(path, every_dtype(), {})
    found = dict(read_tensors(open_header(path)))
    assert all(equal(found[name], tensor) for name, tensor in every_dtype().items())


def test_written_tensors_are_aligned_and_the_bytes_do_not_depend_on_the_order(tmp_path):
    tensors = every_dtype()
    write_tensors(tmp_path / "a", tensors, {"x": "1", "y": "2"})
    write_tensors(tmp_path / "b", dict(reversed(tensors.items())), {"y": "2", "x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert all(entry.start % entry.dtype.itemsize == 0 for entry in open_header(tmp_path / "a").entries.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_counted_and_the_tensor_named(tmp_path, dtype, bad):
    tensor = torch.zeros(3, 100, dtype=dtype)
    tensor[1, 7] = tensor[2, 99] = bad
    path = saved(tmp_path, {"fine": torch.zeros(4), "blocks.0.broken.weight": tensor})
    with pytest.raises(ModelFileError, match=r"tensor blocks\.0\.broken\.weight: 2 of its 300 values are NaN or inf"):
        list(read_tensors(open_header(path)))


def test_infinities_of_both_signs_do_not_hide_each_other(tmp_path):
    path = saved(tmp_path, {"a": torch.tensor([float("inf"), float("-inf")])})
    with pytest.raises(ModelFileError, match="2 of its 2 values"):
        list(read_tensors(open_header(path)))


def test_finite_values_with_an_infinite_sum_are_read(tmp_path):
    tensors = {"a": torch.full((100,), 3e38), "b": torch.full((100,), 1e300, dtype=torch.float64)}
    found = dict(read_tensors(open_header(saved(tmp_path, tensors))))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


# Fingerprints --------------------------------------------------------------------------------------------------------


def test_a_file_is_written_of_tensors_of_which_two_at_most_are_there_at_once(tmp_path):
    tensors = {f"t{number}": torch.full((4, number + 1), number, dtype=torch.bfloat16) for number in range(6)}
    tensors["wide"] = torch.randn(3)
    made: list[weakref.ref] = []

    def make(name):
        assert sum(each() is not None for each in made) <= 1
        tensor = tensors[name].clone()
        made.append(weakref.ref(tensor))
        return tensor

    shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
    write_tensors(tmp_path / "streamed.safetensors", shapes, {"a": "b"}, make=make)
    write_tensors(tmp_path / "whole.safetensors", tensors, {"a": "b"})
    assert len(made) == len(tensors)
    assert (tmp_path / "streamed.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_fingerprint_is_of_names_and_values_whatever_file_they_are_in(tmp_path):
    adapter = {name: torch.randn(tensor.shape) for name, tensor in OURS["llm_adapter"].items()}
    alone = fingerprint(open_header(saved(tmp_path, adapter)))
    inside = saved(
        tmp_path,
        {**OURS["cosmos"], **{f"net.llm_adapter.{name}": tensor for name, tensor in reversed(adapter.items())}},
        metadata={"title": "other"},
    )
    assert fingerprint(open_header(inside).stripped("net.llm_adapter.")) == alone
    other_order = tmp_path / "order.safetensors"
    header = open_header(saved(tmp_path, adapter))
    names = sorted(header.entries, reverse=True)
    assert names != sorted(header.entries, key=lambda name: header.entries[name].start)
    data = b"".join(adapter[name].numpy().tobytes() for name in names)
    other_order.write_bytes(raw(described({name: list(adapter[name].shape) for name in names}, "F32", 4), data))
    assert fingerprint(open_header(other_order)) == alone


@pytest.mark.parametrize(
    "changed",
    [
        {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 5.0])},
        {"a": torch.tensor([1.0, 2.0]), "c": torch.tensor([3.0, 4.0])},
        {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0, 2.0])},
        {"a": torch.tensor([1.0, 2.0])},
        {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3.0, 4.0])},
        {"a": torch.tensor([1.0, 2.0]).view(torch.int32), "b": torch.tensor([3.0, 4.0])},
    ],
)
def test_fingerprint_changes_with_every_name_value_shape_and_dtype(tmp_path, changed):
    first = saved(tmp_path, {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}, "first.safetensors")
    assert fingerprint(open_header(first)) != fingerprint(open_header(saved(tmp_path, changed)))
