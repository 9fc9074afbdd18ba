"""The linears that are chosen by expressions over their names, and the ranks, alphas and learning rates of some."""

import re

import pytest
import torch
from pydantic import ValidationError

from anima_train.adapters.lora import Lora, lora_layers
from anima_train.adapters.selection import PRESETS, block_linears, described
from anima_train.core.errors import ConfigError
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.llm_adapter import LLMAdapter, LLMAdapterShape
from anima_train.optim.groups import COMPONENTS, LearningRates, optimizer_groups

ALL = dict.fromkeys(COMPONENTS, 1e-5)


def model_of(adapter=True):
    torch.manual_seed(0)
    text = LLMAdapter(LLMAdapterShape(2, 20, 10, 12, 20, 30)) if adapter else None
    return MiniTrainDIT(TransformerShape(2, 48, 24, 16, 20, 8), text)


def chosen(*, rates=None, adapter=True, **settings):
    model = model_of(adapter)
    Lora(rank=2, **settings).attach(model, rates or LearningRates(ALL), seed=0)
    return [name for name, _ in lora_layers(model)]


def refusal(**settings):
    with pytest.raises(ConfigError) as raised:
        chosen(**settings)
    return str(raised.value)


def is_adaln(name):
    return ".adaln_modulation" in name


def is_attention(name):
    return re.search(r"\.(self|cross)_attn\.", name) is not None


def test_without_a_choice_every_linear_of_the_blocks_is_trained():
    assert chosen() == block_linears(model_of()) == chosen(target_modules="all") == chosen(target_modules=[])


def test_presets_choose_attention_and_mlps_with_adaln_or_without():
    names = block_linears(model_of())
    expected = {
        "all": names,
        "attention": [name for name in names if is_attention(name) and not is_adaln(name)],
        "attention+adaln": [name for name in names if is_attention(name) or is_adaln(name)],
        "attention+mlp": [name for name in names if not is_adaln(name)],
        "attention+mlp+adaln": names,
    }
    assert {preset: chosen(target_modules=preset) for preset in PRESETS} == expected


def test_without_adaln_a_third_of_the_parameters_is_left_out():
    with torch.device("meta"):
        models = [MiniTrainDIT(TransformerShape(28, 2048, 128, 16, 1024, 256)) for _ in range(2)]
    for model, preset in zip(models, ("all", "attention+mlp"), strict=True):
        Lora(rank=32, target_modules=preset).attach(model, LearningRates(ALL), seed=0)
    whole, without = (sum(p.numel() for p in model.parameters() if p.requires_grad) for model in models)
    assert whole == 69_271_552
    assert 1 - without / whole == pytest.approx(0.338, abs=0.001)


def test_expressions_match_whole_names_and_exclusions_are_taken_off():
    found = chosen(
        target_modules=[".*[.]mlp[.].*", ".*[.]self_attn[.].*"], exclude_modules=["llm_adapter[.].*", ".*layer2"]
    )
    names = block_linears(model_of(adapter=False))
    assert found == [name for name in names if ".self_attn." in name or name.endswith("mlp.layer1")]


def test_a_frozen_component_stays_frozen_whatever_is_chosen():
    rates = LearningRates(ALL | {"mlp": 0})
    found = chosen(target_modules="attention+mlp", rates=rates, adapter=False)
    assert found == [name for name in block_linears(model_of(False)) if ".mlp." not in name and not is_adaln(name)]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"target_modules": "atention"}, 'target_modules: "atention" matches no linear; did you mean "attention"?'),
        ({"target_modules": ["self_attn"]}, '"self_attn" matches no whole name, and a part of 20 names such as'),
        ({"target_modules": ["self_attn"]}, 'write ".*self_attn.*" for these'),
        ({"target_modules": ".*[.]q_prj"}, "matches no linear; names are such as blocks.0.self_attn.q_proj"),
        ({"exclude_modules": ["blocks[.]7[.].*"]}, 'exclude_modules: "blocks[.]7[.].*" matches no linear; names are'),
        (
            {"target_modules": "attention", "exclude_modules": [".*mlp.*"]},
            'exclude_modules: ".*mlp.*" matches no linear that',
        ),
        ({"exclude_modules": "all"}, "exclude_modules: leaves out all that target_modules chooses"),
        ({"rank_pattern": {"mlp": 4}}, 'rank_pattern: "mlp" matches no whole name'),
        ({"alpha_pattern": {"blocks": 4.0}}, 'alpha_pattern: "blocks" matches no whole name'),
        (
            {"lr_pattern": {".*mlp.*": 1e-3}, "target_modules": "attention"},
            'lr_pattern: ".*mlp.*" matches no linear that',
        ),
    ],
)
def test_an_expression_that_matches_nothing_is_refused_with_what_comes_near(settings, told):
    assert told in refusal(**settings)


def test_an_expression_for_what_is_frozen_is_refused_with_the_reason():
    rates = LearningRates(ALL | {"mlp": 0})
    told = refusal(target_modules=[".*self_attn.*", ".*[.]mlp[.].*"], rates=rates, adapter=False)
    assert '".*[.]mlp[.].*" matches no linear that is trained here: blocks.0.mlp.layer1 is frozen or left out' in told


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_what_is_no_regular_expression_is_refused(key):
    with pytest.raises(ValidationError, match=r'"\*mlp" is no regular expression: nothing to repeat'):
        Lora(**{key: "*mlp"})


def test_the_first_expression_that_matches_gives_rank_and_alpha():
    model = model_of(adapter=False)
    settings = Lora(
        rank=4, alpha=2.0, rank_pattern={".*[.]mlp[.].*": 8, ".*(layer1|q_proj)": 16},
        alpha_pattern={".*[.]mlp[.].*": 4.0},
    )  # fmt: skip
    settings.attach(model, LearningRates(ALL), seed=0)
    for name, layer in lora_layers(model):
        rank, alpha = (8, 4.0) if ".mlp." in name else (16, 2.0) if name.endswith("q_proj") else (4, 2.0)
        assert (len(layer.lora_A), layer.lora_B.shape[1], layer.scale) == (rank, rank, alpha / rank), name


def test_an_expression_that_never_counts_is_refused():
    settings = Lora(rank_pattern={".*": 8, ".*[.]mlp[.].*": 16})
    with pytest.raises(ConfigError, match="never counts, as expressions before it match all that it matches"):
        settings.attach(model_of(adapter=False), LearningRates(ALL), seed=0)


def test_saved_weights_hold_each_scale_folded():
    model = model_of(adapter=False)
    settings = Lora(rank=4, alpha=2.0, rank_pattern={".*layer1": 8}, alpha_pattern={".*layer1": 16.0})
    settings.attach(model, LearningRates(ALL), seed=0)
    for _, layer in lora_layers(model):
        layer.lora_B.data.fill_(1)
    tensors = settings.tensors(model)
    assert float(tensors["diffusion_model.blocks.0.mlp.layer1.lora_B.weight"][0, 0]) == 2
    assert float(tensors["diffusion_model.blocks.0.mlp.layer2.lora_B.weight"][0, 0]) == 0.5
    assert settings.metadata()["ss_network_dim"] == "Dynamic"


def test_learning_rates_of_modules_make_groups_of_their_own():
    model = model_of(adapter=False)
    Lora(rank=2).attach(model, LearningRates(ALL), seed=0)
    rates = LearningRates(ALL, ((r"blocks\.1\.mlp\..*", 3e-5), (r".*\.mlp\..*", 2e-5)))
    groups = optimizer_groups(model.named_parameters(), rates, 0.1)
    by_id = {id(p): group["base_lr"] for group in groups for p in group["params"]}
    for name, layer in lora_layers(model):
        expected = 1e-5 if ".mlp." not in name else 3e-5 if name.startswith("blocks.1.") else 2e-5
        assert by_id[id(layer.lora_A)] == by_id[id(layer.lora_B)] == expected
    assert len(groups) == 4 + 1


def test_names_are_shown_with_the_number_of_their_blocks():
    text = described(chosen(target_modules=[".*self_attn[.]q_proj"]))
    assert text == "blocks.*.self_attn.q_proj (2), llm_adapter.blocks.*.self_attn.q_proj (2)"
