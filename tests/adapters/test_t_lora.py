"""T-LoRA: which components of the rank act at which noise level, in training and in evaluation, and what is refused."""

import math
from functools import partial

import pytest
import torch
from pydantic import ValidationError

from anima_train.adapters.addition import adapted_layers
from anima_train.adapters.lora import Lora, rank_limits
from anima_train.config.config import Config
from anima_train.config.notes import without_effect
from anima_train.core.random import stream
from anima_train.data.loader import Batch
from anima_train.evaluation.evaluate import masked_ranks, measure
from anima_train.evaluation.results import Evaluation
from anima_train.model.compiled import CompiledBlocks, num_graphs
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.quantized import quantize_blocks
from anima_train.model.recompute import runner
from anima_train.objective.losses import Loss
from anima_train.optim.groups import COMPONENTS, LearningRates
from anima_train.training.summary import selection_text

RATES = LearningRates(dict.fromkeys(COMPONENTS, 1e-4))
T_LORA = Lora(rank=5, alpha=3.0, min_rank=2, alpha_rank_scale=2.0, rank_pattern={".*layer1": 8})
LEVELS = torch.tensor([[0.02], [0.45], [0.9]])


def active_ranks(t, rank, min_rank, alpha_rank_scale):
    """The rule as it is written, for one t."""
    return math.floor((1 - t) ** alpha_rank_scale * (rank - min_rank)) + min_rank


def model_of(adapter, quantization=None, batched=True):
    """A model with updates far from zero, the same ones with and without a mask."""
    model = MiniTrainDIT(TransformerShape(2, 48, 24, 16, 20, 8))
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=stream(0, name)) * 0.2
    if quantization is not None:
        quantize_blocks(model.to(torch.bfloat16), quantization)
    adapter.attach(model, RATES, seed=0)
    for name, layer in adapted_layers(model):
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=stream(1, name)) * 0.3
    if batched:
        model.batch_modulations()
    return model


def inputs(t=LEVELS):
    generator = torch.Generator().manual_seed(3)
    size = len(t)
    return (
        torch.randn(size, 16, 1, 4, 6, generator=generator), t, torch.randn(size, 5, 20, generator=generator)
    )  # fmt: skip


def cut_to(model, t):
    """Take the components out of a plain LoRA's files that do not act at a noise level."""
    for _, layer in adapted_layers(model):
        rank = layer.lora_B.shape[1]
        layer.lora_B.data[:, active_ranks(t, rank, T_LORA.min_rank, T_LORA.alpha_rank_scale) :] = 0
    return model


@pytest.mark.parametrize("alpha_rank_scale", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("rank", "min_rank"), [(1, 1), (8, 8), (8, 1), (32, 16), (7, 5)])
def test_as_many_components_act_as_the_formula_says(rank, min_rank, alpha_rank_scale):
    limits = rank_limits(rank, min_rank, alpha_rank_scale)
    levels = [0.0, 1.0, *torch.rand(300, generator=torch.Generator().manual_seed(0)).tolist()]
    for t in levels:
        acts = torch.tensor(t) <= limits
        number = active_ranks(t, rank, min_rank, alpha_rank_scale)
        assert acts.tolist() == [True] * number + [False] * (rank - number), t
    assert active_ranks(0.0, rank, min_rank, alpha_rank_scale) == rank


@pytest.mark.parametrize(("adapter", "quantization", "batched", "tolerance"), [
    (T_LORA, None, True, 1e-5), (T_LORA, None, False, 1e-5), (T_LORA, "int8", True, 0.02),
    (T_LORA.model_copy(update={"rank_pattern": {}}), None, True, 1e-5),
])  # fmt: skip
@torch.no_grad()
def test_in_training_each_sample_has_its_own_rank_and_in_evaluation_the_file_acts_whole(
    error, adapter, quantization, batched, tolerance
):
    plain = partial(model_of, adapter.model_copy(update={"min_rank": None}), quantization, batched)
    model = model_of(adapter, quantization, batched)
    x, t, text = inputs()
    found = model.train()(x, t, text)
    for place, level in enumerate(t):
        part = slice(place, place + 1)
        cut = cut_to(plain(), float(level))
        assert error(found[part], cut(x[part], t[part], text[part])) < tolerance
    whole = plain()(x, t, text)
    assert torch.equal(model.eval()(x, t, text), whole)  # as before each preview
    assert error(found, whole) > 0.05
    with masked_ranks(model):
        assert torch.equal(model(x, t, text), found)
    assert torch.equal(model(x, t, text), whole)
    model.train()
    with adapter.as_base(model), adapter.as_base(untrained := plain()):
        assert torch.equal(model(x, t, text), untrained(x, t, text))


@torch.no_grad()
def test_an_evaluation_measures_the_file_and_beside_it_what_was_trained():
    model = model_of(T_LORA)
    latents, t, text = inputs()
    batch = Batch(latents, torch.randn_like(latents), t[:, 0], text, None, ("",) * 3)
    values = {}
    for training in (True, False):
        model.train(training)
        (values[training],) = measure(model, batch, Loss(), [], None, None)
    whole, masked = measure(model, batch, Loss(), [], None, lambda: masked_ranks(model))
    assert torch.equal(whole, values[False])
    assert torch.equal(masked, values[True])
    result = Evaluation("new", "validation", ("sigma_0.50",), ("",) * 3, whole[:, None], None, masked[:, None])
    metrics = result.metrics(None)
    assert metrics["new/loss"] == pytest.approx(float(whole.mean()))
    for key in ("new/loss_as_trained", "new/loss_as_trained_sigma_0.50"):
        assert metrics[key] == pytest.approx(float(masked.mean()))


def gradients(model, *given):
    model.zero_grad()
    model.train()(*given).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.slow
# Of dynamo, which hides it from everybody but pytest.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_all_noise_levels_and_evaluations_of_both_kinds_share_the_graphs(error):
    model = model_of(Lora(rank=4, min_rank=1))
    expected = gradients(model, *inputs())
    with torch.no_grad():
        whole = model.eval()(*inputs())
    model.run_block = CompiledBlocks(runner("nothing"), backend="eager")
    before = num_graphs()
    for name, gradient in gradients(model, *inputs()).items():
        assert error(gradient, expected[name]) < 1e-4, name
    gradients(model, *inputs(LEVELS / 2))
    gradients(model, *inputs(LEVELS.repeat(2, 1)))
    assert num_graphs() == before + 1
    with torch.no_grad():
        assert error(model.eval()(*inputs()), whole) < 1e-5
        with masked_ranks(model):
            model(*inputs())
    assert num_graphs() == before + 2


def test_components_that_act_in_no_sample_get_no_gradient():
    noisy = torch.full((2, 1), 0.95)
    for name, gradient in gradients(model_of(Lora(rank=4, min_rank=1)), *inputs(noisy)).items():
        used, unused = (gradient[:, :1], gradient[:, 1:]) if "lora_B" in name else (gradient[:1], gradient[1:])
        assert used.any(), name
        assert not unused.any(), name


@pytest.mark.parametrize(("settings", "problem"), [
    ({"rank": 8, "min_rank": 8}, "is not below the rank, 8: write a smaller number"),
    ({"rank": 8, "min_rank": 9}, "is not below the rank, 8"),
    ({"rank": 4, "min_rank": 8, "rank_pattern": {".*mlp.*": 8}}, "is not below the rank, 8"),
    ({"rank": 8, "min_rank": 4, "use_dora": True}, "excludes use_dora"),
    ({"rank": 8, "min_rank": 0}, "greater than or equal to 1"),
])  # fmt: skip
def test_what_cannot_be_masked_is_refused(settings, problem):
    with pytest.raises(ValidationError, match=problem):
        Lora(**settings)
    assert Lora(rank=8, min_rank=5, rank_pattern={".*mlp.*": 4}).masks_ranks


def test_a_rank_to_fall_to_has_no_effect_where_the_llm_adapter_trains_alone():
    frozen = {f"{part}_lr": 0 for part in ("self_attn", "cross_attn", "mlp", "mod")}
    given = {"output_dir": "runs", "dataset": "a.toml", "max_steps": 1, "optimizer": {"type": "adamw", "lr": 1e-4}}
    for rates, noted in ((frozen, True), ({**frozen, "mod_lr": 1e-5}, False)):
        model = {"type": "anima", "transformer_path": "a", "vae_path": "b", "llm_path": "c", **rates}
        config = Config.model_validate({**given, "model": model, "adapter": {"type": "lora", "min_rank": 2}})
        assert ("adapter.min_rank" in dict(without_effect(config))) == noted


@pytest.mark.parametrize(("ranks", "masked"), [({".*": 4}, False), ({".*layer1": 4}, True)])
def test_a_rank_to_fall_to_that_no_linear_is_above_is_told(ranks, masked):
    adapter = Lora(rank=8, min_rank=5, rank_pattern=ranks)
    text = "\n".join(selection_text(adapter, model_of(adapter)))
    assert ("adapter: a T-LoRA" in text, "min_rank has no effect" in text) == (masked, not masked)


def test_how_the_rank_falls_has_no_effect_without_where_to():
    given = {"output_dir": "runs", "dataset": "a.toml", "max_steps": 1, "optimizer": {"type": "adamw", "lr": 1e-4}}
    given["model"] = {"type": "anima", "transformer_path": "a", "vae_path": "b", "llm_path": "c"}
    for more, noted in (({}, True), ({"min_rank": 2}, False)):
        config = Config.model_validate({**given, "adapter": {"type": "lora", "alpha_rank_scale": 2.0, **more}})
        assert ("adapter.alpha_rank_scale" in dict(without_effect(config))) == noted
