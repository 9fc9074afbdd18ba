"""What is given for a slot: bundles, compiled models, folders and models in several files."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from anima_train.config.model_files import build_model_spec
from anima_train.config.model_part import ModelPart
from anima_train.config.model_settings import Anima
from anima_train.core.errors import ModelFileError
from anima_train.model import hub
from anima_train.model.file_kinds import open_slot
from anima_train.model.loading import ModelFiles, load_transformer
from anima_train.model.safetensors_io import read_tensors
from anima_train.model.text import load_text_encoder, load_tokenizers
from anima_train.model.tiny import write_tiny, write_tiny_cosmos
from anima_train.model.vae import load_vae

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def tensors_of(path, slot):
    return dict(read_tensors(open_slot(path, slot)))


def test_each_slot_takes_its_part_of_a_bundle(tiny, tmp_path):
    bundle = tmp_path / "bundle.safetensors"
    parts = {
        **{f"model.diffusion_model.{key[4:]}": value for key, value in load_file(tiny.transformer).items()},
        **{f"vae.{key}": value for key, value in load_file(tiny.vae).items()},
        **{f"text_encoders.qwen3_06b.transformer.{key}": value for key, value in load_file(tiny.llm).items()},
        "text_encoders.qwen3_06b.logit_scale": torch.ones(1),
    }
    save_file(parts, bundle)
    files = ModelFiles(bundle, bundle, bundle, tiny.tokenizer, tiny.t5_tokenizer)
    files.check_headers()
    whole = load_transformer(tiny, True, torch.float32, CPU).state_dict()
    found = load_transformer(files, True, torch.float32, CPU).state_dict()
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    tokenizers = load_tokenizers(tiny.tokenizer, tiny.t5_tokenizer)
    for load in (
        lambda files: load_vae(files.vae, torch.float32, CPU).state_dict(),
        lambda files: load_text_encoder(files.llm, tokenizers, CPU).model.state_dict(),
    ):
        found, whole = load(files), load(tiny)
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_a_bundle_without_a_part_is_named_for_what_it_is(tiny, tmp_path):
    bundle = tmp_path / "bundle.safetensors"
    tensors = load_file(tiny.transformer).items()
    save_file({key.replace("net.", "model.diffusion_model.", 1): value for key, value in tensors}, bundle)
    with pytest.raises(ModelFileError, match=r"model\.vae_path: expects .* looks like an Anima transformer"):
        ModelFiles(bundle, bundle, tiny.llm, tiny.tokenizer, tiny.t5_tokenizer).check_headers()


@pytest.mark.parametrize("form", ["_orig_mod.{}", "net._orig_mod.{}", "net.{}"])
def test_keys_of_a_compiled_model_are_read(tiny, tmp_path, form):
    path = tmp_path / "compiled.safetensors"
    plain = {key.removeprefix("net."): value for key, value in load_file(tiny.transformer).items()}
    inner = {key.replace("blocks.1.", "blocks.1._orig_mod.", 1): value for key, value in plain.items()}
    save_file({form.format(key): value for key, value in inner.items()}, path)
    files = ModelFiles(path, tiny.vae, tiny.llm, tiny.tokenizer, tiny.t5_tokenizer)
    files.check_headers()
    assert dict(read_tensors(files.whole_transformer_header)).keys() == plain.keys()


def fault(path, slot):
    with pytest.raises(ModelFileError) as caught:
        open_slot(path, slot)
    return str(caught.value)


def test_a_folder_is_answered_with_the_file_in_it(tiny):
    folder = tiny.vae.parent
    assert fault(folder, "vae") == f"model.vae_path: {folder} is a folder; give the file in it: {tiny.vae}"


@pytest.mark.parametrize(
    ("slot", "wanted"), [("transformer", "one file that holds all"), ("text_encoder", "its folder")]
)
def test_a_model_in_several_files_is_answered_with_what_is_read(tmp_path, slot, wanted):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {}}))
    part = tmp_path / "model-00001-of-00002.safetensors"
    save_file({"a": torch.ones(1)}, part)
    assert f"{index} is the list of a model in several files; give {wanted}" in fault(index, slot)
    assert f"{part} is one of several files of a model; give {wanted}" in fault(part, slot)
    if slot == "transformer":
        assert f"{tmp_path} is a folder of several files; give {wanted}" in fault(tmp_path, slot)
        (tmp_path / "model_index.json").write_text("{}")
        assert f"{tmp_path} is a pipeline of diffusers; give {wanted}" in fault(tmp_path, slot)


def test_an_empty_folder_is_said_to_hold_no_file(tmp_path):
    assert "is a folder without a .safetensors file; give one file" in fault(tmp_path, "transformer")


def header_fault(tiny, **paths):
    with pytest.raises(ModelFileError) as caught:
        dataclasses.replace(tiny, **paths).check_headers()
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("net.x_embedder.proj.1.weight", "a Cosmos-Predict2 transformer"),
        ("transformer_blocks.0.attn1.to_q.weight", "a transformer in diffusers names"),
    ],
)
def test_a_folder_of_another_model_is_no_text_encoder(tiny, tmp_path, key, kind):
    save_file({key: torch.ones(1)}, tmp_path / "x-00001-of-00002.safetensors")
    save_file({"more": torch.ones(1)}, tmp_path / "x-00002-of-00002.safetensors")
    text = header_fault(tiny, llm=tmp_path)
    assert text.startswith(f"model.llm_path: expects a Qwen3 text encoder; {tmp_path} looks like {kind}")


def test_a_folder_of_many_models_is_answered_with_the_text_encoder_in_it(tiny, tmp_path):
    save_file({"encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(1)}, tmp_path / "t5.safetensors")
    shutil.copy(tiny.llm, tmp_path / "qwen.safetensors")
    assert header_fault(tiny, llm=tmp_path) == (
        f"model.llm_path: {tmp_path} has no config.json; give the file in it: {tmp_path / 'qwen.safetensors'}"
    )


def test_a_lora_in_the_place_of_the_transformer_gets_its_key(tiny, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"diffusion_model.blocks.0.mlp.layer1.lora_A.weight": torch.ones(2, 4)}, path)
    assert header_fault(tiny, transformer=path) == (
        f"model.transformer_path: expects an Anima transformer; {path} looks like a LoRA; a LoRA to begin with is "
        "init_from_existing, in [adapter]"
    )


# What each kind of file is called, and where it belongs.
KINDS = {
    "anima": ("an Anima transformer", 'model.transformer_path (type = "anima")'),
    "cosmos": ("a Cosmos-Predict2 transformer", 'model.transformer_path (type = "cosmos_predict2")'),
    "llm_adapter": ("an Anima LLM adapter", 'model.llm_adapter_path (type = "anima")'),
    "qwen": ("a Qwen3 text encoder", 'model.llm_path (type = "anima")'),
    "t5": ("the T5-XXL encoder", 'model.t5_path (type = "cosmos_predict2")'),
    "vae": ("the Qwen-Image VAE", "model.vae_path"),
    "lora": ("a LoRA", "init_from_existing, in [adapter]"),
    "lokr": ("an adapter that is no plain LoRA", "--out OUT` makes a transformer of both"),
    "dora": ("an adapter that is no plain LoRA", "--out OUT` makes a transformer of both"),
    "peft_dora": ("an adapter of a kind that is not read", "`anima verify` tells what it is"),
    "oft": ("an adapter of a kind that is not read", "`anima verify` tells what it is"),
    "lllite": ("an adapter of a kind that is not read", "`anima verify` tells what it is"),
    "flux": ("a Flux transformer", "looks like a Flux transformer"),
}
ADDED = {
    "lora": "diffusion_model.blocks.0.mlp.layer1.lora_A.weight",
    "lokr": "lycoris_blocks_0_mlp_layer1.lokr_w1",
    "dora": "diffusion_model.blocks.0.mlp.layer1.dora_scale",
    "peft_dora": "base_model.model.blocks.0.mlp.layer1.lora_magnitude_vector",
    "oft": "lycoris_blocks_0_mlp_layer1.oft_blocks",
    "lllite": "lllite_unet_blocks_0_mlp_layer1.down.0.weight",
    "flux": "double_blocks.0.img_attn.qkv.weight",
}
RIGHT = {
    ("anima", "transformer"): ("anima",),
    ("anima", "vae"): ("vae",),
    ("anima", "llm"): ("qwen",),
    ("anima", "llm_adapter"): ("llm_adapter", "anima"),
    ("cosmos", "transformer"): ("cosmos",),
    ("cosmos", "vae"): ("vae",),
    ("cosmos", "llm"): ("t5",),
}
ELSEWHERE = {  # the other sentences
    ("anima", "transformer", "cosmos"): 'or write type = "cosmos_predict2"',
    ("cosmos", "transformer", "anima"): 'write type = "anima"',
}


@pytest.fixture(scope="module")
def kinds(tiny, tmp_path_factory):
    """A file of each kind, and the files of both families."""
    folder = tmp_path_factory.mktemp("kinds")
    cosmos = write_tiny_cosmos(folder)
    paths = {
        "anima": tiny.transformer,
        "vae": tiny.vae,
        "qwen": tiny.llm,
        "cosmos": cosmos.transformer,
        "t5": cosmos.llm,
    }
    for name, key in ADDED.items():
        paths[name] = folder / f"{name}.safetensors"
        save_file({key: torch.ones(4, 4)}, paths[name])
    paths["llm_adapter"] = folder / "llm_adapter.safetensors"
    inside = {key: tensor for key, tensor in load_file(tiny.transformer).items() if key.startswith("net.llm_adapter.")}
    save_file(inside, paths["llm_adapter"])
    return paths, {"anima": tiny, "cosmos": cosmos}


@pytest.mark.parametrize(("family", "slot"), RIGHT)
def test_a_file_in_the_place_of_another_is_named_and_where_it_belongs(kinds, family, slot):
    paths, files = kinds
    key = {"llm": "llm_path" if family == "anima" else "t5_path"}.get(slot, f"{slot}_path")
    for kind, (name, place) in KINDS.items():
        if kind in RIGHT[family, slot]:
            dataclasses.replace(files[family], **{slot: paths[kind]}).check_headers()
            continue
        fault = header_fault(files[family], **{slot: paths[kind]})
        assert fault.startswith(f"model.{key}: expects ")
        assert f"{paths[kind]} looks like {name}" in fault
        assert fault.endswith(ELSEWHERE.get((family, slot, kind), place))


def test_a_t5_without_its_first_block_and_a_vae_in_its_place_are_refused(kinds, tmp_path):
    _, files = kinds
    for key, kind in (
        ("encoder.block.1.layer.0.SelfAttention.q.weight", "a file of unknown kind"),
        ("decoder.mid_block.resnets.0.conv1.weight", "a VAE in diffusers names"),
    ):
        save_file({key: torch.ones(4, 4)}, tmp_path / "a.safetensors")
        assert f"looks like {kind}" in header_fault(files["cosmos"], llm=tmp_path / "a.safetensors")


@pytest.mark.parametrize("llm_adapter", [None, "hf://me/adapter/a.safetensors"])
def test_wrong_files_are_told_together_with_those_that_the_hub_cannot_give(tiny, tmp_path, monkeypatch, llm_adapter):
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "llm"
    folder.mkdir()
    shutil.copy(tiny.llm, folder / "qwen.safetensors")
    paths = {"transformer_path": str(tiny.vae), "llm_path": str(folder)}
    model = Anima(**paths, llm_adapter_path=llm_adapter)
    with pytest.raises(ModelFileError) as caught:
        build_model_spec(ModelPart(model=model, offline=True), CPU)
    transformer, llm, absent = caught.value.problems
    assert transformer.endswith("looks like the Qwen-Image VAE in Wan names; it belongs in model.vae_path")
    assert llm.startswith(f"model.llm_path: {folder} has no config.json")
    assert absent.startswith(f"model: {3 + (llm_adapter is not None)} files are not in the local Hub cache")
    assert ": run `anima download` once with a connection, or set " in absent


@pytest.mark.parametrize("family", ["anima", "cosmos"])
def test_a_transformer_with_other_weights_is_refused_before_anything_is_cached(kinds, tmp_path, family):
    _, files = kinds
    state, path = load_file(files[family].transformer), tmp_path / "a.safetensors"
    save_file(state | {"net.text_proj.weight": torch.ones(4, 4)}, path)
    assert header_fault(files[family], transformer=path).endswith("1 keys unexpected: text_proj.weight")
    state.pop("net.blocks.1.mlp.layer1.weight")
    save_file(state, path)
    assert header_fault(files[family], transformer=path).endswith("1 keys missing: blocks.1.mlp.layer1.weight")
