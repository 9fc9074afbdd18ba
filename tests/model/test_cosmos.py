"""Cosmos-Predict2 against diffusers' pipeline for it, and transformers' T5; and the files that it is not."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    Cosmos2TextToImagePipeline,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.models.transformers import transformer_cosmos
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5Config, T5EncoderModel

from anima_train.adapters.names import cosmos_key
from anima_train.caching.text_encoding import CaptionEncoder
from anima_train.core.errors import ModelFileError
from anima_train.core.text_batch import CONTEXT_ROWS, fold_rows, pad_rows
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.loading import ModelSpec, load_transformer
from anima_train.model.text import T5_END, Tokens, tokenize
from anima_train.model.tiny import write_tiny_cosmos
from anima_train.sampling.generate import guided
from anima_train.sampling.prompts import context_of, prompt_states
from anima_train.sampling.samplers import Euler

CPU = torch.device("cpu")
PROMPTS = ("A red square on the left, a blue circle on the right.", "", "1girl, solo")
TEXT2IMAGE = {  # diffusers' own configuration of both sizes, without what gives the size
    "in_channels": 16, "out_channels": 16, "attention_head_dim": 128, "mlp_ratio": 4.0, "text_embed_dim": 1024,
    "adaln_lora_dim": 256, "max_size": (128, 240, 240), "patch_size": (1, 2, 2), "rope_scale": (1.0, 4.0, 4.0),
    "concat_padding_mask": True, "extra_pos_embed_type": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_tiny_cosmos(tmp_path_factory.mktemp("cosmos"))


@pytest.fixture(scope="module")
def tokenizers(files):
    return files.load_tokenizers()


@pytest.fixture(scope="module")
def oracle_t5(files):
    """transformers' encoder with the weights of the file."""
    state = load_file(files.llm)
    config = {"d_kv": 16, "d_ff": 128, "num_heads": 4, "num_layers": 2, "feed_forward_proj": "relu"}
    rows, width = state["shared.weight"].shape
    model = T5EncoderModel(T5Config(vocab_size=rows, d_model=width, **config)).float().eval()
    missing, unexpected = model.load_state_dict({name: each.float() for name, each in state.items()}, strict=False)
    assert (missing, unexpected) == (["encoder.embed_tokens.weight"], [])  # tied
    return model


@torch.no_grad()
def oracle_context(oracle_t5, tokenizers, prompt):
    """What diffusers' pipeline gives its transformer: 512 rows."""
    parts = SimpleNamespace(tokenizer=tokenizers.t5, text_encoder=oracle_t5, _execution_device=CPU)
    return Cosmos2TextToImagePipeline._get_t5_prompt_embeds(parts, prompt)


def test_captions_are_encoded_as_diffusers_encodes_them(error, files, tokenizers, oracle_t5):
    spec = ModelSpec(files, torch.float32, torch.float32, trains_llm_adapter=False, device=CPU, text_device=CPU)
    together = CaptionEncoder(spec, tokenizers).encode(PROMPTS)
    for prompt, entry in zip(PROMPTS, together, strict=True):
        expected = oracle_context(oracle_t5, tokenizers, prompt)
        context = pad_rows(entry["context"][None])
        assert context.shape == expected.shape == (1, CONTEXT_ROWS, 64)
        assert error(context, expected) < 1e-6
        number = len(tokenize(tokenizers, prompt).t5_ids)
        assert not context[:, number:].any()
        assert len(entry["context"]) == number


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_a_folder_of_transformers_gives_the_states_of_the_file(files, tokenizers, oracle_t5, tmp_path, shard):
    oracle_t5.save_pretrained(tmp_path / "t5", max_shard_size=shard)
    folder = dataclasses.replace(files, llm=tmp_path / "t5")
    folder.check_headers()
    folder.check_keys(tokenizers)
    tokens = [tokenize(tokenizers, prompt) for prompt in PROMPTS]
    found, expected = (each.load_text_encoder(tokenizers, CPU).encode(tokens) for each in (folder, files))
    assert all(torch.equal(one.source, other.source) for one, other in zip(found, expected, strict=True))


def test_a_prompt_is_read_as_its_caption_and_weights_lead_away_from_the_empty_one(error, files, tokenizers):
    encoder, conditioner = files.load_text_encoder(tokenizers, CPU), files.load_conditioner(torch.float32, CPU)
    plain, empty = encoder.encode([tokenize(tokenizers, "1girl, solo"), Tokens([], [T5_END])])
    states, nothing = (pad_rows(each.source[None]) for each in (plain, empty))
    assert error(context_of(prompt_states("1girl, solo", tokenizers, encoder), conditioner), states) < 1e-6
    weights = torch.ones(1, CONTEXT_ROWS, 1)
    weights[:, : len(plain.t5_ids) - 1] = 1.5  # </s> has none
    found = context_of(prompt_states("(1girl, solo:1.5)", tokenizers, encoder), conditioner)
    assert error(found, (states - nothing) * weights + nothing) < 1e-6  # ComfyUI's


@pytest.fixture
def resize(monkeypatch):
    """What diffusers' transformer takes from torchvision, which the trainer does without: scaling a mask of zeros."""
    functional = SimpleNamespace(resize=lambda mask, size, interpolation: F.interpolate(mask, size, mode=interpolation))
    transforms = SimpleNamespace(functional=functional, InterpolationMode=SimpleNamespace(NEAREST="nearest"))
    monkeypatch.setattr(transformer_cosmos, "transforms", transforms, raising=False)


def oracle_transformer(shape, weights):
    """diffusers' transformer, configured as the Text2Image model, with these weights under our names."""
    own = {
        "attention_head_dim": shape.head_dim, "text_embed_dim": shape.context_width,
        "adaln_lora_dim": shape.adaln_lora_dim,
    }  # fmt: skip
    sizes = {"num_attention_heads": shape.width // shape.head_dim, "num_layers": shape.num_blocks}
    model = CosmosTransformer3DModel(**TEXT2IMAGE | own, **sizes)
    model.load_state_dict({cosmos_key(name): each.float() for name, each in weights.items()})
    return model.eval()


def compare_velocities(error, shape, weights, context):
    """Ours, on a context whose zeros are counted, and diffusers', on all 512 rows."""
    generator = torch.Generator().manual_seed(5)
    x, t = torch.randn(2, 16, 1, 4, 6, generator=generator), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        model = MiniTrainDIT(shape)
        model.load_state_dict(weights)
        found = model(x, t[:, None], fold_rows(context))
        del model
        oracle = oracle_transformer(shape, weights)
        expected = oracle(x, t, pad_rows(context), padding_mask=torch.zeros(1, 1, 32, 48), return_dict=False)[0]
    assert error(found, expected) < 1e-5


def test_the_velocity_on_t5_states_is_that_of_diffusers(error, files, tokenizers, oracle_t5, resize):
    transformer = load_transformer(files, False, torch.float32, CPU)
    context = oracle_context(oracle_t5, tokenizers, [*PROMPTS[:2]])[:, :40]
    assert not oracle_context(oracle_t5, tokenizers, [*PROMPTS[:2]])[:, 40:].any()
    compare_velocities(error, transformer.shape, transformer.state_dict(), context)


@pytest.mark.slow
@pytest.mark.parametrize("width", [2048, 5120])
def test_the_velocity_of_a_block_of_real_width_is_that_of_diffusers(error, resize, width):
    shape = TransformerShape(1, width, 128, 16, 1024, 256)
    generator, weights = torch.Generator().manual_seed(0), {}
    with torch.device("meta"):
        names = MiniTrainDIT(shape).state_dict()
    for name, like in names.items():  # in bfloat16, as the file has them: half of the memory
        scale = 1.0 if like.ndim == 1 else like.shape[-1] ** -0.5
        weights[name] = (torch.randn(like.shape, generator=generator, dtype=torch.bfloat16) * scale).bfloat16()
    compare_velocities(error, shape, weights, torch.randn(2, 40, 1024, generator=generator))


@pytest.mark.parametrize(("num_blocks", "width", "parameters"), [(28, 2048, 1_956_405_248), (36, 5120, 14_265_265_152)])
def test_both_sizes_have_the_weights_that_diffusers_expects(num_blocks, width, parameters):
    with torch.device("meta"):
        ours = MiniTrainDIT(TransformerShape(num_blocks, width, 128, 16, 1024, 256)).state_dict()
        theirs = CosmosTransformer3DModel(**TEXT2IMAGE, num_attention_heads=width // 128, num_layers=num_blocks)
    assert {cosmos_key(name): each.shape for name, each in ours.items()} == {
        name: each.shape for name, each in theirs.state_dict().items()
    }
    assert sum(each.numel() for each in ours.values()) == parameters


class AllowsEverything(nn.Module):
    """In the place of diffusers' guardrail, which is a package of its own."""

    device, dtype = CPU, torch.float32

    def check_text_safety(self, prompt):
        return True


@pytest.mark.filterwarnings("ignore")  # of float64 levels
def test_sampling_gives_the_latents_of_diffusers_pipeline(error, files, tokenizers, oracle_t5, resize):
    """At its levels, sigma / (1 + sigma) here, and with its guidance, which is one less than ours."""
    transformer = load_transformer(files, False, torch.float32, CPU)
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1)
    pipeline = Cosmos2TextToImagePipeline(
        oracle_t5, tokenizers.t5, oracle_transformer(transformer.shape, transformer.state_dict()), vae,
        FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), AllowsEverything(),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, 1, 6, 4, generator=torch.Generator().manual_seed(1))
    (expected,) = pipeline(
        PROMPTS[0], PROMPTS[2], height=48, width=32, num_inference_steps=8, guidance_scale=3.0, latents=noise,
        output_type="latent", return_dict=False,
    )  # fmt: skip
    sigmas = pipeline.scheduler.sigmas.double()
    assert (sigmas[0], len(sigmas)) == (80.0, 9)
    encoder, conditioner = files.load_text_encoder(tokenizers, CPU), files.load_conditioner(torch.float32, CPU)
    contexts = [context_of(prompt_states(text, tokenizers, encoder), conditioner) for text in (PROMPTS[0], PROMPTS[2])]
    velocity = guided(transformer, *contexts, 4.0, torch.float32)
    levels = (sigmas / (1 + sigmas)).tolist()
    with torch.no_grad():
        found = Euler().sample(velocity, noise * levels[0], levels, 1.0, lambda: noise)
    assert error(found[:, :, 0] * (1 + float(sigmas[-1])), expected) < 1e-4


def test_its_vae_has_the_latents_of_anima():
    ours, theirs = (each(base_dim=8).config for each in (AutoencoderKLQwenImage, AutoencoderKLWan))
    assert (ours.latents_mean, ours.latents_std) == (theirs.latents_mean, theirs.latents_std)


def header_fault(files, **paths):
    with pytest.raises(ModelFileError) as caught:
        dataclasses.replace(files, **paths).check_headers()
    return str(caught.value)


def test_other_t5s_are_refused(files, tmp_path):
    state = load_file(files.llm)
    newer = {name.replace(".wi.", ".wi_0."): each for name, each in state.items()}
    save_file(newer, tmp_path / "newer.safetensors")
    assert "a T5 v1.1 text encoder; Cosmos-Predict2 reads the first T5" in header_fault(
        files, llm=tmp_path / "newer.safetensors"
    )
    narrow = {name: each[:, :32].clone() if name == "shared.weight" else each for name, each in state.items()}
    save_file(narrow, tmp_path / "narrow.safetensors")
    assert "gives states of width 32, and the transformer reads 64" in header_fault(
        files, llm=tmp_path / "narrow.safetensors"
    )


def test_a_t5_file_with_a_prefix_or_too_few_embeddings_is_refused(files, tokenizers, tmp_path):
    state, path = load_file(files.llm), tmp_path / "t5.safetensors"
    save_file({f"t5xxl.transformer.{name}": each for name, each in state.items()}, path)
    assert "looks like a file of unknown kind (its first key is t5xxl." in header_fault(files, llm=path)
    number = len(tokenizers.t5) - 1
    save_file(state | {"shared.weight": state["shared.weight"][:number].clone()}, path)
    with pytest.raises(ModelFileError, match=rf"t5_path: .* has embeddings for {number} tokens.*t5_tokenizer_path has"):
        dataclasses.replace(files, llm=path).check_keys(tokenizers)


def test_the_video_model_is_refused(files, tmp_path):
    state = load_file(files.transformer)
    name = "net.x_embedder.proj.1.weight"
    save_file(state | {name: torch.zeros(64, 72, dtype=torch.bfloat16)}, tmp_path / "video.safetensors")
    text = header_fault(files, transformer=tmp_path / "video.safetensors")
    assert "reads 17 channels, as Cosmos-Predict2's Video2World does" in text


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_a_t5_file_with_other_keys_is_refused(files, tokenizers, tmp_path, change):
    state = load_file(files.llm)
    name = "encoder.final_layer_norm.weight"
    save_file(
        {key: each for key, each in state.items() if key != name or change != "missing"}
        | ({"encoder.more": torch.ones(1)} if change == "unexpected" else {"decoder.x": torch.ones(1)}),
        tmp_path / "t5.safetensors",
    )
    with pytest.raises(ModelFileError, match=f"1 {change}|1 key"):
        dataclasses.replace(files, llm=tmp_path / "t5.safetensors").check_keys(tokenizers)


def test_tiny_files_are_the_same_for_the_same_seed(files, tmp_path):
    again = write_tiny_cosmos(tmp_path)
    for name in ("transformer", "vae", "llm"):
        assert getattr(again, name).read_bytes() == getattr(files, name).read_bytes()


def test_a_text_encoder_in_8_bits_is_near(error, files, tokenizers):
    tokens = [tokenize(tokenizers, PROMPTS[0])]
    exact, rounded = (
        files.load_text_encoder(tokenizers, CPU, kind).encode(tokens)[0].source for kind in (None, "float8")
    )
    assert 0.001 < error(rounded, exact) < 0.2
    assert files.caption_bytes(1024) == 4 * files.caption_bytes(512) > 4 * 3 * 128 * 512**2 * 4
    assert files.text_bytes(False, "float8") < files.text_bytes(False, None) / 2
