"""The linear with a low-rank update against PEFT's and against plain algebra, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from anima_train.model.lora_linear import LoraLinear, project

RANK, WIDTH, OUT = 3, 12, (8, 8, 20)


def linear(out, bias=False, seed=0):
    module = nn.Linear(WIDTH, out, bias=bias)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
        parameter.requires_grad_(False)
    return module


def lora(base, scale=1.0, dropout=0.0, seed=10, dtype=torch.float32, rank=RANK, limits=None):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((rank, WIDTH), (base.out_features, rank)))
    return LoraLinear(base, a, b, scale, dropout, limits)


def gradients(outputs, x, modules):
    generator = torch.Generator().manual_seed(7)
    loss = sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outputs)
    wanted = [x, *(parameter for module in modules for parameter in module.parameters() if parameter.requires_grad)]
    return torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize(("bias", "alpha"), [(False, None), (True, 1.5), (False, 9.0)])
def test_output_and_gradients_are_pefts(error, bias, alpha):
    ours = lora(linear(8, bias), 1.0 if alpha is None else alpha / RANK)
    holder = nn.Sequential(linear(8, bias))
    config = LoraConfig(r=RANK, lora_alpha=alpha or RANK, target_modules=["0"])
    inject_adapter_in_model(config, holder)
    theirs = holder[0]
    theirs.lora_A["default"].weight.data, theirs.lora_B["default"].weight.data = ours.lora_A.data, ours.lora_B.data
    x = torch.randn(2, 5, WIDTH, requires_grad=True)
    found, expected = ours(x), theirs(x)
    assert error(found, expected) < 1e-6
    for mine, other in zip(gradients([found], x, [ours]), gradients([expected], x, [theirs]), strict=True):
        assert error(mine, other) < 1e-6


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("ranks", [(3, 3, 3), (2, 5, 1)])
def test_linears_that_read_the_same_input_together_are_the_same_as_alone(error, scale, ranks):
    modules = [
        lora(linear(out, seed=place), scale, seed=20 + place, rank=rank)
        for place, (out, rank) in enumerate(zip(OUT, ranks, strict=True))
    ]
    x = torch.randn(2, 5, WIDTH, requires_grad=True)
    together = project(x, *modules)
    alone = [F.linear(x, m.weight) + scale * F.linear(F.linear(x, m.lora_A), m.lora_B) for m in modules]
    assert [out.shape for out in together] == [(2, 5, out) for out in OUT]
    for found, expected in zip(together, alone, strict=True):
        assert error(found, expected) < 1e-6
    for mine, other in zip(gradients(together, x, modules), gradients(alone, x, modules), strict=True):
        assert error(mine, other) < 1e-6


LIMITS = [torch.tensor([1.0, 0.5, 0.1]), torch.tensor([1.0, 0.7]), torch.tensor([0.9, 0.6, 0.3, 0.0])]
LEVELS = torch.tensor([[0.5], [0.8]])


def test_rows_of_a_act_up_to_their_limits_on_each_sample_and_on_no_other(error):
    modules = [
        lora(linear(out, seed=place).double(), 0.7, 0.3, 20 + place, torch.float64, len(limits), limits)
        for place, (out, limits) in enumerate(zip(OUT, LIMITS, strict=True))
    ]
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    found = project(x, *modules, t=LEVELS)
    torch.manual_seed(3)
    dropped = F.dropout(x.flatten(0, 1), 0.3).view_as(x)
    expected = [
        F.linear(x, m.weight) + torch.stack([
            0.7 * dropped[place] @ m.lora_A.t() @ torch.diag((t <= limits).double()) @ m.lora_B.t()
            for place, t in enumerate(LEVELS)
        ])
        for m, limits in zip(modules, LIMITS, strict=True)
    ]  # fmt: skip
    assert max(map(error, found, expected)) < 1e-12
    for mine, other in zip(gradients(found, x, modules), gradients(expected, x, modules), strict=True):
        assert error(mine, other) < 1e-12
    modules[0].eval()
    whole = F.linear(x, modules[0].weight + 0.7 * modules[0].lora_B @ modules[0].lora_A)
    assert error(modules[0](x), whole) < 1e-12  # without t, as the LLM adapter calls it
    beside, alone = project(x, linear(8).double(), modules[0], t=LEVELS)[1], project(x, modules[0], t=LEVELS)[0]
    assert torch.equal(beside, alone)


def test_gradients_are_those_of_finite_differences():
    modules = [lora(linear(out, seed=place).double(), 0.7, dtype=torch.float64) for place, out in enumerate(OUT)]
    parameters = [parameter for module in modules for parameter in (module.lora_A, module.lora_B)]
    x = torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: tuple(project(x, *modules)), (x, *parameters))
    for module in modules:
        module.lora_limits = LIMITS[0]
    assert torch.autograd.gradcheck(
        lambda x, *_: tuple(project(x.view(2, 2, -1), *modules, t=LEVELS)), (x, *parameters)
    )


def test_a_linear_without_an_update_may_stand_beside_one_with_it(error):
    plain, adapted = linear(8, seed=1), lora(linear(20, seed=2))
    x = torch.randn(3, WIDTH)
    first, second = project(x, plain, adapted)
    assert error(first, x @ plain.weight.t()) < 1e-6
    assert error(second, x @ adapted.weight.t() + x @ adapted.lora_A.t() @ adapted.lora_B.t()) < 1e-6


def test_dropout_meets_the_update_alone_and_its_gradient_follows(error):
    module = lora(linear(8), dropout=0.5).train()
    x = torch.randn(200, WIDTH, requires_grad=True)
    torch.manual_seed(3)
    found = module(x)
    torch.manual_seed(3)
    expected = F.linear(x, module.weight) + F.linear(F.linear(F.dropout(x, 0.5), module.lora_A), module.lora_B)
    assert error(found, expected) < 1e-6
    for mine, other in zip(gradients([found], x, [module]), gradients([expected], x, [module]), strict=True):
        assert error(mine, other) < 1e-6
    assert error(module.eval()(x), found) > 0.1


def test_float32_updates_of_bfloat16_weights_compute_in_bfloat16_and_get_float32_gradients(error):
    module = lora(linear(8).bfloat16())
    exact = lora(linear(8).bfloat16().float())
    x = torch.randn(5, WIDTH).bfloat16().requires_grad_()
    found = module(x)
    assert found.dtype == torch.bfloat16
    assert error(found, exact(x.float())) < 1e-2
    found.float().square().sum().backward()
    assert module.lora_A.grad.dtype == module.lora_B.grad.dtype == torch.float32


def test_base_weights_get_no_gradient_and_need_none_for_the_input():
    module = lora(linear(8))
    module(torch.randn(5, WIDTH)).sum().backward()  # an input that needs none
    assert module.weight.grad is None
    assert module.lora_A.grad is not None
