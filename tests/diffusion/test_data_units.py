"""Likelihoods of normalised data are those of the data: by integrals over the bins as they lie among normalised values."""

import math

import pytest
import scipy.stats
import torch

from diffusers_ext.diffusion.betas import make_betas
from diffusers_ext.diffusion.data_units import DataUnits
from diffusers_ext.diffusion.losses import bound_loss
from diffusers_ext.diffusion.noising import NoiseLevel, NoiseSchedule, Normal, add_noise, predict_eps
from diffusers_ext.diffusion.paths import ContinuousTime
from diffusers_ext.diffusion.probability_flow import flow_bound
from diffusers_ext.diffusion.reverse_chain import ReverseChain
from diffusers_ext.diffusion.timesteps import make_timesteps
from diffusers_ext.diffusion.variational_bound import bits_per_dim, decoder_nats, variational_bound
from gaussian_oracle import EPS, VARIANCE, X0, denoise, optimal_variance


# By channel; of x ~ N(0, VARIANCE) the data are shift + scale x.
UNITS = DataUnits(
    torch.tensor([0.1, -0.3], dtype=torch.float64).view(1, 2, 1, 1),
    torch.tensor([0.2, 0.05], dtype=torch.float64).view(1, 2, 1, 1),
)


def of_edges(y, p, num_bins=256):
    """-log of the mass between the edges of the bin of y, as they are for the normalised."""
    half = 1 / (num_bins - 1)
    low, high = torch.where(y < -1 + half, -torch.inf, y - half), torch.where(y > 1 - half, torch.inf, y + half)
    low, high = ((edge - UNITS.shift) / UNITS.scale for edge in (low, high))
    cdf = scipy.stats.norm(p.mean.numpy(), p.std.numpy()).cdf
    return -torch.log(torch.from_numpy(cdf(high.numpy()) - cdf(low.numpy())))


def test_the_distortion_is_the_mass_of_the_bins_of_the_data():
    y = (
        (torch.tensor([0.0, 60.0, 255.0, 138.0], dtype=torch.float64) * (2 / 255) - 1)
        .view(-1, 1, 1, 1)
        .expand(-1, 2, 1, 1)
    )
    x = (y - UNITS.shift) / UNITS.scale
    p = Normal(0.9 * x, torch.full_like(x, 2.0))
    torch.testing.assert_close(decoder_nats(x, p, units=UNITS), of_edges(y, p), rtol=1e-8, atol=0)
    # And all of them together are all there is.
    every = torch.linspace(-1, 1, 256, dtype=torch.float64).view(-1, 1, 1, 1)
    x = (every - UNITS.shift) / UNITS.scale
    p = Normal(torch.full_like(x, 0.7), torch.full_like(x, 1.3))
    torch.testing.assert_close(decoder_nats(x, p, units=UNITS).neg().exp().sum(0).flatten(), torch.ones(2).double())


def test_the_bounds_of_gaussian_data_are_the_entropy_of_the_data_and_not_of_the_normalised():
    schedule = NoiseSchedule(make_betas("linear", 1000))
    timesteps = make_timesteps("trailing", 20, 1000).tolist()
    variances = [optimal_variance(schedule, *pair) for pair in zip(timesteps, [*timesteps[1:], -1], strict=True)]
    chain = ReverseChain(schedule, timesteps, torch.tensor(variances[::-1], dtype=torch.float64))

    path = ContinuousTime(schedule)

    def answer(x_t, timesteps):
        angle = path.angle(timesteps).view(-1, 1, 1, 1)
        level = NoiseLevel(angle.cos(), angle.sin())
        return predict_eps(denoise(x_t, level), x_t, level)

    x0, eps = X0.expand(4, 2, 1, 1), EPS.expand(4, 2, 1, 1)
    options = {"num_bins": None, "units": UNITS}
    entropies = [
        0.5 * math.log2(2 * math.pi * math.e * VARIANCE * scale**2) for scale in UNITS.scale.flatten().tolist()
    ]
    bound = variational_bound(answer, x0, chain, "epsilon", "optimal", noise=lambda i: eps, **options)
    assert bits_per_dim(bound.total, 2).mean().item() == pytest.approx(sum(entropies) / 2, abs=1e-8)
    # The flow, from the cleanest level of all.
    first = torch.full((1000,), optimal_variance(schedule, 0, -1), dtype=torch.float64)
    chain = ReverseChain(schedule, variances=first)
    flow = flow_bound(answer, x0, chain, "epsilon", "optimal", noise=eps, divergence="exact", num_steps=40, **options)
    assert bits_per_dim(flow.total, 2).mean().item() == pytest.approx(sum(entropies) / 2, abs=1e-6)


def test_the_trained_bound_is_that_of_the_data():
    """Of the last transition alone, which ends in the data."""
    schedule = NoiseSchedule(make_betas("linear", 100))
    chain, first = ReverseChain(schedule), torch.zeros(3, dtype=torch.int64)
    y = (
        (torch.tensor([100.0, 128.0, 150.0], dtype=torch.float64) * (2 / 255) - 1)
        .view(-1, 1, 1, 1)
        .expand(-1, 2, 1, 1)
    )
    x = (y - UNITS.shift) / UNITS.scale
    level = schedule.level(first, x)
    x_t = add_noise(x, torch.full_like(x, 0.4), level)
    output = torch.cat([x + 0.01, torch.ones_like(x)], 1)  # x_0 itself, off by some, and the larger variance
    loss = bound_loss(output, x, x_t, chain, first, "sample", "learned_range", units=UNITS)
    expected = of_edges(y, Normal(x + 0.01, torch.full_like(x, schedule.betas[0].sqrt().item())))
    torch.testing.assert_close(loss, 100 * expected.flatten(1).mean(1), rtol=1e-6, atol=0)
