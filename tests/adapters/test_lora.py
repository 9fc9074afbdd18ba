"""LoRA: what is adapted, where it starts, what is saved, and that diffusers loads it to the same result."""

import copy
import logging

import pytest
import torch
from diffusers import AnimaModularPipeline, AnimaTextConditioner
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_anima_lora_to_diffusers as diffusers_names
from diffusers.utils import logging as diffusers_logging
from peft.tuners.lora import LoraLayer
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from anima_train.adapters.lora import Lora, lora_layers
from anima_train.adapters.selection import block_linears
from anima_train.adapters.starts import down_matrix
from anima_train.checkpoint.weights import save_weights
from anima_train.core.text_batch import TextStates, pad_rows
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.llm_adapter import LLMAdapter, LLMAdapterShape
from anima_train.model.lora_linear import LoraLinear
from anima_train.optim.groups import COMPONENTS, GroupRow, LearningRates, component_of, group_rows, optimizer_groups

SMALL = TransformerShape(2, 48, 24, 16, 20, 8)
SMALL_ADAPTER = LLMAdapterShape(2, 20, 10, 12, 20, 30)
ALL_TRAINED = dict.fromkeys(COMPONENTS, 1e-5)


def rates(**changed):
    return LearningRates({**ALL_TRAINED, **changed})


def base_model(adapter=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = MiniTrainDIT(SMALL, LLMAdapter(SMALL_ADAPTER) if adapter else None)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


def trained(lora, adapter=True, seed=0):
    """A model with a LoRA whose matrices are all far from zero."""
    model = base_model(adapter)
    lora.attach(model, rates(), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for _, layer in lora_layers(model):
        for matrix in (layer.lora_A, layer.lora_B):
            matrix.data = (torch.randn(matrix.shape, generator=generator) * 0.2).to(matrix.dtype)
    return model.eval()


def inputs(seed=3):
    generator = torch.Generator().manual_seed(seed)
    text = TextStates(
        torch.randn(2, 5, 12, generator=generator),
        torch.tensor([[True] * 5, [True] * 3 + [False] * 2]),
        torch.randint(0, 30, (2, 4), generator=generator),
        torch.tensor([[True] * 4, [True] * 2 + [False] * 2]),
    )
    return torch.randn(2, 16, 1, 4, 6, generator=generator), torch.tensor([[0.3], [0.8]]), text


def lora_names(model):
    return {name for name, _ in lora_layers(model)}


@pytest.fixture(scope="module")
def real():
    """The 2B model's layout, without memory."""
    with torch.device("meta"):
        adapter = LLMAdapter(LLMAdapterShape(6, 1024, 64, 1024, 1024, 32128))
        return MiniTrainDIT(TransformerShape(28, 2048, 128, 16, 1024, 256), adapter)


# What is adapted -----------------------------------------------------------------------------------------------------


def test_targets_are_sixteen_linears_per_block_and_ten_per_adapter_block(real):
    names = block_linears(real)
    assert len(names) == len(set(names)) == 28 * 16 + 6 * 10
    attention = ("q_proj", "k_proj", "v_proj", "output_proj")
    first = {f"blocks.0.{side}_attn.{name}" for side in ("self", "cross") for name in attention}
    first |= {"blocks.0.mlp.layer1", "blocks.0.mlp.layer2"}
    first |= {f"blocks.0.adaln_modulation_{part}.{n}" for part in ("self_attn", "cross_attn", "mlp") for n in (1, 2)}
    assert {name for name in names if name.startswith("blocks.0.")} == first
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    first = {f"llm_adapter.blocks.0.{side}_attn.{name}" for side in ("self", "cross") for name in attention}
    first |= {"llm_adapter.blocks.0.mlp.0", "llm_adapter.blocks.0.mlp.2"}
    assert {name for name in names if name.startswith("llm_adapter.blocks.0.")} == first
    assert {name.split(".")[0] for name in names} == {"blocks", "llm_adapter"}
    assert all("blocks." in name for name in names)


def test_real_layout_at_rank_32_has_the_known_numbers_of_modules_and_parameters(real):
    model = copy.deepcopy(real)
    Lora(rank=32).attach(model, rates(), seed=0)
    rows = {row.component: row for row in group_rows(model, rates())}
    assert rows.pop("base") == GroupRow("base", 1e-5, 0, 0)
    adapter = rows.pop("llm_adapter")
    assert (sum(row.num_modules for row in rows.values()), adapter.num_modules) == (448, 60)
    assert (sum(row.num_parameters for row in rows.values()), adapter.num_parameters) == (69_271_552, 5_111_808)
    assert {name: row.num_modules for name, row in rows.items()} == {
        "self_attn": 112,
        "cross_attn": 112,
        "mlp": 56,
        "mod": 168,
    }


@pytest.mark.parametrize("frozen", ["self_attn", "cross_attn", "mlp", "mod", "llm_adapter"])
def test_frozen_components_get_no_lora_and_all_others_do(frozen):
    model = base_model()
    targets = block_linears(model)
    Lora(rank=2).attach(model, rates(**{frozen: 0}), seed=0)
    assert lora_names(model) == {name for name in targets if component_of(name) != frozen}
    assert lora_names(model) < set(targets)


def test_names_of_the_transformer_do_not_hit_the_frozen_adapter_by_their_suffix():
    model = base_model()
    Lora(rank=2).attach(model, rates(llm_adapter=0), seed=0)
    assert "blocks.0.self_attn.q_proj" in lora_names(model)
    assert not any(isinstance(module, LoraLinear) for module in model.llm_adapter.modules())


def test_freezing_everything_in_the_blocks_adds_nothing():
    model = base_model()
    frozen = rates(**dict.fromkeys(("self_attn", "cross_attn", "mlp", "mod", "llm_adapter"), 0))
    Lora(rank=2).attach(model, frozen, seed=0)
    assert not lora_names(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_only_lora_trains_and_the_base_keeps_its_bits():
    model, base = base_model(), dict(base_model().named_parameters())
    Lora(rank=2).attach(model, rates(), seed=0)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)
        if ".lora_" not in name:
            assert torch.equal(parameter, base.pop(name)), name
    assert not base


# Where it starts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fresh_lora_leaves_every_bit_of_the_output(dtype):
    model = base_model()
    before = model(*inputs())
    Lora(rank=4, dtype=dtype).attach(model, rates(), seed=0)
    assert torch.equal(model.eval()(*inputs()), before)


def fresh(seed=0, **frozen):
    model = base_model()
    Lora(rank=4).attach(model, rates(**frozen), seed)
    return {name: layer.lora_A.detach() for name, layer in lora_layers(model)}


def test_initial_values_depend_on_seed_and_name_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = fresh()
    torch.set_rng_state(state)
    base_model()
    after_base = torch.get_rng_state()
    torch.set_rng_state(state)
    fresh()
    assert torch.equal(torch.get_rng_state(), after_base)  # attaching draws nothing from the global generator
    torch.manual_seed(2)
    second = fresh(self_attn=0)  # a component less moves no other's values
    assert second
    assert all(torch.equal(values, first[name]) for name, values in second.items())
    assert all(not torch.equal(values, first[name]) for name, values in fresh(seed=1).items())
    same_shape = [name for name in first if first[name].shape == (4, 48)]
    assert not any(torch.equal(first[a], first[b]) for a in same_shape for b in same_shape if a < b)


def test_initial_values_are_kaiming_uniform_as_peft_draws_them():
    for name, values in fresh().items():
        expected = torch.empty_like(values)
        nn.init.kaiming_uniform_(expected, a=5**0.5)
        bound = values.shape[1] ** -0.5
        assert values.abs().max() <= bound, name
        assert values.abs().max() > 0.9 * bound
        assert values.std() == pytest.approx(float(expected.std()), rel=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_weights_and_file_have_the_dtype_asked_for(dtype):
    name = str(dtype).removeprefix("torch.")
    lora = Lora(rank=2, dtype=name)
    model = base_model()
    lora.attach(model, rates(), seed=0)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {dtype}
    assert {tensor.dtype for tensor in lora.tensors(model).values()} == {dtype}


# What it computes, and what is saved ---------------------------------------------------------------------------------


def merged(tensors):
    """The base model with B A added to its weights, by the names in the file."""
    model = base_model()
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            weight = model.get_submodule(stem.removeprefix("diffusion_model.")).weight
            weight.data += tensors[f"{stem}.lora_B.weight"].float() @ a.float()
    return model


@pytest.mark.parametrize(("rank", "alpha"), [(4, None), (4, 4.0), (4, 2.0), (6, 4.0), (1, 16.0)])
def test_saved_tensors_added_to_the_base_give_the_trained_model(error, rank, alpha):
    lora = Lora(rank=rank, alpha=alpha)
    model = trained(lora)
    output = model(*inputs())
    assert error(merged(lora.tensors(model))(*inputs()), output) < 1e-5
    assert error(base_model()(*inputs()), output) > 0.1


def test_scale_is_alpha_over_rank():
    halved = Lora(rank=4, alpha=2.0)
    model = trained(halved)
    key = "diffusion_model.blocks.0.mlp.layer1.lora_B.weight"
    weight = model.get_submodule("blocks.0.mlp.layer1").lora_B
    assert torch.equal(halved.tensors(model)[key], weight * 0.5)
    assert torch.equal(Lora(rank=4).tensors(trained(Lora(rank=4)))[key], weight)
    assert {layer.scale for _, layer in lora_layers(trained(Lora(rank=24, alpha=16.0)))} == {16 / 24}


def test_keys_are_those_that_comfyui_and_diffusers_load():
    lora = Lora(rank=2)
    keys = set(lora.tensors(trained(lora)))
    stems = [f"diffusion_model.{name}" for name in block_linears(base_model())]
    assert keys == {f"{stem}.lora_{part}.weight" for stem in stems for part in "AB"}
    assert "diffusion_model.blocks.0.adaln_modulation_self_attn.1.lora_A.weight" in keys
    assert "diffusion_model.llm_adapter.blocks.0.cross_attn.q_proj.lora_B.weight" in keys


def test_dropout_acts_in_training_only_and_follows_the_seed():
    lora = Lora(rank=4, dropout=0.5)
    model = trained(lora)
    still = model(*inputs())
    assert torch.equal(still, model(*inputs()))
    assert torch.equal(still, trained(Lora(rank=4))(*inputs()))
    model.train()
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(model(*inputs()))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], still)


def test_gradients_reach_every_matrix_of_a_trained_lora():
    model = trained(Lora(rank=2)).train()
    model(*inputs()).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name


@pytest.mark.parametrize(
    "keys", [{"rank": 0}, {"rank": 2.5}, {"alpha": 0.0}, {"dropout": 1.0}, {"dropout": -0.1}, {"dtype": "float16"}]
)
def test_settings_out_of_range_are_refused(keys):
    with pytest.raises(ValidationError):
        Lora(**keys)


def test_metadata_says_rank_and_a_scale_of_1():
    metadata = Lora(rank=8, alpha=2.0).metadata()
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "8"
    assert all(isinstance(value, str) for value in metadata.values())


# diffusers -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(cosmos):
    """diffusers' own pipeline with the base model's weights in its two modules."""
    model = base_model()
    native = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("llm_adapter.")}
    conditioner = AnimaTextConditioner(12, 20, 20, 2, 2, target_vocab_size=30)
    conditioner.load_state_dict(model.llm_adapter.state_dict())
    transformer = cosmos(model.shape, native)
    pipeline = AnimaModularPipeline()
    pipeline.update_components(transformer=transformer, text_conditioner=conditioner)
    return pipeline


def diffusers_velocity(pipeline):
    x, t, text = inputs()
    context = pipeline.text_conditioner(text.source, text.t5_ids, text.t5_mask, text.source_mask)
    padded = torch.cat([x, torch.zeros(2, 1, 1, 4, 6)], dim=1)
    return pipeline.transformer(padded, t[:, 0], context, return_dict=False)[0], context


@pytest.mark.parametrize(("rank", "alpha", "frozen"), [(4, None, None), (3, 6.0, None), (4, 2.0, "llm_adapter")])
def test_diffusers_loads_every_key_and_computes_the_same(tmp_path, pipeline, error, caplog, rank, alpha, frozen):
    lora = Lora(rank=rank, alpha=alpha)
    model = trained(lora)
    tensors = lora.tensors(model)
    if frozen is not None:
        tensors = {key: tensor for key, tensor in tensors.items() if frozen not in key}
    velocity, context = diffusers_velocity(pipeline)
    assert error(base_model()(*inputs()), velocity) < 1e-5

    path = tmp_path / "style.safetensors"
    save_weights(path, tensors, {**lora.metadata(), "modelspec.title": "style"})
    diffusers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            pipeline.load_lora_weights(tmp_path, weight_name=path.name)
    finally:
        diffusers_logging.disable_propagation()
    assert not caplog.records

    loaded = {
        f"{part}.{name}.lora_{side}.weight": getattr(layer, f"lora_{side}")
        for part in ("transformer", "text_conditioner")
        for name, layer in getattr(pipeline, part).named_modules()
        if isinstance(layer, LoraLayer)
        for side in "AB"
    }
    expected = diffusers_names(load_file(path))
    assert set(loaded) == set(expected)
    for key, matrices in loaded.items():
        (matrix,) = matrices.values()
        assert torch.equal(matrix.weight, expected[key]), key

    found, found_context = diffusers_velocity(pipeline)
    ours = merged(tensors)
    assert error(found, ours(*inputs())) < 1e-5
    assert error(found_context, pad_rows(ours.context(inputs()[2]).rows)) < 1e-5
    if frozen is None:
        assert error(found, model(*inputs())) < 1e-5
        assert error(found_context, pad_rows(model.context(inputs()[2]).rows)) < 1e-5
        assert error(found_context, context) > 0.05
    assert error(found, velocity) > 0.1


def test_what_diffusers_does_not_load_shows_in_its_log_or_as_an_error(tmp_path, pipeline, caplog):
    """The reasons for the keys of our files, and that the test above would see a key left over."""
    lora = Lora(rank=2)
    tensors = lora.tensors(trained(lora))
    stray = {"diffusion_model.blocks.0.mlp.layer9.lora_A.weight": torch.ones(2, 48)}
    save_weights(tmp_path / "stray.safetensors", tensors | stray, {})
    diffusers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            pipeline.load_lora_weights(tmp_path, weight_name="stray.safetensors", adapter_name="stray")
    finally:
        diffusers_logging.disable_propagation()
    assert "layer9" in caplog.text
    save_weights(
        tmp_path / "a.safetensors", tensors | {"diffusion_model.blocks.0.mlp.layer1.alpha": torch.ones(())}, {}
    )
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")


# How it begins, and how fast it learns ------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["kaiming", "orthogonal", "svd"])
def test_with_any_start_the_model_computes_what_the_base_computes(init):
    model = base_model()
    x, t, text = inputs()
    before = model(x, t, text)
    Lora(rank=4, init=init).attach(model, rates(), seed=0)
    assert torch.equal(model(x, t, text), before)


def test_orthogonal_rows_are_at_right_angles_and_differ_by_module_and_seed():
    firsts = []
    for seed in (0, 1):
        model = base_model(adapter=False)
        Lora(rank=4, init="orthogonal").attach(model, rates(), seed)
        for _, layer in lora_layers(model):
            assert torch.allclose(layer.lora_A @ layer.lora_A.t(), torch.eye(4), atol=1e-6)
            firsts.append(layer.lora_A.detach().flatten()[:8])
    assert len({tuple(first.tolist()) for first in firsts}) == len(firsts)


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (8, 64)])
def test_svd_gives_leading_right_singular_vectors_and_uniform_rows_beyond_them(shape, error):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(side, min(shape), generator=generator)).Q for side in shape)
    values = 0.9 ** torch.arange(min(shape))
    weight = left * values @ right.t()
    rank = 12
    found = down_matrix("svd", rank, weight, 0, "a")
    number = min(rank, *shape)
    assert found.shape == (rank, shape[1])
    leading = found[:number]
    assert torch.allclose(leading @ leading.t(), torch.eye(number), atol=1e-5)
    # The directions are those of torch's own decomposition, up to sign.
    exact = torch.linalg.svd(weight, full_matrices=False).Vh[:number]
    assert error((leading @ exact.t()).abs(), torch.eye(number)) < 1e-2
    assert (rank == number) or float(found[number:].abs().max()) <= shape[1] ** -0.5


def test_rank_stabilized_scale_is_alpha_over_the_root_of_rank():
    settings = Lora(rank=16, alpha=2.0, use_rslora=True, rank_pattern={".*[.]mlp[.].*": 4})
    scales = {name: layer.scale for name, layer in lora_layers(trained(settings))}
    assert scales["blocks.0.self_attn.q_proj"] == 2 / 4
    assert scales["blocks.0.mlp.layer1"] == 2 / 2
    assert Lora(rank=16, use_rslora=True).scale_of("a") == 4


def test_b_has_its_own_multiple_of_the_learning_rate_of_a():
    model = base_model(adapter=False)
    Lora(rank=2).attach(model, rates(), seed=0)
    chosen = LearningRates(ALL_TRAINED | {"mlp": 3e-5}, ((".*layer2", 1e-4),), 4.0)
    by_id = {id(p): g["base_lr"] for g in optimizer_groups(model.named_parameters(), chosen, 0.1) for p in g["params"]}
    expected = {"blocks.0.self_attn.q_proj": 1e-5, "blocks.1.mlp.layer1": 3e-5, "blocks.1.mlp.layer2": 1e-4}
    for name, rate in expected.items():
        layer = model.get_submodule(name)
        assert (by_id[id(layer.lora_A)], by_id[id(layer.lora_B)]) == (rate, 4 * rate)
