"""The losses against the reference's values and plain float64 arithmetic."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from anima_train.objective.losses import Loss, coarse_errors

BIG = (1, 2, 1, 116, 116)  # 928 pixels a side: the smallest square with a coarse term
KINDS = [Loss(), Loss("huber", 0.5), Loss("smooth_l1", 0.5), Loss("pseudo_huber", 0.5), Loss(multiscale_weight=0.5)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def reference(golden):
    values = golden("losses.json")
    generator = torch.Generator().manual_seed(values["seed"])
    prediction = torch.randn(values["shape"], generator=generator)
    target = torch.randn(values["shape"], generator=generator)
    mask = (torch.rand(2, 1, 1, 120, 116, generator=generator) > 0.4).float()
    return prediction, target, mask, values


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("mse", Loss()),
        ("huber_delta_0.5", Loss("huber", 0.5)),
        ("smooth_l1_beta_0.5", Loss("smooth_l1", 0.5)),
        ("multiscale_0.5", Loss(multiscale_weight=0.5)),
    ],
)
def test_golden_values_are_met(reference, name, loss):
    prediction, target, _, values = reference
    assert float(loss(prediction, target).mean()) == pytest.approx(values[name], abs=1e-6)


def test_golden_value_with_a_mask_is_met(reference):
    prediction, target, mask, values = reference
    assert float(Loss()(prediction, target, mask).mean()) == pytest.approx(values["mse_masked"], abs=1e-6)


def test_golden_value_of_a_small_image_has_no_coarse_term(reference):
    prediction, target, _, values = reference
    loss = Loss(multiscale_weight=0.5)(prediction[..., :32, :32], target[..., :32, :32])
    assert float(loss.mean()) == pytest.approx(values["multiscale_0.5_small_32x32"], abs=1e-6)


@pytest.mark.parametrize(("height", "width", "has_coarse_term"), [(116, 116, True), (114, 114, False), (58, 230, True)])
def test_coarse_term_starts_at_nine_tenths_of_1024_pixels(height, width, has_coarse_term):
    prediction, target = draw(1, 2, 1, height, width), draw(1, 2, 1, height, width, seed=1)
    plain = Loss()(prediction, target)
    assert bool((Loss(multiscale_weight=0.5)(prediction, target) != plain).item()) == has_coarse_term


@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
def test_pseudo_huber_is_its_formula(size):
    prediction, target = draw(2, 4, 1, 6, 8) * size, draw(2, 4, 1, 6, 8, seed=1) * size
    expected = ((prediction.double() - target.double()) ** 2 + 0.5**2).sqrt() - 0.5
    found = Loss("pseudo_huber", 0.5)(prediction, target)
    torch.testing.assert_close(found.double(), expected.mean(dim=(1, 2, 3, 4)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss", KINDS, ids=str)
def test_each_sample_has_its_own_loss(loss):
    prediction, target = draw(3, *BIG[1:]), draw(3, *BIG[1:], seed=1)
    mask = torch.rand(3, 1, *BIG[2:], generator=torch.Generator().manual_seed(2))
    together = loss(prediction, target, mask)
    alone = [loss(prediction[i : i + 1], target[i : i + 1], mask[i : i + 1]) for i in range(3)]
    assert together.shape == (3,)
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("loss", KINDS, ids=str)
def test_inputs_in_bfloat16_are_compared_in_float32(loss):
    prediction, target = draw(*BIG).bfloat16(), draw(*BIG, seed=1).bfloat16()
    found = loss(prediction, target)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss(prediction.float(), target.float()))


@pytest.mark.parametrize("loss", KINDS, ids=str)
def test_mask_multiplies_the_loss_and_the_mean_is_over_everything(loss):
    prediction, target = draw(*BIG), draw(*BIG, seed=1)
    whole = loss(prediction, target)
    torch.testing.assert_close(loss(prediction, target, torch.ones(1, 1, *BIG[2:])), whole)
    torch.testing.assert_close(loss(prediction, target, torch.full((1, 1, *BIG[2:]), 0.25)), whole / 4)
    half = torch.zeros(1, 1, *BIG[2:])
    half[..., : BIG[-1] // 2] = 1
    left = loss(prediction, prediction.where(half == 0, target))
    torch.testing.assert_close(loss(prediction, target, half), left)
    assert loss(prediction, target, torch.zeros(1, 1, *BIG[2:])).item() == 0


@pytest.mark.parametrize("loss", KINDS, ids=str)
def test_what_the_mask_excludes_gets_no_gradient_even_beside_what_it_includes(loss):
    prediction, target = draw(*BIG).requires_grad_(), draw(*BIG, seed=1)
    mask = (torch.rand(1, 1, *BIG[2:], generator=torch.Generator().manual_seed(2)) > 0.5).float()
    loss(prediction, target, mask).sum().backward()
    excluded = (mask == 0).expand_as(prediction)
    assert prediction.grad.isfinite().all()
    assert not prediction.grad[excluded].any()
    assert prediction.grad[~excluded].count_nonzero() == (~excluded).sum()


def test_coarse_term_averages_2_by_2_and_is_weighted():
    prediction, target = draw(*BIG), draw(*BIG, seed=1)
    difference = (prediction - target).double()
    fine = difference.square().mean()
    coarse = F.avg_pool2d(difference[:, :, 0], 2).square().mean()
    found = Loss(multiscale_weight=0.5)(prediction, target)
    assert found.item() == pytest.approx(float((fine + 0.5 * coarse) / 1.5), rel=1e-6)


def test_coarse_term_under_a_mask_averages_what_the_mask_includes():
    prediction, target = torch.zeros(BIG), torch.zeros(BIG)
    prediction[..., 0, 0], prediction[..., 0, 1] = 1.0, 3.0  # of the four pixels of one cell, these two
    mask = torch.zeros(1, 1, *BIG[2:])
    mask[..., 0, :2] = 1
    fine = (1 + 9) / (116 * 116)
    coarse = ((1 + 3) / 2) ** 2 * 0.5 / (58 * 58)
    found = Loss(multiscale_weight=0.5)(prediction, target, mask)
    assert found.item() == pytest.approx((fine + 0.5 * coarse) / 1.5, rel=1e-6)


@pytest.mark.parametrize("loss", [Loss(), Loss("huber", 0.5), Loss(multiscale_weight=0.5)])
def test_by_mask_area_a_half_masked_image_weighs_as_much_as_what_is_left_of_it(loss):
    generator = torch.Generator().manual_seed(3)
    prediction, target = torch.randn(2, 2, 16, 1, 128, 128, generator=generator)
    half = torch.zeros(2, 1, 1, 128, 128)
    half[..., :64, :] = 1
    cut = loss(prediction[..., :64, :], target[..., :64, :])
    if loss.multiscale_weight is not None:  # the cut image is too small for the coarse term
        coarse = coarse_errors((prediction - target)[..., :64, :], None).flatten(1).mean(1)
        cut = (cut + 0.5 * coarse) / 1.5
    assert torch.allclose(replace(loss, by_mask_area=True)(prediction, target, half), cut, rtol=1e-5)
    assert torch.allclose(loss(prediction, target, half), cut / 2, rtol=1e-5)


def test_by_mask_area_an_empty_mask_weighs_nothing_and_no_mask_changes_nothing():
    prediction, target = torch.randn(2, 1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    loss = Loss(by_mask_area=True)
    assert float(loss(prediction, target, torch.zeros(1, 1, 1, 8, 8))) == 0
    assert torch.equal(loss(prediction, target), Loss()(prediction, target))
