"""The folder diffusers loads: nothing lost on the way, and the same pictures."""

import os
import shutil
import stat
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AnimaModularPipeline, ModularPipeline
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_anima_lora_to_diffusers as diffusers_names
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from diffusers.models.transformers import transformer_cosmos
from safetensors.torch import load_file, save_file
from transformers import Qwen2Tokenizer, T5Tokenizer

from anima_train.adapters.names import cosmos_key
from anima_train.core.errors import ConfigError, ModelFileError
from anima_train.core.files import current_umask
from anima_train.core.text_batch import pad_states
from anima_train.model.dit import MiniTrainDIT
from anima_train.model.loading import ModelFiles, load_transformer
from anima_train.model.safetensors_io import open_header
from anima_train.model.text import MAX_TOKENS, load_text_encoder, load_tokenizers, tokenize
from anima_train.model.tiny import CAPTIONS, SMALL, tiny_paths, write_tiny
from anima_train.model.vae import load_vae
from anima_train.objective.timesteps import shifted
from anima_train.sampling.samplers import Euler
from anima_train.tools.convert import COMPONENTS, to_diffusers

CPU = torch.device("cpu")
STEPS = 4
SHIFT = 3.0
GUIDANCE = 4.0  # the pipeline's own
MODELS = ("transformer", "text_conditioner", "vae", "text_encoder")

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' own deprecations


def model_files(folder):
    """The files of a tiny model."""
    paths = tiny_paths(folder)
    return ModelFiles(paths.transformer, paths.vae, paths.llm, paths.tokenizer, paths.t5_tokenizer)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model's folder; not to be changed."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def converted(tiny, tmp_path_factory):
    """The tiny model as a pipeline's folder, moved to another place after it was written."""
    folder = tmp_path_factory.mktemp("converted")
    to_diffusers(model_files(tiny), folder / "first")
    (folder / "first").rename(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture(scope="module")
def pipeline(converted):
    """The folder as a person loads it, in float32."""
    pipeline = ModularPipeline.from_pretrained(str(converted), local_files_only=True)
    pipeline.load_components(dtype=torch.float32, local_files_only=True)
    return pipeline


@pytest.fixture
def copy(tiny, tmp_path):
    """A tiny model to be changed."""
    shutil.copytree(tiny, tmp_path / "tiny")
    return model_files(tmp_path / "tiny")


@pytest.fixture
def resize(monkeypatch):
    """What diffusers' transformer takes from torchvision, which the trainer does without: scaling a mask of zeros."""
    functional = SimpleNamespace(resize=lambda mask, size, interpolation: F.interpolate(mask, size, mode=interpolation))
    transforms = SimpleNamespace(functional=functional, InterpolationMode=SimpleNamespace(NEAREST="nearest"))
    monkeypatch.setattr(transformer_cosmos, "transforms", transforms, raising=False)


def change(path, **changed):
    """Write a file again with some tensors changed, each by a function."""
    save_file({name: changed.get(name, lambda x: x)(tensor) for name, tensor in load_file(path).items()}, path)


def test_every_name_is_the_one_diffusers_gives():
    with torch.device("meta"):
        names = [*MiniTrainDIT(SMALL.transformer).state_dict()]
    expected = [*diffusers_names({f"diffusion_model.{name}": None for name in names})]
    for side, attention in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        for part in "qk":  # diffusers' converter knows no norms, as no LoRA has any
            old, new = f"{side}.{part}_norm", f"{attention}.norm_{part}"
            expected = [name.replace(old, new) for name in expected]
    assert [f"transformer.{cosmos_key(name)}" for name in names] == expected


def test_diffusers_loads_every_component_from_the_folder_alone(pipeline, converted):
    assert type(pipeline) is AnimaModularPipeline
    assert pipeline.scheduler.config.shift == SHIFT
    assert pipeline.guider.config.guidance_scale == GUIDANCE
    assert {name for name in COMPONENTS if getattr(pipeline, name) is None} == set()
    assert {path.name for path in converted.iterdir()} == {*COMPONENTS, "modular_model_index.json"}
    for name in COMPONENTS:
        spec = pipeline.get_component_spec(name)
        assert (spec.pretrained_model_name_or_path, spec.subfolder) == (str(converted), name)


def test_no_key_is_missing_or_left_over(pipeline, converted):
    for name in MODELS:
        kind = type(getattr(pipeline, name))
        _, found = kind.from_pretrained(converted / name, output_loading_info=True, local_files_only=True)
        assert not any(found.values()), name


def test_every_tensor_is_there_bit_by_bit(converted, tiny):
    paths = tiny_paths(tiny)
    whole = {key.removeprefix("net."): tensor for key, tensor in load_file(paths.transformer).items()}
    expected = {
        "transformer": {cosmos_key(key): tensor for key, tensor in whole.items() if "llm_adapter." not in key},
        "text_conditioner": {key[12:]: tensor for key, tensor in whole.items() if "llm_adapter." in key},
        "vae": convert_wan_vae_to_diffusers(load_file(paths.vae)),
        "text_encoder": {key.removeprefix("model."): tensor for key, tensor in load_file(paths.llm).items()},
    }
    for name in MODELS:
        (path,) = (converted / name).glob("*.safetensors")
        found = load_file(path)
        assert found.keys() == expected[name].keys()
        assert all(torch.equal(tensor, expected[name][key]) for key, tensor in found.items())
        assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_files_have_the_permissions_of_any_other(converted):
    for path in (converted, *converted.rglob("*")):
        everything = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == everything & ~current_umask(), path


def test_tokens_are_the_ones_of_training(pipeline, tiny):
    files = model_files(tiny)
    tokenizers = load_tokenizers(files.tokenizer, files.t5_tokenizer)
    for caption in (*CAPTIONS, "", "Ünïcode (猫:1.2),\n  spaces  "):
        tokens = tokenize(tokenizers, caption)
        assert pipeline.tokenizer(caption)["input_ids"] == tokens.qwen_ids
        assert pipeline.t5_tokenizer(caption)["input_ids"] == tokens.t5_ids


def test_tokenizers_as_the_official_folders_hold_them_keep_their_tokens(copy, tmp_path):
    (copy.t5_tokenizer / "tokenizer_config.json").unlink()
    (copy.t5_tokenizer / "config.json").write_text('{"model_type": "t5"}')
    config = (copy.tokenizer / "tokenizer_config.json").read_text()
    (copy.tokenizer / "tokenizer_config.json").write_text(config.replace("PreTrainedTokenizerFast", "Qwen2Tokenizer"))
    to_diffusers(copy, tmp_path / "out")
    tokenizers = load_tokenizers(copy.tokenizer, copy.t5_tokenizer)
    qwen = Qwen2Tokenizer.from_pretrained(tmp_path / "out" / "tokenizer", local_files_only=True)
    t5 = T5Tokenizer.from_pretrained(tmp_path / "out" / "t5_tokenizer", local_files_only=True)
    for caption in (*CAPTIONS, "", " ".join(CAPTIONS) * 3):
        tokens = tokenize(tokenizers, caption)
        assert qwen(caption, max_length=MAX_TOKENS, truncation=True)["input_ids"] == tokens.qwen_ids
        assert t5(caption, max_length=MAX_TOKENS, truncation=True)["input_ids"] == tokens.t5_ids


def test_parts_of_a_pipeline_can_be_converted_again(copy, converted, tmp_path):
    folders = {"llm": "text_encoder", "tokenizer": "tokenizer", "t5_tokenizer": "t5_tokenizer"}
    to_diffusers(replace(copy, **{part: converted / name for part, name in folders.items()}), tmp_path / "out")
    for path in (path for path in converted.rglob("*") if path.is_file()):
        assert (tmp_path / "out" / path.relative_to(converted)).read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize("negative", [None, [CAPTIONS[7], ""]])
def test_pipeline_makes_the_latents_and_pictures_of_our_sampler(pipeline, tiny, resize, error, negative):
    prompts = [CAPTIONS[0], CAPTIONS[16]]
    # A long strip: what positions are scaled by shows far from the first one.
    noise = torch.randn(2, 16, 1, 4, 160, generator=torch.Generator().manual_seed(0))
    found = pipeline(
        prompt=prompts, negative_prompt=negative, latents=noise, height=32, width=1280, num_inference_steps=STEPS,
        output_type="pt", output=["latents", "images"],
    )  # fmt: skip

    files = model_files(tiny)
    tokenizers = load_tokenizers(files.tokenizer, files.t5_tokenizer)
    encoder = load_text_encoder(files.llm, tokenizers, CPU)
    transformer = load_transformer(files, train_llm_adapter=True, dtype=torch.float32, device=CPU)

    def context(captions):
        return transformer.context(pad_states(encoder.encode([tokenize(tokenizers, text) for text in captions])))

    positive, unconditional = context(prompts), context(negative or ["", ""])

    def velocity(x, t):
        level = torch.full((len(x), 1), t)
        without = transformer(x, level, unconditional)
        return without + GUIDANCE * (transformer(x, level, positive) - without)

    with torch.no_grad():
        levels = [shifted(1 - step / STEPS, SHIFT) for step in range(STEPS + 1)]
        latents = Euler().sample(velocity, noise, levels, SHIFT, lambda: noise)
        pixels = load_vae(files.vae, torch.float32, CPU).decode(latents)
    assert error(found["latents"], latents) < 1e-5
    assert error(found["images"], pixels / 2 + 0.5) < 1e-5
    assert error(noise, latents) > 0.1


def test_each_tensor_keeps_its_dtype_unless_told_otherwise(copy, tmp_path):
    change(copy.llm, **{"model.norm.weight": torch.Tensor.float})
    change(copy.transformer, **{"net.t_embedding_norm.weight": torch.Tensor.half})
    to_diffusers(copy, tmp_path / "kept")
    to_diffusers(copy, tmp_path / "float32", torch.float32)

    def dtypes(folder, name):
        (path,) = (folder / name).glob("*.safetensors")
        return {name: entry.dtype for name, entry in open_header(path).entries.items()}

    kept = dtypes(tmp_path / "kept", "text_encoder")
    assert kept.pop("norm.weight") == torch.float32
    assert set(kept.values()) == {torch.bfloat16}
    kept = dtypes(tmp_path / "kept", "transformer")
    assert kept.pop("time_embed.norm.weight") == torch.float16
    assert set(kept.values()) == {torch.bfloat16}
    for name in MODELS:
        assert set(dtypes(tmp_path / "float32", name).values()) == {torch.float32}


def test_folder_that_is_there_is_left_alone(copy, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ConfigError, match="out already exists"):
        to_diffusers(copy, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["mine"]


def nan(tensor):
    """The tensor with a value that is none."""
    return torch.full_like(tensor, torch.nan)


@pytest.mark.parametrize("part", ["transformer", "vae", "llm", "tokenizer"])
def test_damaged_file_leaves_nothing_behind(copy, tmp_path, part):
    path = getattr(copy, part)
    if path.is_dir():
        (path / "tokenizer.json").write_text("{")
    else:
        change(path, **{[*open_header(path).entries][-1]: nan})
    with pytest.raises(ModelFileError, match=str(path)):
        to_diffusers(copy, tmp_path / "out")
    assert os.listdir(tmp_path) == ["tiny"]


def test_model_with_a_mask_channel_is_refused(copy, tmp_path):
    change(copy.transformer, **{"net.x_embedder.proj.1.weight": lambda x: F.pad(x, (0, 4))})
    with pytest.raises(ModelFileError, match="reads 17 channels"):
        to_diffusers(copy, tmp_path / "out")
    assert os.listdir(tmp_path) == ["tiny"]


def test_file_without_a_tensor_is_refused(copy, tmp_path):
    weights = load_file(copy.transformer)
    del weights["net.blocks.1.mlp.layer2.weight"]
    save_file(weights, copy.transformer)
    with pytest.raises(ModelFileError, match=r"1 keys missing: blocks\.1\.mlp\.layer2\.weight"):
        to_diffusers(copy, tmp_path / "out")
