"""The flow from within the bins of discrete data, against integrals by SciPy; and its adaptive solver."""

import math

import pytest
import scipy.integrate
import scipy.stats
import torch

from diffusers_ext.diffusion.betas import make_betas
from diffusers_ext.diffusion.data_units import DataUnits
from diffusers_ext.diffusion.noising import NoiseLevel, NoiseSchedule, predict_eps, training_target
from diffusers_ext.diffusion.paths import ContinuousTime
from diffusers_ext.diffusion.probability_flow import DEQUANTIZATIONS, flow_bound
from diffusers_ext.diffusion.reverse_chain import ReverseChain
from diffusers_ext.diffusion.variational_bound import bits_per_dim
from gaussian_oracle import EPS, VARIANCE, X0, denoise, optimal_variance


NUM_QUANTILES = 400


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule(make_betas("linear", 1000))


@pytest.fixture(scope="module")
def answer(schedule):
    """The exact network of x_0 ~ N(0, VARIANCE)."""
    path = ContinuousTime(schedule)

    def network(x_t, timesteps):
        angle = path.angle(timesteps).view(-1, 1, 1, 1)
        level = NoiseLevel(angle.cos(), angle.sin())
        x0 = denoise(x_t, level)
        return training_target(x0, predict_eps(x0, x_t, level), level, "v_prediction")

    return network


def expected_nats(value, half, alpha, sigma, kind):
    """-E[log p(x') - log q(x')] over the bin of a value, p the law of x' = x_t1 / alpha; and -log of its mass."""
    p = scipy.stats.norm(0, math.sqrt(VARIANCE + (sigma / alpha) ** 2))
    q = scipy.stats.uniform(value - half, 2 * half)
    if kind == "truncated_normal":
        width = sigma / alpha
        q = scipy.stats.truncnorm(-half / width, half / width, value, width)
    gap, _ = scipy.integrate.quad(
        lambda x: q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), value - half * (1 - 1e-12), value + half * (1 - 1e-12)
    )
    return gap, -math.log(p.cdf(value + half) - p.cdf(value - half))


@pytest.mark.parametrize("num_bins", [32, 256])  # whose half width is 3.2 and 0.4 times the noise of the first level
@pytest.mark.parametrize("kind", ["uniform", "truncated_normal"])
def test_the_bound_is_the_integral_over_the_bin_and_above_its_mass(schedule, answer, kind, num_bins):
    """All quantiles of the noise, so that the mean over them is the integral."""
    values = torch.linspace(-1, 1, num_bins, dtype=torch.float64)[[num_bins // 3, num_bins // 2]]
    shares = (torch.arange(NUM_QUANTILES, dtype=torch.float64) + 0.5) / NUM_QUANTILES
    x0 = values.repeat_interleave(NUM_QUANTILES).view(-1, 1, 1, 1)
    noise = torch.special.ndtri(shares).repeat(2).view_as(x0)
    chain = ReverseChain(schedule)
    settings = {"num_bins": num_bins, "num_steps": 12, "divergence": "exact", "noise": noise}
    terms = flow_bound(answer, x0, chain, "v_prediction", dequantization=kind, **settings)
    assert terms.num_calls == 48 and not terms.distortion.any()
    level = schedule.level(0, x0)
    for row, value in enumerate(values.tolist()):
        found = terms.total.view(2, -1)[row].mean().item()
        nats, of_mass = expected_nats(value, 1 / (num_bins - 1), level.alpha.item(), level.sigma.item(), kind)
        assert found == pytest.approx(nats, abs=2e-3)
        assert found > of_mass - 1e-4


def test_bins_are_those_of_the_data_where_samples_are_normalised(schedule, answer):
    """Samples of twice the scale have bins of half the width of the same probability."""
    units = DataUnits(torch.zeros(1, 1, 1, 1), torch.full([1, 1, 1, 1], 0.5))
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)[[100, 128, 150]].view(-1, 1, 1, 1)
    noise = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64).view_as(values)
    settings = {"num_steps": 24, "divergence": "exact", "noise": noise, "dequantization": "uniform"}
    of_data = flow_bound(
        answer, 2 * values, ReverseChain(schedule), "v_prediction", num_bins=256, units=units, **settings
    )
    level = schedule.level(0, values)
    x_t = level.alpha * (2 * values + 2 / 255 * (2 * torch.special.ndtr(noise) - 1))
    p = torch.distributions.Normal(0.0, (VARIANCE * level.alpha**2 + level.sigma**2).sqrt())
    expected = -p.log_prob(x_t) - (2 * level.alpha * 2 / 255).log()
    torch.testing.assert_close(of_data.total, expected.flatten(), atol=1e-3, rtol=0)


def test_to_a_tolerance_the_flow_gives_the_entropy_and_counts_its_calls(schedule, answer):
    variances = torch.ones(1000, dtype=torch.float64)
    variances[0] = optimal_variance(schedule, 0, -1)
    chain, calls = ReverseChain(schedule, variances=variances), []

    def counting(x_t, timesteps):
        calls.append(len(x_t))
        return answer(x_t, timesteps)

    settings = {"num_bins": None, "divergence": "exact", "noise": EPS}
    entropy, found = 0.5 * math.log2(2 * math.pi * math.e * VARIANCE), {}
    for tolerance in (1e-3, 1e-7):
        calls.clear()
        terms = flow_bound(counting, X0, chain, "v_prediction", "optimal", tolerance=tolerance, **settings)
        found[tolerance] = abs(bits_per_dim(terms.total, 1).mean().item() - entropy), terms.num_calls
        assert len(calls) == terms.num_calls + 1  # that of the decoder
    assert found[1e-7][0] < 1e-6 and found[1e-3][1] < found[1e-7][1] < 400
    assert found[1e-3][0] < 1e-2


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"dequantization": "normal"}, f"dequantization must be one of {', '.join(DEQUANTIZATIONS)}, got 'normal'"),
        ({"dequantization": "uniform", "num_bins": None}, "dequantization 'uniform' is of data in bins"),
        ({"tolerance": 0.0, "num_bins": None}, "tolerance must be positive, got 0.0"),
    ],
)
def test_what_has_no_meaning_is_refused(schedule, answer, settings, message):
    with pytest.raises(ValueError, match=message):
        flow_bound(answer, X0, ReverseChain(schedule), "v_prediction", **settings)
