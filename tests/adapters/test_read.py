"""LoRA files in every form: the same LoRA gives the same weights, and what does not fit is refused."""

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_anima_lora_to_diffusers as diffusers_names
from safetensors.torch import save_file

from anima_train.adapters.applied import merge, of_lora
from anima_train.adapters.lora import Lora, lora_layers
from anima_train.adapters.names import diffusers_name, lora_stems
from anima_train.adapters.read import read_lora
from anima_train.adapters.selection import block_linears
from anima_train.core.errors import ModelFileError
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.llm_adapter import LLMAdapter, LLMAdapterShape
from anima_train.optim.groups import COMPONENTS, LearningRates

RANK = 4
RATES = LearningRates(dict.fromkeys(COMPONENTS, 1e-5))


def base_model():
    generator = torch.Generator().manual_seed(0)
    model = MiniTrainDIT(TransformerShape(2, 48, 24, 16, 20, 8), LLMAdapter(LLMAdapterShape(2, 20, 10, 12, 20, 30)))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval().requires_grad_(False)


SHAPES = {
    name.removesuffix(".weight"): tuple(tensor.shape)
    for name, tensor in base_model().state_dict().items()
    if name.endswith(".weight") and tensor.dim() == 2
}


@pytest.fixture(scope="module")
def trained():
    """A model with a LoRA whose matrices are all far from zero, and the tensors that training saves of it."""
    model = base_model()
    lora = Lora(rank=RANK, alpha=2.0)
    lora.attach(model, RATES, seed=0)
    generator = torch.Generator().manual_seed(1)
    for _, layer in lora_layers(model):
        for matrix in (layer.lora_A, layer.lora_B):
            matrix.data = torch.randn(matrix.shape, generator=generator) * 0.2
    return model.eval(), {key: tensor.clone() for key, tensor in lora.tensors(model).items()}


@pytest.fixture
def write(tmp_path):
    """Writes tensors as a file, and returns its path."""

    def write(tensors, name="lora", metadata=None):
        path = tmp_path / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
        return path

    return write


def merge_loras(model, loras, prefix=""):
    merge(model, [(of_lora(Path("lora"), updates), strength) for updates, strength in loras], prefix)


def merged(*loras, model=None):
    model = model or base_model()
    merge_loras(model, loras)
    return model.state_dict()


def renamed(tensors, name, parts=("lora_A", "lora_B")):
    """The same tensors under other names of modules and parts."""
    new = {}
    for key, tensor in tensors.items():
        module, part, _ = key.removeprefix("diffusion_model.").rsplit(".", 2)
        new[f"{name(module)}.{parts[part == 'lora_B']}.weight"] = tensor
    return new


def with_alpha(tensors, alpha):
    """The same LoRA with another scale in the tensors, and alpha beside them."""
    ups = {
        key: tensor * RANK / alpha for key, tensor in tensors.items() if key.endswith(("lora_B.weight", "up.weight"))
    }
    stems = {key.removesuffix(".weight").rpartition(".lora_")[0] for key in tensors}
    return {**tensors, **ups, **{f"{stem}.alpha": torch.tensor(float(alpha)) for stem in stems}}


def kohya(tensors):
    return renamed(tensors, lambda module: "lora_unet_" + module.replace(".", "_"), ("lora_down", "lora_up"))


FORMS = {
    "ours": lambda tensors: tensors,
    "ours with alpha": lambda tensors: with_alpha(tensors, 1.0),
    "kohya": lambda tensors: with_alpha(kohya(tensors), 2.0),
    "kohya with an integer alpha": lambda tensors: {
        key: tensor.long() if key.endswith(".alpha") else tensor
        for key, tensor in with_alpha(kohya(tensors), 8.0).items()
    },
    "kohya without alpha": kohya,
    "peft": lambda tensors: renamed(tensors, lambda module: f"base_model.model.{module}"),
    "peft's state": lambda tensors: renamed(
        tensors, lambda module: f"base_model.model.{module}", ("lora_A.default", "lora_B.default")
    ),
    "diffusers": diffusers_names,
    "old diffusers": lambda tensors: renamed(tensors, diffusers_name, ("lora.down", "lora.up")),
    "bare": lambda tensors: renamed(tensors, lambda module: module),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_lora_gives_the_same_weights(write, trained, error, form):
    path = write(FORMS[form](trained[1]))
    expected = base_model().state_dict()
    for module in block_linears(base_model()):
        a, b = (trained[1][f"diffusion_model.{module}.lora_{part}.weight"] for part in "AB")
        expected[f"{module}.weight"] += b @ a
    found = merged((read_lora(path, SHAPES), 1.0))
    assert found.keys() == expected.keys()
    assert all(error(found[name], expected[name]) < 1e-6 for name in expected)


def test_the_merged_model_computes_what_the_trained_one_does(write, trained, error):
    model, tensors = trained
    generator = torch.Generator().manual_seed(3)
    x, context = torch.randn(2, 16, 1, 4, 6, generator=generator), torch.randn(2, 7, 20, generator=generator)
    source, ids = torch.randn(2, 5, 12, generator=generator), torch.randint(0, 30, (2, 4), generator=generator)
    other = base_model()
    before = other(x, torch.tensor([[0.3], [0.8]]), context)
    merge_loras(other, [(read_lora(write(tensors), SHAPES), 1.0)])
    expected = model(x, torch.tensor([[0.3], [0.8]]), context)
    assert error(other(x, torch.tensor([[0.3], [0.8]]), context), expected) < 1e-5
    assert error(other.llm_adapter(source, ids), model.llm_adapter(source, ids)) < 1e-5
    assert error(before, expected) > 0.1


def test_strengths_add_up_and_0_changes_no_bit(write, trained, error):
    lora = read_lora(write(trained[1]), SHAPES)
    base, whole = base_model().state_dict(), merged((lora, 1.0))
    parts = merged((lora, 0.75), (lora, 0.5), (lora, -0.25))
    assert all(error(parts[name], whole[name]) < 1e-6 for name in whole)
    assert all(torch.equal(tensor, base[name]) for name, tensor in merged((lora, 0.0)).items())
    assert all(torch.equal(tensor, base[name]) for name, tensor in merged().items())


def test_bfloat16_weights_are_rounded_once(write, trained):
    lora = read_lora(write(trained[1]), SHAPES)
    base, name = base_model().bfloat16(), "blocks.0.mlp.layer1"
    update = lora[name].up @ lora[name].down
    expected = (base.state_dict()[f"{name}.weight"].float() + 0.3 * update + 0.4 * update).bfloat16()
    found = merged((lora, 0.3), (lora, 0.4), model=base)[f"{name}.weight"]
    assert torch.equal(found, expected)


def test_the_llm_adapter_alone_gets_its_part(write, trained):
    lora = read_lora(write(trained[1]), SHAPES)
    whole = merged((lora, 1.0))
    adapter = base_model().llm_adapter
    merge_loras(adapter, [(lora, 1.0)], "llm_adapter.")
    assert all(torch.equal(tensor, whole[f"llm_adapter.{name}"]) for name, tensor in adapter.state_dict().items())
    rest = base_model()
    del rest.llm_adapter
    merge_loras(rest, [(lora, 1.0)])
    assert all(torch.equal(tensor, whole[name]) for name, tensor in rest.state_dict().items())


def test_a_lora_of_some_modules_leaves_the_others(write, trained):
    some = {key: tensor for key, tensor in trained[1].items() if "cross_attn" in key}
    found, base = merged((read_lora(write(some), SHAPES), 1.0)), base_model().state_dict()
    changed = {name for name, tensor in found.items() if not torch.equal(tensor, base[name])}
    assert changed == {f"{name}.weight" for name in block_linears(base_model()) if "cross_attn" in name}


def test_diffusers_names_are_diffusers_own():
    for module in SHAPES:
        (name,) = diffusers_names({f"diffusion_model.{module}": None})
        assert diffusers_name(module) == name


def test_no_two_modules_have_a_name_in_common():
    stems = [stem for module in SHAPES for stem in lora_stems(module)]
    assert len(set(stems)) == len(stems)


# PEFT's settings, which hold the scale


@pytest.mark.parametrize(
    ("settings", "scale"), [({"lora_alpha": 8}, 2.0), ({"lora_alpha": 8, "use_rslora": True}, 4.0)]
)
def test_alpha_in_pefts_settings_counts(write, trained, settings, scale):
    config = {"r": RANK, "alpha_pattern": {}, "use_dora": False, **settings}
    path = write(FORMS["peft"](trained[1]), "adapter_model")
    (path.parent / "adapter_config.json").write_text(json.dumps(config))
    assert {update.scale for update in read_lora(path, SHAPES).values()} == {scale}
    ours = write(trained[1], "ours")  # not PEFT's own file
    assert {update.scale for update in read_lora(ours, SHAPES).values()} == {1.0}

    text = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    path = write(FORMS["diffusers"](trained[1]), "diffusers", {"lora_adapter_metadata": text})
    found = read_lora(path, SHAPES)
    assert {update.scale for name, update in found.items() if not name.startswith("llm_adapter.")} == {scale}
    assert {update.scale for name, update in found.items() if name.startswith("llm_adapter.")} == {1.0}


@pytest.mark.parametrize("settings", ["{", "[]", '{"use_dora": true}', '{"transformer.alpha_pattern": {"a": 1}}'])
def test_settings_of_peft_that_are_not_read_are_an_error(write, trained, settings):
    path = write(trained[1], metadata={"lora_adapter_metadata": settings})
    with pytest.raises(ModelFileError, match=r"lora\.safetensors: the LoRA"):
        read_lora(path, SHAPES)


# What is refused


def refused(path):
    with pytest.raises(ModelFileError) as caught:
        read_lora(path, SHAPES)
    return str(caught.value)


def test_keys_of_another_model_are_counted_and_the_first_is_named(write, trained):
    strangers = {f"lora_unet_down_blocks_{n}_attn.lora_down.weight": torch.ones(2, 4) for n in range(7)}
    text = refused(write({**trained[1], **strangers}))
    first = min(strangers)
    assert text.endswith(f"lora.safetensors: 7 keys unknown to this model, such as {first}")


@pytest.mark.parametrize("form", ["ours", "kohya", "diffusers"])
def test_a_lora_for_more_blocks_is_said_to_be_that(write, trained, form):
    more = {key.replace("blocks.1.", "blocks.7."): value.clone() for key, value in trained[1].items()}
    tensors = FORMS[form]({**trained[1], **more})
    num_more = len(tensors) - len(FORMS[form](trained[1]))
    text = refused(write(tensors))
    assert f"lora.safetensors: {num_more} keys for blocks that this model lacks, such as " in text
    assert text.endswith("; it was made for a model with more blocks")
    assert "\n" not in text


def test_a_lora_without_its_second_half_is_said_to_be_that(write, trained):
    half = {key: value for key, value in trained[1].items() if "lora_A" in key}
    text = refused(write(half))
    assert f"lora.safetensors: {len(half)} keys without a counterpart, such as {min(half)}; half of it" in text
    assert text.endswith("is missing: save or download it again")


@pytest.mark.parametrize(
    ("key", "kind"),
    [("dora_scale", "a DoRA"), ("lora_magnitude_vector.weight", "a DoRA"), ("lokr_w1", "a LoKr"),
     ("lokr_w2_a", "a LoKr"), ("hada_w1_a", "a LoHa"), ("oft_blocks", "an OFT"),
     ("diff", "a file of whole differences of weights")],
)  # fmt: skip
def test_what_is_no_plain_lora_is_refused_by_its_kind(write, trained, key, kind):
    name = f"diffusion_model.blocks.0.mlp.layer1.{key}"
    text = refused(write({**trained[1], name: torch.ones(3, 3)}))
    assert f"lora.safetensors: is {kind} (1 key such as {name}); a plain LoRA is wanted, which has an up" in text
    assert ("`anima resize` makes one" in text) == (kind in ("a LoKr", "a LoHa"))
    assert ("`anima extract BASE FILE`" in text) == (key in ("dora_scale", "diff"))


@pytest.mark.parametrize(
    ("key", "model"),
    [
        ("lora_unet_down_blocks_1_attentions_0_proj_in", "of SDXL or SD 1"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "of SDXL or SD 1"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "of SDXL or SD 1"),
        ("lora_unet_double_blocks_0_img_attn_proj", "of Flux or HunyuanVideo"),
        ("transformer.single_transformer_blocks.0.attn.to_q", "of Flux or HunyuanVideo"),
        ("transformer_blocks.0.attn.add_q_proj", "of Stable Diffusion 3 or Qwen-Image"),
        ("diffusion_model.blocks.0.cross_attn.q", "of Wan"),
        ("diffusion_model.layers.0.attention.qkv", "of Lumina or Z-Image"),
    ],
)
def test_a_lora_of_another_model_is_named_with_it(write, key, model):
    tensors = {f"{key}.lora_down.weight": torch.ones(2, 4), f"{key}.lora_up.weight": torch.ones(4, 2)}
    assert f"lora.safetensors: is a LoRA {model}, not of Anima (it has {key}." in refused(write(tensors))


@pytest.mark.parametrize("stem", ["lora_te_layers_0_mlp_up_proj", "text_encoders.qwen3_06b.transformer.layers.0.mlp"])
def test_parts_for_the_text_encoder_are_named(write, trained, stem):
    text = refused(write({**trained[1], f"{stem}.lora_A.weight": torch.ones(2, 4)}))
    assert "changes the text encoder, too (1 key such as " in text


@pytest.mark.parametrize(
    "stem", ["lora_te1_model_layers_0_self_attn_q_proj", "lora_te_layers_0_mlp_up_proj", "text_encoder.layers.0.mlp"]
)
def test_a_lora_of_the_text_encoder_alone_is_named_so(write, stem):
    tensors = {f"{stem}.lora_down.weight": torch.ones(2, 4), f"{stem}.lora_up.weight": torch.ones(4, 2)}
    text = refused(write(tensors))
    assert f"changes only the text encoder (2 keys such as {stem}.lora_down.weight), which anima-train cannot" in text


def test_a_lora_of_a_compiled_model_is_read(write, trained):
    plain = read_lora(write(trained[1]), SHAPES)
    inside = "diffusion_model._orig_mod."
    compiled = {key.replace("diffusion_model.", inside): value for key, value in trained[1].items()}
    stems = {key.replace("lora_unet_", "lora_unet__orig_mod_"): value for key, value in kohya(trained[1]).items()}
    for tensors in (compiled, stems):
        found = read_lora(write(tensors, "compiled"), SHAPES)
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name].up, plain[name].up) for name in plain)


def test_halves_and_shapes_and_repetitions_and_dtypes_are_all_reported(write, trained):
    tensors = copy.copy(trained[1])
    first, second, third, fourth = (f"diffusion_model.{name}" for name in block_linears(base_model())[:4])
    del tensors[f"{first}.lora_B.weight"]
    tensors[f"{second}.lora_A.weight"] = torch.ones(RANK, 5)
    tensors[third.removeprefix("diffusion_model.") + ".lora_A.weight"] = torch.ones(RANK, 48)
    tensors[f"{fourth}.alpha"] = torch.ones(2)
    tensors["diffusion_model.blocks.1.mlp.layer1.lora_A.weight"] = torch.ones(RANK, 48, dtype=torch.int8)
    text = refused(write(tensors))
    assert f"1 key without a counterpart, such as {first}.lora_A.weight" in text
    # Of two modules: another width, and an alpha of two numbers.
    assert "5 keys of another shape than the model's, such as " in text
    assert f"{second}.lora_A.weight (4, 5)" in text or f"{fourth}.alpha (2,)" in text
    assert "1 key repeating another, such as " in text
    assert "1 key without floating-point numbers, such as diffusion_model.blocks.1.mlp.layer1.lora_A.weight" in text


def test_a_file_that_is_no_lora_is_named(write, tmp_path):
    assert "expected a LoRA; this looks like an Anima transformer" in refused(
        write({f"net.{name}": tensor for name, tensor in base_model().state_dict().items()})
    )
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x02pickle")
    assert "this is a pickle" in refused(tmp_path / "x.safetensors")
    assert "there is no such file" in refused(tmp_path / "y.safetensors")


def test_nan_is_an_error(write, trained):
    tensors = {**trained[1], "diffusion_model.blocks.1.mlp.layer1.lora_A.weight": torch.full((RANK, 48), torch.nan)}
    assert "are NaN or infinite" in refused(write(tensors))
