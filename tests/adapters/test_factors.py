"""LoKr and LoHa: what is trained is what ComfyUI's arithmetic makes of the file, and gradients are torch's own."""

import pytest
import torch
from pydantic import ValidationError

from anima_train.adapters.addition import adapted_layers
from anima_train.adapters.loha import Loha
from anima_train.adapters.lokr import Lokr, divided
from anima_train.adapters.lora import Lora
from anima_train.config.config import Config
from anima_train.model.compiled import CompiledBlocks, num_graphs
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.factor_linear import UPDATES, FactorLinear
from anima_train.model.lora_linear import DoraLinear, project
from anima_train.model.modulations import LinearBatch
from anima_train.model.quantized import quantize_blocks
from anima_train.model.recompute import runner
from anima_train.optim.groups import COMPONENTS, LearningRates, group_rows
from anima_train.training.summary import selection_text

RATES = LearningRates(dict.fromkeys(COMPONENTS, 1e-4))
SHAPE = TransformerShape(2, 48, 24, 16, 20, 8)
ADAPTERS = {
    "lokr, low": Lokr(rank=3, decompose_factor=4, alpha=1.5),
    "lokr, near the root": Lokr(rank=2, decompose_factor=-1, alpha=3.0),
    "lokr, whole": Lokr(decompose_factor=4, full_matrix=True),
    "loha": Loha(rank=3, alpha=1.5),
    "dora": Lora(rank=3, alpha=1.5, use_dora=True),
    "t-lora": Lora(rank=3, alpha=1.5, min_rank=1),
}


def base_model():
    generator = torch.Generator().manual_seed(0)
    model = MiniTrainDIT(SHAPE)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


def inputs():
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(2, 16, 1, 4, 6, generator=generator), torch.tensor([[0.3], [0.8]]),
        torch.randn(2, 5, 20, generator=generator),
    )  # fmt: skip


def trained(adapter, dtype=torch.float32):
    """A model whose updates are far from zero."""
    model = base_model().to(dtype)
    adapter.attach(model, RATES, seed=0)
    generator = torch.Generator().manual_seed(1)
    for _, layer in adapted_layers(model):
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.5).to(parameter.dtype)
    return model


def update_of(parts):
    """What ComfyUI adds to a weight at strength 1, by the keys of one module: its rules, in float32."""
    if "lora_A.weight" in parts:
        return parts["lora_B.weight"] @ parts["lora_A.weight"]
    if "hada_w1_a" in parts:
        scale = float(parts["alpha"]) / len(parts["hada_w1_b"])
        first, second = (parts[f"hada_w{n}_a"] @ parts[f"hada_w{n}_b"] for n in (1, 2))
        return first * second * scale
    ranks = [len(parts[f"lokr_w{n}_b"]) for n in (1, 2) if f"lokr_w{n}_b" in parts]
    first, second = (
        parts[f"lokr_w{n}"] if f"lokr_w{n}" in parts else parts[f"lokr_w{n}_a"] @ parts[f"lokr_w{n}_b"] for n in (1, 2)
    )
    return torch.kron(first, second) * (float(parts["alpha"]) / ranks[0] if ranks else 1.0)


def by_module(tensors, modules):
    """The tensors of a file by module, each by the rest of its key."""
    found = {module: {} for module in modules}
    for key, tensor in tensors.items():
        module = next(m for m in modules if key.startswith(f"diffusion_model.{m}."))
        found[module][key.removeprefix(f"diffusion_model.{module}.")] = tensor.float()
    return found


def merged_weight(weight, parts):
    """ComfyUI's weight at strength 1: with `dora_scale` it divides by the lengths of the base's rows."""
    whole = weight + update_of(parts)
    return whole * parts["dora_scale"] / weight.norm(dim=1, keepdim=True) if "dora_scale" in parts else whole


def merged(adapter, model):
    """The base with a file merged into it."""
    result = base_model()
    modules = [name for name, _ in adapted_layers(model)]
    for module, parts in by_module(adapter.tensors(model), modules).items():
        linear = result.get_submodule(module)
        linear.weight.data = merged_weight(linear.weight.data, parts)
    return result


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_trained_model_is_the_base_with_its_file_merged_by_comfyuis_rules(name, error):
    model = trained(ADAPTERS[name])
    with torch.no_grad():
        found, expected, before = (m(*inputs()) for m in (model, merged(ADAPTERS[name], model), base_model()))
    assert error(found, expected) < 1e-5
    assert error(before, expected) > 0.1


@pytest.mark.parametrize("case", ["lora", "loha", "lokr_full", "lokr_w2_low", "lokr_both_low", "dora_out"])
def test_the_rules_of_this_test_are_those_of_the_golden_file(golden, case, error):
    tensors = golden("adapters.safetensors")
    start = f"{case}.file."
    parts = {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
    assert error(merged_weight(tensors[f"{case}.weight"], parts), tensors[f"{case}.merged"]) < 1e-6


@pytest.mark.parametrize(("case", "names"), [
    ("loha", ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
    ("lokr_full", ("lokr_w1", "lokr_w2")),
    ("lokr_w2_low", ("lokr_w1", "lokr_w2_a", "lokr_w2_b")),
])  # fmt: skip
def test_the_golden_adapters_compute_in_training_what_their_merged_weights_compute(golden, case, names, error):
    tensors = golden("adapters.safetensors")
    factors = [tensors[f"{case}.file.{name}"] for name in names]
    rank = factors[1].shape[0] if case == "loha" else factors[-1].shape[0]
    scale = 1.0 if case == "lokr_full" else float(tensors[f"{case}.file.alpha"]) / rank
    kind = case.partition("_")[0]
    base = torch.nn.Linear(16, 24, bias=False)
    base.weight.data = tensors[f"{case}.weight"]
    linear = FactorLinear(base, kind, dict(zip(names, factors, strict=True)), names[0], scale, 0.0)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    assert error(linear(x), x @ tensors[f"{case}.merged"].t()) < 1e-5


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_model_begins_as_the_base_and_is_it_again_for_a_while(name):
    model = base_model()
    before = model(*inputs())
    ADAPTERS[name].attach(model, RATES, seed=0)
    assert torch.equal(model(*inputs()), before)
    assert ADAPTERS[name].is_without_effect(ADAPTERS[name].tensors(model).items())
    model = trained(ADAPTERS[name])
    after = model(*inputs())
    with ADAPTERS[name].as_base(model):
        assert torch.equal(model(*inputs()), before)
    assert torch.equal(model(*inputs()), after)
    assert not ADAPTERS[name].is_without_effect(ADAPTERS[name].tensors(model).items())


@pytest.mark.parametrize("recompute", ["nothing", "selective", "blocks"])
@pytest.mark.parametrize("name", ["lokr, low", "lokr, whole", "loha"])
def test_gradients_are_those_of_torch_whatever_is_recomputed(name, recompute, error):
    def gradients(model):
        names = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
        loss = model(*(each.double() for each in inputs())).square().mean()
        return dict(zip(names, torch.autograd.grad(loss, [model.get_parameter(key) for key in names]), strict=True))

    model = trained(ADAPTERS[name]).double()
    plain = trained(ADAPTERS[name]).double()
    for _, layer in adapted_layers(plain):
        layer.forward = lambda x, layer=layer: (
            x @ layer.weight.t() + UPDATES[layer.kind](x.flatten(0, -2), layer.factors, layer.scale).view(
                *x.shape[:-1], -1
            )
        )  # fmt: skip
    model.run_block = runner(recompute)
    expected = gradients(plain)
    for key, found in gradients(model).items():
        assert error(found, expected[key]) < 1e-9, key


@pytest.mark.parametrize("name", ["lokr, low", "loha"])
def test_updates_are_added_to_weights_of_a_byte(name, error):
    found = trained(ADAPTERS[name], torch.bfloat16)
    expected = found(*inputs())
    quantized = base_model().to(torch.bfloat16)
    quantize_blocks(quantized, "int8")
    ADAPTERS[name].attach(quantized, RATES, seed=0)
    quantized.load_state_dict(
        {key: value for key, value in found.state_dict().items() if "lokr" in key or "hada" in key}, strict=False
    )
    assert error(quantized(*inputs()), expected) < 0.1


def test_lengths_of_rows_are_trained_and_those_divided_by_are_exact(error):
    base = torch.nn.Linear(20, 12)
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=generator) for shape in ((3, 20), (12, 3)))
    linear = DoraLinear(base, down, up, 0.5, 0.0, base.weight.detach().norm(dim=1))
    linear.lora_magnitude.data *= 1.5
    whole = base.weight + 0.5 * up @ down
    norms = whole.norm(dim=1).detach()
    assert error(linear.current_norms(), norms) < 1e-6
    x = torch.randn(7, 20, generator=generator)
    expected = x @ (whole / norms[:, None] * linear.lora_magnitude[:, None]).t() + base.bias
    assert error(linear(x), expected) < 1e-6
    found, exact = (torch.autograd.grad(out.square().sum(), linear.lora_magnitude)[0] for out in (linear(x), expected))
    assert error(found, exact) < 1e-5


def test_linears_with_one_input_compute_dora_as_each_alone(error):
    model = trained(ADAPTERS["dora"])
    attention = model.blocks[0].self_attn
    linears = attention.q_proj, attention.k_proj, attention.v_proj
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    for together, linear in zip(project(x, *linears), linears, strict=True):
        assert error(together, linear(x)) < 1e-6
    model.batch_modulations()
    assert model.modulation_batches is None


def test_dora_excludes_a_lora_to_begin_with():
    with pytest.raises(ValidationError, match="excludes init_from_existing"):
        Lora(use_dora=True, init_from_existing="a.safetensors")


def test_sides_are_divided_below_the_factor_or_near_the_root():
    assert [divided(2048, factor) for factor in (1, 8, 16, -1, 4096)] == [
        (1, 2048), (8, 256), (16, 128), (32, 64), (32, 64)
    ]  # fmt: skip
    assert divided(6144, 10) == (8, 768)


def test_lokr_has_few_parameters_and_counts_modules():
    model = base_model()
    Lokr(rank=2, decompose_factor=4).attach(model, RATES, seed=0)
    rows = {row.component: row for row in group_rows(model, RATES)}
    assert rows["mlp"].num_modules == 4
    assert rows["self_attn"].num_parameters == 2 * 4 * (4 * 4 + 12 * 2 + 2 * 12)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_takes_inputs_of_the_update_alone(dropout, error):
    model = trained(Lokr(rank=3, decompose_factor=4, dropout=dropout)).train()
    first, second = model(*inputs()), model(*inputs())
    assert torch.equal(first, second) == (dropout == 0)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(*inputs()), model(*inputs()))


def test_modulations_with_factors_are_computed_one_by_one():
    model = trained(Lokr(rank=3))
    assert not LinearBatch.fits([pair[1] for pair in model.modulation_pairs])
    model.batch_modulations()
    assert model.modulation_batches is None


def test_a_whole_factor_has_no_rank():
    with pytest.raises(ValidationError, match="full_matrix has no rank: remove alpha, or full_matrix"):
        Lokr(full_matrix=True, alpha=2.0)
    with pytest.raises(ValidationError, match="expected -1, or at least 1"):
        Lokr(decompose_factor=0)


def test_metadata_name_the_kind():
    assert Lokr(decompose_factor=4).metadata()["ss_network_module"] == "lycoris.kohya"
    assert '"decompose_factor": 4' in Lokr(decompose_factor=4).metadata()["ss_network_args"]
    assert "ss_network_args" not in Lora().metadata()
    assert Lokr(full_matrix=True).metadata()["ss_network_dim"] == "Dynamic"


@pytest.mark.parametrize(
    ("adapter", "some"), [(Lokr(rank=3, alpha=1.5), False), (Lokr(rank=4, alpha=2.0), True), (Lokr(rank=64), False)]
)
def test_linears_on_which_alpha_has_no_effect_are_told(adapter, some):
    model = base_model()
    adapter.attach(model, RATES, 0)
    sides = [[divided(side, 8)[1] for side in layer.weight.shape] for _, layer in adapted_layers(model)]
    number = sum(2 * adapter.rank >= max(pair) for pair in sides)
    expected = f"note: adapter: alpha has no effect on {number} of {len(sides)} linears, whose factors are whole"
    assert [line.startswith(expected) for line in selection_text(adapter, model)] == [True] * some


@pytest.mark.slow
# Of dynamo, which hides it from everybody but pytest.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ["lokr, low", "loha", "dora"])
def test_one_graph_serves_all_blocks_and_gives_the_same_gradients(name, error):
    def gradients(model):
        names = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
        loss = model(*inputs()).square().mean()
        return dict(zip(names, torch.autograd.grad(loss, [model.get_parameter(key) for key in names]), strict=True))

    model = trained(ADAPTERS[name])
    expected = gradients(model)
    before = num_graphs()
    model.run_block = CompiledBlocks(model.run_block, backend="aot_eager")
    for key, found in gradients(model).items():
        assert error(found, expected[key]) < 1e-4, key
    assert num_graphs() == before + 1


def test_dora_is_not_divided_and_not_of_weights_of_a_byte():
    given = {"output_dir": "runs", "dataset": "a.toml", "max_steps": 1, "optimizer": {"type": "adamw", "lr": 1e-4}}
    model = {"type": "anima", "transformer_path": "a", "vae_path": "b", "llm_path": "c"}
    dora = {"type": "lora", "use_dora": True}
    with pytest.raises(ValidationError, match="use_dora: excludes sharding"):
        Config.model_validate({**given, "model": model, "adapter": dora, "sharding": "fsdp2"})
    for adapter, reader in ((dora, "use_dora"), ({"type": "lora", "init": "svd"}, 'init = "svd"')):
        with pytest.raises(ValidationError, match=f"{reader} reads the base weights, which model.transformer_dtype"):
            Config.model_validate({**given, "model": {**model, "transformer_dtype": "int8"}, "adapter": adapter})
