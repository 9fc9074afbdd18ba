"""A LoRA to begin with: the first step computes what the file's merged weights compute, or says what it does not."""

import pytest
import torch
from safetensors.torch import save_file

from anima_train.adapters.applied import merge, of_lora
from anima_train.adapters.initial import read_initial
from anima_train.adapters.lora import Lora, lora_layers
from anima_train.adapters.names import diffusers_name
from anima_train.adapters.read import read_lora
from anima_train.adapters.selection import block_linears
from anima_train.core.errors import ConfigError, ModelFileError
from anima_train.model.variants import ANIMA
from anima_train.optim.groups import COMPONENTS, LearningRates
from tests.adapters.test_read import SHAPES, base_model

ALL = dict.fromkeys(COMPONENTS, 1e-4)


MODULES = block_linears(base_model())


def matrices(rank, modules=MODULES, seed=1):
    """The factors of a random LoRA by module: (down, up)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, SHAPES[name][1], generator=generator) * 0.3,
            torch.randn(SHAPES[name][0], rank, generator=generator) * 0.3,
        )
        for name in modules
    }


def comfy(pairs, alpha=None):
    return {
        f"diffusion_model.{name}.lora_{part}.weight": tensor
        for name, pair in pairs.items()
        for part, tensor in zip("AB", pair, strict=True)
    }


def kohya(pairs, alpha=None):
    named = {
        f"lora_unet_{name.replace('.', '_')}.lora_{part}.weight": tensor
        for name, pair in pairs.items()
        for part, tensor in zip(("down", "up"), pair, strict=True)
    }
    alphas = {} if alpha is None else dict.fromkeys(pairs, torch.tensor(float(alpha)))
    return named | {f"lora_unet_{name.replace('.', '_')}.alpha": value.clone() for name, value in alphas.items()}


def diffusers(pairs, alpha=None):
    return {
        f"{diffusers_name(name)}.lora_{part}.weight": tensor
        for name, pair in pairs.items()
        for part, tensor in zip("AB", pair, strict=True)
    }


def write(folder, tensors, name="lora", metadata=None):
    path = folder / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def attached(settings, rates=None):
    model = base_model()
    settings.attach(model, LearningRates(rates or ALL), seed=3)
    return model.eval()


def began(path, settings, rates=None):
    model = attached(settings, rates)
    initial = read_initial(path, SHAPES, [name for name, _ in lora_layers(model)], settings, ANIMA)
    initial.load(model)
    return model, initial


def outputs(model):
    generator = torch.Generator().manual_seed(5)
    x, context = torch.randn(2, 16, 1, 4, 6, generator=generator), torch.randn(2, 7, 20, generator=generator)
    source, ids = torch.randn(2, 5, 12, generator=generator), torch.randint(0, 30, (2, 4), generator=generator)
    with torch.no_grad():
        return model(x, torch.tensor([[0.3], [0.8]]), context), model.llm_adapter(source, ids)


@pytest.mark.parametrize("settings", [Lora(rank=4), Lora(rank=4, alpha=1.0), Lora(rank=7, alpha=21.0)], ids=str)
@pytest.mark.parametrize(("form", "alpha"), [(comfy, None), (kohya, 4), (kohya, 1.5), (diffusers, None)])
def test_the_first_step_computes_what_the_merged_weights_compute(tmp_path, error, form, alpha, settings):
    path = write(tmp_path, form(matrices(4), alpha))
    merged = base_model()
    merge(merged, [(of_lora(path, read_lora(path, SHAPES)), 1.0)])
    model, initial = began(path, settings)
    for found, expected, before in zip(outputs(model), outputs(merged), outputs(base_model()), strict=True):
        assert error(found, expected) < 1e-5
        assert error(before, expected) > 0.1
    assert initial.warnings == []
    assert f"rank 4 of {settings.rank}, {len(MODULES)} modules" in initial.lines[0]


def test_a_file_of_another_family_is_warned_of(tmp_path):
    for made, is_warned in (("cosmos-predict2-2b/lora", True), ("anima-2b/lora", False)):
        path = write(tmp_path, comfy(matrices(4)), metadata={"modelspec.architecture": made})
        assert any("made for Cosmos-Predict2" in text for text in began(path, Lora(rank=4))[1].warnings) == is_warned


def test_the_same_rank_and_scale_are_loaded_bit_for_bit(tmp_path):
    pairs = matrices(4)
    model, _ = began(write(tmp_path, comfy(pairs)), Lora(rank=4))
    for name, layer in lora_layers(model):
        assert torch.equal(layer.lora_A, pairs[name][0])
        assert torch.equal(layer.lora_B, pairs[name][1])


def test_a_larger_rank_can_learn_in_what_the_file_lacks(tmp_path):
    model, _ = began(write(tmp_path, comfy(matrices(4))), Lora(rank=6))
    fresh = dict(lora_layers(attached(Lora(rank=6))))
    for name, layer in lora_layers(model):
        assert torch.equal(layer.lora_A[4:], fresh[name].lora_A[4:])
        assert bool(layer.lora_A[4:].any())
        assert not bool(layer.lora_B[:, 4:].any())


def test_ranks_that_differ_by_module_are_taken_and_the_largest_is_asked_for(tmp_path):
    half = len(MODULES) // 2
    pairs = matrices(2, MODULES[:half]) | matrices(5, MODULES[half:])
    path = write(tmp_path, comfy(pairs))
    _, initial = began(path, Lora(rank=5))
    assert "ranks 2 to 5 of 5" in initial.lines[0]
    with pytest.raises(ConfigError, match=r"has rank 5, and adapter\.rank is 4, .* write rank = 5, in \[adapter\]"):
        began(path, Lora(rank=4))


def test_modules_that_one_side_lacks_are_counted_and_named(tmp_path):
    missing = MODULES[:7]
    path = write(tmp_path, comfy(matrices(4, MODULES[7:])))
    model, initial = began(path, Lora(rank=4))
    assert f"7 trained modules not in lora.safetensors, begin at zero: {missing[0]}, " in initial.lines[1]
    assert not any(bool(layer.lora_B.any()) for name, layer in lora_layers(model) if name in missing)

    inside = [name for name in MODULES if name.startswith("llm_adapter.")]
    frozen = ALL | {"llm_adapter": 0}
    _, initial = began(write(tmp_path, comfy(matrices(4)), "whole"), Lora(rank=4), frozen)
    assert f"{len(inside)} modules of whole.safetensors not trained here, left out: llm_adapter." in initial.warnings[0]
    with pytest.raises(ConfigError, match=rf"trains none of the {len(inside)} modules of .*: llm_adapter"):
        began(write(tmp_path, comfy(matrices(4, inside)), "part"), Lora(rank=4), frozen)


def test_weights_outside_of_what_a_lora_here_trains_are_named(tmp_path):
    outside = [name for name in SHAPES if name not in MODULES][:1]
    _, initial = began(write(tmp_path, comfy(matrices(4, [*MODULES, *outside]))), Lora(rank=4))
    assert f"1 module of lora.safetensors not trained here, left out: {outside[0]}" in initial.warnings[0]


def test_another_scale_and_dtype_are_said(tmp_path):
    path = write(tmp_path, kohya(matrices(4), alpha=2))
    _, initial = began(path, Lora(rank=4, dtype="bfloat16"))
    assert "its scale of 0.5 instead of 1 goes into lora_B; rounded to bfloat16 (adapter.dtype)" in initial.lines[0]


@pytest.mark.parametrize(
    ("down", "up", "alpha", "is_rounded"),
    [
        (torch.bfloat16, torch.bfloat16, 0.75, False),  # a quarter of the run's scale, 3 / 4
        (torch.bfloat16, torch.bfloat16, 12.0, False),
        (torch.bfloat16, torch.bfloat16, 2.0, True),  # two thirds of it
        (torch.float32, torch.bfloat16, 3.0, True),
        (torch.bfloat16, torch.float32, 3.0, True),
    ],
)
def test_what_bfloat16_does_not_hold_is_said_to_be_rounded(tmp_path, down, up, alpha, is_rounded):
    pairs = {name: (a.to(down), b.to(up)) for name, (a, b) in matrices(4, MODULES[:2]).items()}
    path = write(tmp_path, kohya(pairs, alpha=alpha))
    model, initial = began(path, Lora(rank=4, alpha=3.0, dtype="bfloat16"))
    assert ("rounded to bfloat16" in initial.lines[0]) == is_rounded
    a, b = pairs[MODULES[0]]
    layer = dict(lora_layers(model))[MODULES[0]]
    exact = torch.equal(layer.lora_A.float(), a.float()) and torch.equal(layer.lora_B.double(), b.double() * alpha / 3)
    assert exact == (not is_rounded)


def test_a_folder_is_taken_where_it_has_one_lora(tmp_path):
    folder = tmp_path / "epoch10"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"the folder \S+ has no \.safetensors file; name a LoRA's file"):
        began(folder, Lora(rank=4))
    write(folder, comfy(matrices(4)), "adapter_model")
    assert began(folder, Lora(rank=4))[1].path.name == "adapter_model.safetensors"
    (folder / "adapter_model.safetensors").rename(folder / "a.safetensors")
    assert began(folder, Lora(rank=4))[1].path.name == "a.safetensors"
    write(folder, comfy(matrices(4)), "b")
    with pytest.raises(ConfigError, match=r"has 2 \.safetensors files: a\.safetensors, b\.safetensors; name"):
        began(folder, Lora(rank=4))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda: {"net.x_embedder.proj.1.weight": torch.ones(2, 2)}, "expected a LoRA; this looks like"),
        (lambda: comfy({"blocks.0.mlp.layer1": (torch.ones(4, 3), torch.ones(5, 4))}), "of another shape than"),
        (lambda: kohya(matrices(4), alpha=1e38), "is not finite; broken"),
    ],
)
def test_what_does_not_fit_the_model_is_an_error_about_the_file(tmp_path, tensors, message):
    with pytest.raises(ModelFileError, match=message):
        began(write(tmp_path, tensors()), Lora(rank=4, alpha=1e-3))


@pytest.mark.parametrize("alpha", [None, 1.0, 12.0])
def test_the_weights_of_a_training_state_are_read_with_their_scale(tmp_path, error, alpha):
    settings = Lora(rank=4, alpha=alpha)
    model, _ = began(write(tmp_path, comfy(matrices(4))), settings)
    state = {name: parameter.detach() for name, parameter in model.named_parameters() if "lora_" in name}
    path = write(tmp_path, state, "weights", {"anima_train.scale": str(settings.scale_of("blocks"))})
    merged = base_model()
    merge(merged, [(of_lora(path, read_lora(path, SHAPES)), 1.0)])
    for found, expected in zip(outputs(merged), outputs(model), strict=True):
        assert error(found, expected) < 1e-5
    with pytest.raises(ModelFileError, match="bare"):  # whose scale nobody knows
        read_lora(write(tmp_path, state, "bare"), SHAPES)
    with pytest.raises(ModelFileError, match=r"anima_train\.scale is no number"):
        read_lora(write(tmp_path, state, "broken", {"anima_train.scale": "one"}), SHAPES)
