import math

import pytest
import torch
from torch.distributions import Bernoulli, Laplace, MultivariateNormal, Normal, kl_divergence

from diffusers_ext.diffusion.variational_bound import bits_per_dim
from diffusers_ext.models.vae import VAEModel
from diffusers_ext.models.vae_likelihood import (
    DiagonalGaussian,
    discretized_log_prob,
    estimate_likelihood,
    log_likelihood,
    vae_likelihood,
)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class LinearGaussian:
    """Probabilistic PCA: x = W z + b + noise of variance `var`; with orthogonal columns the posterior is diagonal.

    log p(x) is that of N(b, W W^T + var I) (Tipping & Bishop 1999).
    """

    def __init__(self, dim=7, latents=3, std=0.6):
        self.std, self.log_std = std, torch.tensor(std, dtype=torch.float64).log()
        basis = torch.linalg.qr(draw(dim, latents)).Q
        self.weight, self.bias = basis * torch.tensor([2.0, 1.0, 0.3]), draw(dim, seed=1)
        covariance = self.weight @ self.weight.T + std**2 * torch.eye(dim, dtype=torch.float64)
        self.marginal = MultivariateNormal(self.bias, covariance)
        self.x = self.marginal.mean + draw(5, dim, seed=2) @ torch.linalg.cholesky(covariance).T

    def posterior(self) -> DiagonalGaussian:
        var = 1 / (1 + self.weight.square().sum(0) / self.std**2)
        mean = (self.x - self.bias) @ self.weight / self.std**2 * var
        return DiagonalGaussian(mean, var.log().expand_as(mean))

    def log_prob(self, z, copies):
        x = self.x.repeat(copies, 1)
        return log_likelihood("gaussian", x, z @ self.weight.T + self.bias, self.log_std)


def test_bounds_at_the_exact_posterior_are_the_marginal_likelihood():
    """There every importance weight is p(x), so that one draw is enough, up to rounding, for all but the two terms."""
    oracle = LinearGaussian()
    exact = -oracle.marginal.log_prob(oracle.x)
    got = estimate_likelihood(oracle.posterior(), oracle.log_prob, num_samples=5, chunk_size=2)
    torch.testing.assert_close(got.importance_weighted, exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.elbo_of_draws, exact, rtol=1e-12, atol=0)
    many = estimate_likelihood(oracle.posterior(), oracle.log_prob, num_samples=20000, chunk_size=10000)
    torch.testing.assert_close(
        many.bound.nats, exact, rtol=0, atol=0.05
    )  # the distortion has a std of about 2 / sqrt(K)


def test_importance_weights_close_the_gap_that_a_wrong_posterior_leaves():
    """The ELBO misses log p(x) by the KL divergence from the true posterior; K draws close in on it from below."""
    oracle = LinearGaussian()
    exact, right = -oracle.marginal.log_prob(oracle.x), oracle.posterior()
    wrong = DiagonalGaussian(right.mean + 0.3, right.logvar + 0.4)
    settings = {"chunk_size": 5000, "generator": torch.Generator().manual_seed(0)}
    estimates = [estimate_likelihood(wrong, oracle.log_prob, num_samples=k, **settings) for k in (1, 64, 20000)]
    torch.testing.assert_close(estimates[2].bound.nats, exact + wrong.kl(right), rtol=0, atol=0.1)
    torch.testing.assert_close(estimates[2].elbo_of_draws, exact + wrong.kl(right), rtol=0, atol=0.1)
    torch.testing.assert_close(estimates[2].importance_weighted, exact, rtol=0, atol=0.03)
    for estimate in estimates:
        assert (estimate.importance_weighted <= estimate.elbo_of_draws + 1e-9).all()
    gaps = [(estimate.importance_weighted - exact).mean() for estimate in estimates]
    assert gaps[0] > gaps[1] > gaps[2].abs()


@pytest.mark.parametrize("chunk_size", [1, 4, 10, 64])
def test_the_estimate_does_not_depend_on_how_many_draws_are_decoded_at_once(chunk_size):
    oracle = LinearGaussian()
    wrong = DiagonalGaussian(oracle.posterior().mean + 0.3, oracle.posterior().logvar)

    def estimate(size):
        settings = {"num_samples": 10, "chunk_size": size, "generator": torch.Generator().manual_seed(0)}
        return estimate_likelihood(wrong, oracle.log_prob, **settings)

    torch.testing.assert_close(tuple(estimate(chunk_size)[1:]), tuple(estimate(10)[1:]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "laplace"])
def test_log_likelihoods_are_those_of_torch_distributions(name):
    x, parameters, log_scale = draw(4, 2, 3).tanh(), draw(4, 2, 3, seed=1), torch.tensor(-0.7, dtype=torch.float64)
    if name == "bernoulli":
        x = x.sign()
        expected = Bernoulli(logits=parameters).log_prob((x + 1) / 2)
    else:
        family = {"gaussian": Normal, "laplace": Laplace}[name]
        expected = family(parameters, log_scale.exp()).log_prob(x)
    torch.testing.assert_close(log_likelihood(name, x, parameters, log_scale), expected.flatten(1).sum(1))


@pytest.mark.product
@pytest.mark.parametrize("name", ["gaussian", "laplace"])
@pytest.mark.parametrize("levels", [2, 16, 256])
@pytest.mark.parametrize("mean", [-3.0, -1.0, 0.004, 0.9, 2.0])
@pytest.mark.parametrize("log_scale", [-9.0, -3.0, 1.0])
def test_discretised_masses_of_all_levels_sum_to_one(name, levels, mean, log_scale):
    x = torch.linspace(-1, 1, levels, dtype=torch.float64)
    log_mass = discretized_log_prob(name, x, torch.full_like(x, mean), torch.tensor(log_scale), levels)
    assert log_mass.isfinite().all()
    assert log_mass.exp().sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", ["gaussian", "laplace"])
def test_discretised_mass_is_the_density_times_a_small_bin(name):
    x = torch.linspace(-1, 1, 2001, dtype=torch.float64)[5:-5]
    mean, log_scale = torch.full_like(x, 0.2005), torch.tensor(-1.0, dtype=torch.float64)
    family = {"gaussian": Normal, "laplace": Laplace}[name]
    density = family(mean, log_scale.exp()).log_prob(x) + math.log(2 / 2000)
    torch.testing.assert_close(discretized_log_prob(name, x, mean, log_scale, 2001), density, rtol=0, atol=2e-3)


def test_a_uniform_likelihood_costs_eight_bits():
    """256 equal masses, here from a wide Laplace whose bins of the inner levels alone are looked at."""
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    log_mass = discretized_log_prob("laplace", x, torch.zeros_like(x), torch.tensor(12.0), 256)[1:-1]
    nats = -(log_mass - log_mass.exp().sum().log() - math.log(256 / 254)).mean()
    assert bits_per_dim(nats, 1) == pytest.approx(8.0, abs=1e-4)


@pytest.mark.parametrize("shape", [(3,), (2, 5), (4, 2, 3)])
def test_the_posterior_is_that_of_torch_distributions(shape):
    mean, logvar, x = draw(6, *shape), draw(6, *shape, seed=1), draw(6, *shape, seed=2)
    ours, theirs = DiagonalGaussian(mean, logvar), Normal(mean, (logvar / 2).exp())
    prior = Normal(torch.zeros_like(mean), 1.0)
    torch.testing.assert_close(ours.kl(), kl_divergence(theirs, prior).flatten(1).sum(1))
    torch.testing.assert_close(ours.nll(x), -theirs.log_prob(x).flatten(1).sum(1))
    torch.testing.assert_close(ours.prior_log_prob(x), prior.log_prob(x).flatten(1).sum(1))
    other = DiagonalGaussian(x, -logvar)
    torch.testing.assert_close(ours.kl(other), kl_divergence(theirs, Normal(x, (-logvar / 2).exp())).flatten(1).sum(1))
    noise = draw(6, *shape, seed=3)
    torch.testing.assert_close(ours.sample(noise=noise), mean + theirs.stddev * noise)
    assert torch.equal(ours.sample(torch.Generator().manual_seed(5)), ours.sample(torch.Generator().manual_seed(5)))


def test_the_posterior_agrees_with_that_of_diffusers():
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    mean, logvar, x = draw(2, 4, 3, 3), draw(2, 4, 3, 3, seed=1), draw(2, 4, 3, 3, seed=2)
    ours, theirs = DiagonalGaussian(mean, logvar), DiagonalGaussianDistribution(torch.cat([mean, logvar], 1))
    torch.testing.assert_close(ours.kl(), theirs.kl())
    torch.testing.assert_close(ours.nll(x), theirs.nll(x))
    torch.testing.assert_close(ours.nll(x, dims=[1, 2]), theirs.nll(x, dims=[1, 2]))
    assert ours.deterministic == theirs.deterministic
    for name in ("std", "var", "parameters"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 3)]
    torch.testing.assert_close(ours.sample(generators[0]), theirs.sample(generators[1]))


@pytest.mark.product
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "laplace"])
@pytest.mark.parametrize("offset", [0.0, 0.8])
def test_a_model_s_bound_is_the_same_wherever_its_latents_are_centred(likelihood, offset):
    """An offset renames the latents and nothing else: distortion, rate and importance weights stay."""
    torch.manual_seed(0)
    model = VAEModel(
        sample_size=4,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        latent_channels=2,
        likelihood=likelihood,
    ).double()
    moved = VAEModel.from_config(model.config, latent_offset=offset).double()
    moved.load_state_dict(model.state_dict())
    x = (draw(3, 1, 4, 4).sigmoid() * 255).round() / 127.5 - 1
    bounds = [
        vae_likelihood(vae, x, num_samples=3, generator=torch.Generator().manual_seed(1)) for vae in (model, moved)
    ]
    torch.testing.assert_close(tuple(bounds[1].bound), tuple(bounds[0].bound), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bounds[1].importance_weighted, bounds[0].importance_weighted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        moved.encode(x).latent_dist.mean, model.encode(x).latent_dist.mean - offset, rtol=1e-9, atol=1e-9
    )
    z = model.sample_prior(2, torch.Generator().manual_seed(2))
    torch.testing.assert_close(moved.sample_prior(2, torch.Generator().manual_seed(2)), z - offset)
    torch.testing.assert_close(moved.decode(z - offset).sample, model.decode(z).sample)


@pytest.mark.parametrize("kwargs", [{"num_samples": 0}, {"chunk_size": 0}])
def test_no_draws_are_refused(kwargs):
    oracle = LinearGaussian()
    with pytest.raises(ValueError, match="num_samples and chunk_size must be at least 1"):
        estimate_likelihood(oracle.posterior(), oracle.log_prob, **kwargs)


def test_an_unknown_likelihood_is_named():
    with pytest.raises(ValueError, match="bernoulli, gaussian, laplace, got 'beta'"):
        log_likelihood("beta", draw(1, 2), draw(1, 2), torch.zeros(()))
