"""The bound and the flow on data whose entropy is known, in float64, with noise for which the means are exact."""

import math

import diffusers
import numpy as np
import pytest
import scipy.stats
import torch

from diffusers_ext.diffusion.betas import make_betas, rescale_zero_terminal_snr
from diffusers_ext.diffusion.noising import (
    PREDICTION_TYPES,
    NoiseLevel,
    NoiseSchedule,
    Normal,
    predict_eps,
    training_target,
)
from diffusers_ext.diffusion.paths import ContinuousTime
from diffusers_ext.diffusion.probability_flow import flow_bound, flow_log_density
from diffusers_ext.diffusion.reverse_chain import ReverseChain, reverse_log_std
from diffusers_ext.diffusion.timesteps import make_timesteps
from diffusers_ext.diffusion.variational_bound import (
    bits_per_dim,
    check_bins,
    decoder_nats,
    optimal_variances,
    prior_nats,
    transition_nats,
    variational_bound,
)
from gaussian_oracle import VARIANCE, denoise, model_output, optimal_variance
from tiny import tiny_unet


ENTROPY = 0.5 * math.log2(2 * math.pi * math.e * VARIANCE)  # 1.047096 bits/dim
GAP = {"fixed_large": {10: 0.13525, 50: 0.03075, 100: 0.01558, 1000: 0.00158}, "optimal": dict.fromkeys((10, 1000), 0)}

# Every pair of a root of the data's second moment and one of the noise's: the mean over them of any quadratic form is
# its expectation under the Gaussians.
X0 = VARIANCE**0.5 * torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).view(4, 1, 1, 1)
EPS = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).view(4, 1, 1, 1)


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule(make_betas("linear", 1000))


def bits(terms):
    return bits_per_dim(terms.total, terms.num_dims).mean().item()


def oracle_bits(schedule, num_steps, variance, prediction_type="epsilon"):
    def answer(x_t, timesteps):
        return model_output(schedule, prediction_type, x_t, timesteps)

    given = {"noise": lambda index: EPS}
    chain = ReverseChain(schedule, make_timesteps("trailing", num_steps, 1000))
    if variance == "optimal":
        variances = optimal_variances(answer, [X0], chain, prediction_type, **given)
        chain = ReverseChain(schedule, chain.timesteps.flip(0), variances)
    return bits(variational_bound(answer, X0, chain, prediction_type, variance, num_bins=None, **given))


@pytest.mark.parametrize("variance, num_steps", [(name, n) for name, column in GAP.items() for n in column])
def test_bound_of_gaussian_data_is_the_entropy_and_the_known_gap(schedule, variance, num_steps):
    assert oracle_bits(schedule, num_steps, variance) - ENTROPY == pytest.approx(GAP[variance][num_steps], abs=6e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_bound_is_that_of_the_prediction_whatever_the_model_outputs(schedule, prediction_type):
    assert oracle_bits(schedule, 50, "fixed_large", prediction_type) - ENTROPY == pytest.approx(0.03075, abs=6e-6)


def test_optimal_variances_are_the_analytic_ones_and_the_best(schedule):
    chain = ReverseChain(schedule, make_timesteps("trailing", 20, 1000))

    def answer(x_t, timesteps):
        return model_output(schedule, "epsilon", x_t, timesteps)

    variances = optimal_variances(answer, [X0, -X0], chain, "epsilon", noise=lambda i: EPS)
    pairs = zip(chain.timesteps.tolist(), [-1, *chain.timesteps.tolist()[:-1]], strict=True)
    expected = torch.tensor([optimal_variance(schedule, t, s) for t, s in pairs], dtype=torch.float64)
    torch.testing.assert_close(variances, expected, rtol=1e-8, atol=0)
    best = oracle_bits(schedule, 20, "optimal")
    for factor in (0.9, 1.1):
        worse = ReverseChain(schedule, chain.timesteps.flip(0), factor * variances)
        terms = variational_bound(answer, X0, worse, "epsilon", "optimal", num_bins=None, noise=lambda i: EPS)
        assert bits(terms) > best + 1e-3


def test_optimal_variances_measured_at_some_timesteps_are_those_of_all(schedule):
    """The error of the Gaussian's best prediction is a smooth function of log SNR, which a line between 64 points follows."""
    chain, asked = ReverseChain(schedule), []

    def answer(x_t, timesteps):
        asked.append(int(timesteps[0]))
        return model_output(schedule, "epsilon", x_t, timesteps)

    variances = optimal_variances(answer, [X0], chain, "epsilon", noise=lambda i: EPS, num_measured=64)
    assert len(asked) <= 64 and {0, 999} <= set(asked)
    pairs = zip(range(1000), range(-1, 999), strict=True)
    expected = torch.tensor([optimal_variance(schedule, t, s) for t, s in pairs], dtype=torch.float64)
    torch.testing.assert_close(variances, expected, rtol=2e-3, atol=0)
    few = ReverseChain(schedule, make_timesteps("trailing", 20, 1000))
    same = [
        optimal_variances(answer, [X0], few, "epsilon", noise=lambda i: EPS, num_measured=number)
        for number in (None, 20, 64)
    ]
    assert same[0].equal(same[1]) and same[0].equal(same[2])


@pytest.mark.parametrize("num_bins", [2, 64])
def test_a_uniform_source_costs_its_bits(num_bins):
    """2^b equal values cost b bits, and the best denoiser and variances a little more, the less the more steps.

    All values, and nodes of a quadrature for the noise, so that the means are exact.
    """
    schedule = NoiseSchedule(make_betas("cosine", 100))
    values = torch.linspace(-1, 1, num_bins, dtype=torch.float64)
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(10))
    x0 = values.repeat_interleave(len(nodes)).view(-1, 1, 1, 1)
    eps, weights = nodes.repeat(num_bins).view(-1, 1, 1, 1), (weights / weights.sum()).repeat(num_bins) / num_bins

    def answer(x_t, timesteps):
        level = schedule.level(timesteps[:1], x_t)
        logits = -0.5 * ((x_t.flatten(1) - level.alpha.view(()) * values) / level.sigma.view(())).square()
        return (logits.softmax(1) @ values).view_as(x_t)

    def gap(timesteps):
        """The variance of x_s given x_t by the law of total variance, its gain from Bayes' rule."""
        before = torch.cat([timesteps.new_tensor([-1]), timesteps.flip(0)[:-1]])
        variances = []
        for t, s in zip(timesteps.flip(0), before, strict=True):
            end, start = schedule.alpha_bar[t], schedule.alpha_bar[s]
            x_t = end.sqrt() * x0 + (1 - end).sqrt() * eps
            error = (weights * (answer(x_t, t.view(1)) - x0).square().flatten()).sum()
            beta = 1 - end / start
            variances.append((beta * (1 - start) + start * beta**2 / (1 - end) * error) / (1 - end))
        chain = ReverseChain(schedule, timesteps.tolist(), torch.stack(variances).clamp(min=1e-12))
        terms = variational_bound(answer, x0, chain, "sample", "optimal", num_bins=num_bins, noise=lambda i: eps)
        return (weights * bits_per_dim(terms.total, 1)).sum().item() - math.log2(num_bins)

    fine, coarse = gap(torch.arange(99, -1, -1)), gap(torch.arange(99, -1, -4))
    assert 0 < fine < 0.03 < coarse


@pytest.mark.parametrize("mean", [-3.0, -1.0, -0.37, 0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("std", [1e-4, 3e-3, 0.1, 5.0])
def test_probabilities_of_the_bins_add_up_to_one_and_are_those_of_scipy(mean, std):
    x0 = torch.linspace(-1, 1, 256, dtype=torch.float64)
    p = Normal(torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64))
    nats = decoder_nats(x0, p)
    assert torch.isfinite(nats).all()
    assert (-nats).exp().sum().item() == pytest.approx(1, abs=1e-9)
    edges = np.concatenate([[-np.inf], (x0[1:] + x0[:-1]).numpy() / 2, [np.inf]])
    left, right = (scipy.stats.norm.logcdf(edge, mean, std) for edge in (edges[:-1], edges[1:]))
    # scipy's difference loses its digits in the right tail, so that is looked at from the other side.
    flipped = [scipy.stats.norm.logsf(edge, mean, std) for edge in (edges[1:], edges[:-1])]
    left, right = (np.where(x0.numpy() > mean, other, own) for own, other in zip((left, right), flipped, strict=True))
    expected = -(right + np.log(-np.expm1(left - right)))
    np.testing.assert_allclose(nats.numpy(), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("x0", [-1.0, -127 / 255, 1.0])
def test_gradient_of_the_decoder_is_finite_in_float32_however_wrong_the_model_is(x0):
    mean = torch.tensor([-30.0, -1.0, 0.0, 1.0, 30.0], requires_grad=True)
    log_std = torch.full((5,), -6.0, requires_grad=True)
    decoder_nats(torch.full((5,), x0), Normal(mean, log_std.exp())).sum().backward()
    assert torch.isfinite(mean.grad).all() and torch.isfinite(log_std.grad).all()
    # Towards the data, except where the outermost bin has it all already.
    assert mean.grad[0] < 0 or x0 == -1
    assert mean.grad[4] > 0 or x0 == 1


@pytest.mark.parametrize("second_moment, expected", [(0.264, 7.69e-6), (1.0, 2.91e-5)])
def test_prior_term_of_the_linear_schedule(schedule, second_moment, expected):
    x0 = torch.full((1, 1), second_moment**0.5, dtype=torch.float64)
    nats = prior_nats(x0, schedule.level(999, x0))
    assert bits_per_dim(nats, 1).item() == pytest.approx(expected, rel=2e-3)


def random_model(x_t, timesteps):
    """Some function with learned variances, different at each timestep."""
    phase = timesteps.view(-1, 1, 1, 1) / 100
    return torch.cat([(x_t + phase).sin(), (3 * x_t - phase).cos()], 1)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (5, 1, 3, 4), generator=generator)
    return 2 * pixels.double() / 255 - 1


def generators(number, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(number)]


def test_terms_are_those_of_torch_distributions(schedule, images):
    """The posterior by Bayes' rule from alpha_bar, the variance from diffusers' own interpolation."""
    stock = diffusers.DDPMScheduler(variance_type="learned_range")
    stock.set_timesteps(1000)
    alpha_bar = stock.alphas_cumprod.double()
    eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    chain = ReverseChain(schedule)
    for t in (1, 2, 300, 999):
        x_t = alpha_bar[t].sqrt() * images + (1 - alpha_bar[t]).sqrt() * eps
        output = random_model(x_t, torch.full((5,), t))
        beta = 1 - alpha_bar[t] / alpha_bar[t - 1]
        gains = alpha_bar[t - 1].sqrt() * beta / (1 - alpha_bar[t]), (1 - beta).sqrt() / (1 - alpha_bar[t])
        gains = gains[0], gains[1] * (1 - alpha_bar[t - 1])
        x0_hat = (x_t - (1 - alpha_bar[t]).sqrt() * output[:, :1]) / alpha_bar[t].sqrt()
        log_variance = stock._get_variance(t, output[:, 1:])
        q_std = (beta * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])).sqrt()
        q = torch.distributions.Normal(gains[0] * images + gains[1] * x_t, q_std)
        p = torch.distributions.Normal(gains[0] * x0_hat + gains[1] * x_t, (0.5 * log_variance).exp())
        index = torch.full((5,), t)
        nats = transition_nats(output, images, x_t, chain, index, "epsilon", "learned_range")
        # diffusers' tables are float32, off by 1e-4 at the clean end.
        torch.testing.assert_close(nats, torch.distributions.kl_divergence(q, p), rtol=3e-3, atol=1e-5)


@pytest.mark.parametrize("size, output", [("small", -1.0), ("large", 1.0)])
def test_learned_range_ends_at_the_fixed_variances(schedule, images, size, output):
    def fixed(x_t, timesteps):
        return x_t.tanh()

    def learned(x_t, timesteps):
        return torch.cat([x_t.tanh(), torch.full_like(x_t, output)], 1)

    chain = ReverseChain(schedule, [700, 300, 20, 3])
    one, two = (
        variational_bound(model, images, chain, "sample", variance, generator=generators(5))
        for model, variance in ((fixed, f"fixed_{size}"), (learned, "learned_range"))
    )
    torch.testing.assert_close(one.total, two.total)
    torch.testing.assert_close(one.kl, two.kl)


def test_variances_of_the_chain_are_those_of_ddpm(schedule):
    """beta tilde of the second step stands for that of the first too, and a learned log variance is taken as one."""
    chain = ReverseChain(schedule)
    step = chain.at(torch.arange(3), torch.zeros(1, dtype=torch.float64))
    small, large = (2 * step.log_std_small).exp(), (2 * step.log_std_large).exp()
    assert small[0] == small[1] and small[1].item() == pytest.approx(5.453188e-5, rel=1e-6)
    torch.testing.assert_close(large, make_betas("linear", 1000)[:3], rtol=1e-9, atol=0)
    (alone,) = ReverseChain(schedule, [500]).at(torch.tensor([0]), torch.zeros(1, dtype=torch.float64)).log_std_small
    assert (2 * alone).exp() == pytest.approx(1 - schedule.alpha_bar[500].item())
    log_variance = torch.full((1, 1), -3.0, dtype=torch.float64)
    assert reverse_log_std(step, "learned", log_variance).exp().square().item() == pytest.approx(math.exp(-3))


def test_flow_of_a_network_has_its_exact_divergence(schedule):
    """That by gradients and that by differences agree along a solution, at fractional timesteps, with learned variance.

    The second is the log of the determinant of the whole map, from its differences.
    """
    model = tiny_unet().double()
    seen = []

    def denoise(x_t, timesteps):
        seen.extend(timesteps.tolist())
        output = model(x_t, timesteps).sample
        return torch.cat([output, output], 1)

    path = ContinuousTime(schedule)
    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    settings = {"num_steps": 4, "divergence": "exact", "learned_variance": True}
    given = flow_log_density(denoise, x, path, (0, 999), "v_prediction", **settings)
    assert any(timestep % 1 for timestep in seen) and min(seen) == 0 and max(seen) <= 999

    def end(x):
        """Where the flow ends: by the same steps, written with the angle itself."""
        log_angle = torch.atan2(schedule.sigma[:1000], schedule.alpha[:1000]).log()
        angles = torch.linspace(log_angle[0].item(), log_angle[-1].item(), 5, dtype=torch.float64).exp()

        def slope(x, angle):
            timestep = np.interp(math.log(angle), log_angle.numpy(), np.arange(1000.0))
            return model(x, torch.full((len(x),), timestep, dtype=torch.float64)).sample

        for start, stop in zip(angles[:-1].tolist(), angles[1:].tolist(), strict=True):
            h = stop - start
            a = slope(x, start)
            b = slope(x + h / 2 * a, start + h / 2)
            c = slope(x + h / 2 * b, start + h / 2)
            x = x + h / 6 * (a + 2 * b + 2 * c + slope(x + h * c, stop))
        return x

    with torch.no_grad():
        unit = 1e-5 * torch.eye(16, dtype=torch.float64).view(16, 1, 4, 4)
        jacobian = (end(x + unit) - end(x - unit)).flatten(1) / 2e-5
        expected = -0.5 * (end(x).square() + math.log(2 * math.pi)).sum() + torch.linalg.slogdet(jacobian)[1]
    assert abs(given.item() - expected.item()) < 0.02 * abs(torch.linalg.slogdet(jacobian)[1].item())


def test_rate_and_distortion_add_up_and_no_image_depends_on_the_others(schedule, images):
    chain = ReverseChain(schedule, make_timesteps("trailing", 7, 1000))
    for num_terms in (None, 3):
        settings = {"prediction_type": "v_prediction", "variance": "learned_range", "num_terms": num_terms}
        whole = variational_bound(random_model, images, chain, generator=generators(5), **settings)
        torch.testing.assert_close(whole.total, whole.rate + whole.distortion, rtol=0, atol=0)
        if num_terms is None:
            torch.testing.assert_close(whole.rate, whole.prior + whole.kl.sum(1))
        part = variational_bound(random_model, images[2:4], chain, generator=generators(2, first=2), **settings)
        torch.testing.assert_close(part.kl, whole.kl[2:4])
        torch.testing.assert_close(part.total, whole.total[2:4])
        assert torch.equal(part.index, whole.index[2:4])


def test_some_of_the_terms_estimate_all_without_bias(schedule, images):
    """Five thousand draws of 3 of 6 terms, for noise of a fixed size, against their sum."""
    chain = ReverseChain(schedule, make_timesteps("trailing", 7, 1000))
    settings = {"prediction_type": "epsilon", "variance": "learned_range", "noise": lambda i: torch.ones_like(x0)}
    x0 = images[:1]
    exact = variational_bound(random_model, x0, chain, **settings)
    x0 = images[:1].expand(5000, -1, -1, -1)
    generator = torch.Generator().manual_seed(0)
    some = variational_bound(random_model, x0, chain, num_terms=4, generator=generator, **settings)
    assert some.kl.shape == (5000, 4) and some.index.min() == 1 and some.index.max() == 6
    error = some.rate.std() / 5000**0.5
    assert error > 0 and abs(some.rate.mean() - exact.rate) < 4 * error
    torch.testing.assert_close(some.distortion, exact.distortion.expand(5000))


def test_terms_are_drawn_where_the_log_snr_changes(images):
    """Of costs in proportion to its change none that is drawn stands for more than twice their sum; of even draws, one for 41 times it."""
    schedule = NoiseSchedule(make_betas("cosine", 1000))
    chain = ReverseChain(schedule, make_timesteps("trailing", 100, 1000))
    x0, num_terms = images[:1].expand(200, -1, -1, -1), 4
    settings = {"prediction_type": "epsilon", "variance": "learned_range", "num_terms": num_terms}
    some = variational_bound(random_model, x0, chain, generator=torch.Generator().manual_seed(0), **settings)
    change = schedule.level(chain.timesteps, torch.zeros(1, dtype=torch.float64)).snr.log().flatten().diff()
    share = change / change.sum()
    assert len(share) * share.max() > 41
    counted = num_terms * some.weight * share[some.index - 1]
    assert 1 < counted.max() <= 2


@pytest.mark.product
@pytest.mark.parametrize("beta_schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_flow_of_gaussian_data_gives_their_entropy(beta_schedule, prediction_type):
    schedule = NoiseSchedule(make_betas(beta_schedule, 1000))
    path = ContinuousTime(schedule)

    def answer(x_t, timesteps):
        angle = path.angle(timesteps).view(-1, 1, 1, 1)
        level = NoiseLevel(angle.cos(), angle.sin())
        x0 = denoise(x_t, level)
        return training_target(x0, predict_eps(x0, x_t, level), level, prediction_type)

    variances = torch.ones(1000, dtype=torch.float64)
    variances[0] = optimal_variance(schedule, 0, -1)
    chain = ReverseChain(schedule, variances=variances)
    settings = {"num_bins": None, "divergence": "exact", "noise": EPS}
    errors = [
        bits(flow_bound(answer, X0, chain, prediction_type, "optimal", num_steps=n, **settings)) - ENTROPY
        for n in (20, 40)
    ]
    assert abs(errors[1]) < 2e-7
    assert abs(errors[0]) > 12 * abs(errors[1])  # order 4


def test_flow_from_zero_terminal_snr_ends_at_pure_noise():
    schedule = NoiseSchedule(rescale_zero_terminal_snr(make_betas("linear", 1000)))
    path = ContinuousTime(schedule)
    assert path.angle(torch.tensor([999])).item() == pytest.approx(math.pi / 2, abs=1e-12)

    def answer(x_t, timesteps):
        angle = path.angle(timesteps).view(-1, 1, 1, 1)
        level = NoiseLevel(angle.cos(), angle.sin())
        x0 = denoise(x_t, level)
        return level.alpha * predict_eps(x0, x_t, level) - level.sigma * x0

    chain = ReverseChain(schedule, variances=torch.full((1000,), optimal_variance(schedule, 0, -1)))
    terms = flow_bound(
        answer, X0, chain, "v_prediction", "optimal", num_bins=None, num_steps=60, divergence="exact", noise=EPS
    )
    assert bits(terms) == pytest.approx(ENTROPY, abs=1e-6)


def test_flow_finds_the_density_of_correlated_data_and_random_signs_its_mean(schedule):
    """Two coordinates of correlation 0.9, so that the divergence estimated from random signs varies."""
    covariance = torch.tensor([[0.3, 0.18], [0.18, 0.3]], dtype=torch.float64) * torch.tensor([1.0])
    path, eye = ContinuousTime(schedule), torch.eye(2, dtype=torch.float64)

    def answer(x_t, timesteps):
        angle = path.angle(timesteps[:1])
        marginal = angle.cos() ** 2 * covariance + angle.sin() ** 2 * eye
        return (angle.sin() * x_t.flatten(1) @ torch.linalg.inv(marginal)).view_as(x_t)  # eps_hat = -sigma score

    level = schedule.level(0, torch.zeros(1, dtype=torch.float64))
    truth = torch.distributions.MultivariateNormal(
        torch.zeros(2, dtype=torch.float64), level.alpha**2 * covariance + level.sigma**2 * eye
    )
    x = torch.tensor([[0.4, 0.6], [-0.8, 0.1], [0.0, 0.0]], dtype=torch.float64).view(3, 1, 1, 2)
    exact = flow_log_density(answer, x, path, (0, 999), "epsilon", num_steps=40, divergence="exact")
    # The flow ends at N(0, 1) where the marginal still has 4e-5 of the data.
    torch.testing.assert_close(exact, truth.log_prob(x.flatten(1)), rtol=0, atol=1e-4)
    one = flow_log_density(
        *(answer, x[:1].expand(2000, -1, -1, -1), path, (0, 999), "epsilon"),
        num_steps=20,
        num_probes=2,
        generator=torch.Generator().manual_seed(0),
    )
    error = one.std() / 2000**0.5
    assert one.std() > 0.05 and abs(one.mean() - exact[0]) < 4 * error


def test_what_has_no_bound_is_refused(schedule, images):
    chain = ReverseChain(schedule)
    for settings, message in [
        ({"x0": images + 0.001}, "x0 must hold 256 values evenly spaced from -1 to 1, got .*None if they are cont"),
        ({"x0": images * math.nan}, "x0 must hold 256 values evenly spaced"),
        ({"num_bins": 1}, "num_bins must be at least 2, or None for continuous data, got 1"),
        ({"num_terms": 1000}, r"num_terms must be in \[1, 999\], one less than the chain's timesteps, got 1000"),
        ({"variance": "fixed"}, "variance must be one of fixed_small, .*, got 'fixed'"),
        ({"variance": "optimal"}, "'optimal' needs a chain with variances: measure them"),
        ({"variance": "fixed_large"}, r"output must have shape \(5, 1, 3, 4\), .* got \(5, 2, 3, 4\)"),
    ]:
        given = {"x0": images, "variance": "learned_range"} | settings
        with pytest.raises(ValueError, match=message):
            variational_bound(random_model, chain=chain, prediction_type="epsilon", **given)
    with pytest.raises(ValueError, match="final_alpha_bar must be 1, got 0.9999"):
        ReverseChain(NoiseSchedule(make_betas("linear", 1000), final_alpha_bar=0.9999))
    with pytest.raises(ValueError, match=r"variances must be positive and of shape \(2,\)"):
        ReverseChain(schedule, [500, 3], variances=torch.tensor([0.1, 0.0]))
    with pytest.raises(ValueError, match="divergence must be 'hutchinson' or 'exact', got 'trace'"):
        flow_bound(random_model, images, chain, "epsilon", "learned_range", divergence="trace")
    with pytest.raises(ValueError, match="must add noise at each of its steps"):
        ContinuousTime(NoiseSchedule(torch.tensor([0.1, 0.0, 0.2])))
    check_bins(images, 256)
