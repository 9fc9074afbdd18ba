"""Learning is real: training on a few latents drives the loss down, and integrating the velocity gives them back.

One wrong sign, a swapped t or a sampler running the wrong way fails here.
"""

import pytest
import torch

from anima_train.adapters.full import Full
from anima_train.adapters.loha import Loha
from anima_train.adapters.lokr import Lokr
from anima_train.adapters.lora import Lora
from anima_train.core.random import stream
from anima_train.core.text_batch import pad_rows
from anima_train.data.loader import Batch
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.objective.losses import Loss
from anima_train.objective.step import compute_loss
from anima_train.objective.timesteps import Timesteps, shifted
from anima_train.optim.groups import COMPONENTS, LearningRates, optimizer_groups
from anima_train.optim.optimizers import AdamW
from anima_train.sampling.samplers import Euler

SHAPE = TransformerShape(num_blocks=2, width=96, head_dim=24, in_channels=16, context_width=32, adaln_lora_dim=32)
TIMESTEPS = Timesteps(sigmoid_scale=1.3)


def target_latents(seed):
    """Two smooth latents, and a context for each."""
    coarse = torch.randn(2, 16, 2, 2, generator=stream(seed, "coarse"))
    latents = torch.nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear").unsqueeze(2)
    return latents, pad_rows(torch.randn(2, 3, 32, generator=stream(seed, "context")))[:, :16]


def random_transformer():
    model = MiniTrainDIT(SHAPE)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            deviation = 0.02 if "final_layer" in name or ".2." in name else parameter.shape[1] ** -0.5
            parameter.data = torch.randn(parameter.shape, generator=stream(0, name)) * deviation
    return model


def train(model, adapter, latents, context, num_steps, lr):
    """Train through the same loss, groups and optimizer as a run; returns the losses."""
    rates = LearningRates(dict.fromkeys(COMPONENTS, lr))
    adapter.attach(model, rates, seed=0)
    optimizer = AdamW(lr=lr, weight_decay=0.0).build(optimizer_groups(model.named_parameters(), rates, 0.0))
    losses = []
    repeats = 8
    for step in range(num_steps):
        generator = stream(1, "step", step)
        x0 = latents.repeat(repeats, 1, 1, 1, 1)
        noise = torch.randn(x0.shape, generator=generator)
        quantiles = torch.rand(len(x0), generator=generator, dtype=torch.float64)
        t = torch.tensor([TIMESTEPS.at(float(quantile), 16) for quantile in quantiles])
        batch = Batch(x0, noise, t, context.repeat(repeats, 1, 1), None, ())
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, 2 * (1 - step / num_steps))
        loss = compute_loss(model, batch, Loss()).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def sample(model, context, seed):
    noise = torch.randn(2, 16, 1, 8, 8, generator=stream(seed, "sampling"))
    levels = [shifted(1 - step / 50, 3.0) for step in range(51)]
    return Euler().sample(lambda x, t: model(x, torch.full((2, 1), t), context), noise, levels, 1.0, lambda: noise)


@pytest.fixture(scope="module")
def pretrained():
    latents, context = target_latents(0)
    model = random_transformer()
    return model, train(model, Full(), latents, context, num_steps=500, lr=3e-3), latents, context


def test_full_fine_tune_learns_latents_and_sampling_gives_them_back(pretrained, error):
    model, losses, latents, context = pretrained
    assert sum(losses[-20:]) < sum(losses[:5]) / 5 * 20 / 10
    for seed in range(3):
        assert error(sample(model, context, seed), latents) < 0.1


# Settings and learning rate.
ADAPTERS = {
    "lora": (Lora(rank=16), 3e-3),
    "dora": (Lora(rank=16, use_dora=True), 3e-3),
    "t-lora": (Lora(rank=16, min_rank=8, init="orthogonal"), 3e-3),
    "lokr": (Lokr(decompose_factor=2, full_matrix=True), 3e-3),
    "loha": (Loha(rank=8), 3e-3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_on_that_model_learns_other_latents(pretrained, error, name):
    latents, context = target_latents(7)
    model = MiniTrainDIT(SHAPE)
    model.load_state_dict(pretrained[0].state_dict())
    assert error(sample(model, context, 0), latents) > 0.5
    adapter, lr = ADAPTERS[name]
    losses = train(model, adapter, latents, context, num_steps=500, lr=lr)
    assert sum(losses[-20:]) < sum(losses[:5]) / 5 * 20 / 10
    for seed in range(3):
        assert error(sample(model, context, seed), latents) < 0.1
