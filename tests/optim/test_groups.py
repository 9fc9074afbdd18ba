"""Parameter groups: components, decay, freezing, and the table of a real model's names."""

import copy

import pytest
import torch
from torch import nn

from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.llm_adapter import LLMAdapter, LLMAdapterShape
from anima_train.optim.groups import COMPONENTS, GroupRow, LearningRates, component_of, group_rows, optimizer_groups


def rates(**changed):
    return LearningRates({component: changed.get(component, 1e-5) for component in COMPONENTS})


def names_in(group, model):
    """The names of a group's parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in group["params"]]


def module_of(named):
    """A module with parameters of these names."""
    root = nn.Module()
    for name, parameter in named:
        *path, last = name.split(".")
        owner = root
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        owner.register_parameter(last, parameter)
    return root


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        adapter = LLMAdapter(LLMAdapterShape(2, 16, 8, 12, 20, 30))  # widths differ, so that in_proj has parameters
        return MiniTrainDIT(TransformerShape(3, 48, 24, 16, 20, 8), adapter)


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("blocks.0.self_attn.q_proj.weight", "self_attn"),
        ("blocks.27.self_attn.k_norm.weight", "self_attn"),
        ("blocks.3.cross_attn.output_proj.weight", "cross_attn"),
        ("blocks.3.mlp.layer1.weight", "mlp"),
        ("blocks.3.adaln_modulation_self_attn.1.weight", "mod"),
        ("blocks.3.adaln_modulation_cross_attn.2.weight", "mod"),
        ("blocks.3.adaln_modulation_mlp.2.weight", "mod"),
        ("final_layer.adaln_modulation.1.weight", "mod"),
        ("final_layer.linear.weight", "base"),
        ("x_embedder.proj.1.weight", "base"),
        ("t_embedder.1.linear_1.weight", "base"),
        ("t_embedding_norm.weight", "base"),
        ("llm_adapter.embed.weight", "llm_adapter"),
        ("llm_adapter.blocks.0.self_attn.q_proj.weight", "llm_adapter"),
        ("llm_adapter.blocks.5.mlp.2.bias", "llm_adapter"),
        ("llm_adapter.out_proj.weight", "llm_adapter"),
        ("blocks.3.adaln_modulation_self_attn.1.lora_A", "mod"),
        ("blocks.0.self_attn.q_proj.lora_B", "self_attn"),
        ("llm_adapter.blocks.0.cross_attn.q_proj.lora_A", "llm_adapter"),
    ],
)
def test_component_follows_from_the_full_name(name, component):
    assert component_of(name) == component
    assert component_of(name.removesuffix(".weight")) == component


def test_every_trainable_parameter_is_in_exactly_one_group(model):
    groups = optimizer_groups(model.named_parameters(), rates(), 0.1)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    for group in groups:
        assert {component_of(name) for name in names_in(group, model)} == {group["component"]}


def test_norms_biases_and_embeddings_do_not_decay(model):
    groups = optimizer_groups(model.named_parameters(), rates(), 0.1)
    still = {name for group in groups if group["weight_decay"] == 0 for name in names_in(group, model)}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    expected = {
        name
        for name, _ in model.named_parameters()
        if "norm" in name or name.endswith(".bias") or name == "llm_adapter.embed.weight"
    }
    assert still == expected
    assert "x_embedder.proj.1.weight" not in still


def test_each_component_has_its_rate_in_a_fixed_order(model):
    chosen = {component: (index + 1) * 1e-6 for index, component in enumerate(COMPONENTS)}
    backwards = reversed(list(model.named_parameters()))
    groups = optimizer_groups(backwards, LearningRates(chosen), 0.1)
    for group in groups:
        assert group["lr"] == group["base_lr"] == chosen[group["component"]]
    order = [(group["component"], group["weight_decay"]) for group in groups]
    forwards = optimizer_groups(model.named_parameters(), LearningRates(chosen), 0.1)
    assert order == [(group["component"], group["weight_decay"]) for group in forwards]
    assert order == sorted(order, key=lambda key: (COMPONENTS.index(key[0]), -key[1]))


def test_frozen_parameters_are_in_no_group():
    named = [
        ("blocks.0.mlp.layer1.weight", nn.Parameter(torch.ones(2, 2), requires_grad=False)),
        ("blocks.0.mlp.layer2.weight", nn.Parameter(torch.ones(2, 2))),
    ]
    (group,) = optimizer_groups(named, rates(), 0.1)
    assert [id(parameter) for parameter in group["params"]] == [id(named[1][1])]


def test_rate_0_freezes_a_component_and_no_other():
    chosen = rates(mod=0.0)
    assert chosen.is_frozen("blocks.0.adaln_modulation_self_attn.1.weight")
    assert not chosen.is_frozen("blocks.0.self_attn.q_proj.weight")
    assert chosen.by_component["self_attn"] == 1e-5


def test_table_counts_sixteen_linears_per_block_and_ten_per_adapter_block(model):
    model = copy.deepcopy(model).requires_grad_(False)
    linears = [
        (f"{name}.weight", module.weight.requires_grad_())
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "blocks." in name
    ]
    rows = {row.component: row for row in group_rows(model, rates())}
    found = {component: row.num_modules for component, row in rows.items()}
    blocks, adapter_blocks = 3, 2
    assert found == {
        "self_attn": 4 * blocks,
        "cross_attn": 4 * blocks,
        "mlp": 2 * blocks,
        "mod": 6 * blocks,
        "llm_adapter": 10 * adapter_blocks,
        "base": 0,
    }
    assert sum(row.num_parameters for row in rows.values()) == sum(weight.numel() for _, weight in linears)


def test_table_takes_the_two_matrices_of_a_lora_for_one_module():
    trained = [
        ("blocks.0.mlp.layer1.lora_A", nn.Parameter(torch.ones(2, 8))),
        ("blocks.0.mlp.layer1.lora_B", nn.Parameter(torch.ones(4, 2))),
        ("blocks.0.mlp.layer2.lora_A", nn.Parameter(torch.ones(2, 4))),
    ]
    frozen = nn.Parameter(torch.ones(4, 8), requires_grad=False)
    model = module_of([*trained, ("blocks.0.mlp.layer1.weight", frozen)])
    rows = group_rows(model, rates(mlp=3e-5))
    assert rows == [GroupRow("mlp", 3e-5, 2, 16 + 8 + 8), GroupRow("llm_adapter", 1e-5, 0, 0)]


def test_table_counts_a_weight_and_its_bias_as_one_module_and_lists_frozen_components():
    trained = [
        ("llm_adapter.out_proj.weight", nn.Parameter(torch.ones(4, 4))),
        ("llm_adapter.out_proj.bias", nn.Parameter(torch.ones(4))),
    ]
    frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)
    rows = group_rows(module_of([*trained, ("blocks.0.mlp.layer1.weight", frozen)]), rates(mlp=0.0))
    assert rows == [GroupRow("mlp", 0.0, 0, 0), GroupRow("llm_adapter", 1e-5, 1, 20)]
