"""The path between image and noise."""

import torch

from anima_train.objective.flow import add_noise, velocity_target


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_velocity_is_the_derivative_of_the_path():
    latents, noise = draw(3, 16, 1, 4, 6, seed=0), draw(3, 16, 1, 4, 6, seed=1)
    t = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    h = 1e-4
    slope = (add_noise(latents, noise, t + h) - add_noise(latents, noise, t - h)) / (2 * h)
    torch.testing.assert_close(slope, velocity_target(latents, noise), rtol=0, atol=1e-9)


def test_t_0_is_the_image_and_t_1_is_the_noise_each_sample_its_own():
    latents, noise = draw(2, 16, 1, 4, 4, seed=0), draw(2, 16, 1, 4, 4, seed=1)
    path = add_noise(latents, noise, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert torch.equal(path[0], latents[0])
    assert torch.equal(path[1], noise[1])


def test_one_step_along_the_velocity_from_noise_is_the_image():
    latents, noise = draw(1, 16, 1, 4, 4, seed=0), draw(1, 16, 1, 4, 4, seed=1)
    torch.testing.assert_close(noise - velocity_target(latents, noise), latents)
