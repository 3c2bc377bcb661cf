import math

import pytest
import torch
from diffusers import AutoModel
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import diffusers_ext
from diffusers_ext.models.hierarchical_vae import HierarchicalVAEModel
from diffusers_ext.models.vae_likelihood import DiagonalGaussian, vae_likelihood
from tiny import assert_same_output, assert_same_weights


def tiny(**kwargs):
    torch.manual_seed(0)
    config = {"sample_size": 12, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "num_levels": 3}
    return HierarchicalVAEModel(**(config | kwargs))


def awake(model):
    """The model with its zero-initialised layers filled, so that every path has an effect."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim and not parameter.any():
            parameter.data.normal_(std=0.1, generator=generator)
    return model


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# A chain whose likelihood is known.


class LinearChain(HierarchicalVAEModel):
    """z_2 -> z_1 -> x, linear and Gaussian, in the place of the networks; float64.

        z_1 = A diag(a) z_2 + s_1 e_1,   x = C z_1 + b + s e,   A and C with orthonormal columns

    so that the exact posteriors are diagonal: with y = C^T (x - b) and v = s_1^2 + s^2,
        q(z_2 | x)      =  N(a A^T y / v / (1 + a^2 / v), 1 / (1 + a^2 / v))
        q(z_1 | z_2, x) =  N((A a z_2 / s_1^2 + y / s^2) w, w),   1 / w = 1 / s_1^2 + 1 / s^2
        p(x)            =  N(b, C (A diag(a^2) A^T + s_1^2) C^T + s^2)

    Args:
        shift, log_var: What the posteriors are moved by, to be wrong.
    """

    def __init__(self, shift=0.0, log_var=0.0):
        super().__init__(2, 3, 3, (8,), num_levels=2, latent_channels=2, dims=1, learn_scale=True)
        assert [level.shape for level in self.levels] == [(2, 1), (2, 2)]
        self.double()
        self.log_scale.data = torch.tensor(0.6).double().log()
        self.shift, self.log_var = shift, log_var
        self.A, self.C = (torch.linalg.qr(draw(*shape, seed=3).double()).Q for shape in ((4, 2), (6, 4)))
        self.a, self.b = torch.tensor([1.5, 0.7]).double(), draw(6, seed=4).double()
        self.s_1, self.s = 0.8, torch.tensor(0.6).double()
        inner = self.A @ torch.diag(self.a**2) @ self.A.T + self.s_1**2 * torch.eye(4).double()
        covariance = self.C @ inner @ self.C.T + self.s**2 * torch.eye(6).double()
        self.exact = MultivariateNormal(self.b, covariance)
        self.x = (self.b + draw(5, 6, seed=5).double() @ torch.linalg.cholesky(covariance).T).view(5, 3, 2)
        self.log_p_x = self.exact.log_prob(self.x.flatten(1))

    def prior_of(self, index, above, batch):
        if index == 0:
            return super().prior_of(index, above, batch)
        mean = (above.flatten(1) * self.a @ self.A.T).view(batch, 2, 2)
        return DiagonalGaussian(mean, torch.full_like(mean, 2 * math.log(self.s_1))), None

    def posterior_of(self, index, prior, from_above, features):
        y = (features.flatten(1) - self.b) @ self.C
        if index == 0:
            v = self.s_1**2 + self.s**2
            var = 1 / (1 + self.a**2 / v)
            mean = self.a * (y @ self.A) / v * var
        else:
            var = torch.ones(4).double() / (1 / self.s_1**2 + 1 / self.s**2)
            mean = (prior.mean.flatten(1) / self.s_1**2 + y / self.s**2) * var
        mean, logvar = mean.view(prior.mean.shape), var.log().view(1, *prior.mean.shape[1:]).expand_as(prior.mean)
        return DiagonalGaussian(mean + self.shift, logvar + self.log_var)

    def image_features(self, x):
        return [x.unsqueeze(2)] * 2

    def decode_parameters(self, z):
        return (z.flatten(1) @ self.C.T + self.b).view(-1, 3, 2)


EXACT = {"levels": None, "num_samples": 5, "chunk_size": 2}


def test_with_exact_posteriors_both_bounds_are_the_likelihood_of_the_chain():
    """Every importance weight is then p(x), so that no draw differs from another."""
    chain = LinearChain()
    got = vae_likelihood(chain, chain.x, **EXACT)
    torch.testing.assert_close(-got.importance_weighted, chain.log_p_x, rtol=1e-10, atol=0)
    torch.testing.assert_close(-got.elbo_of_draws, chain.log_p_x, rtol=1e-10, atol=0)
    # A draw for many images takes far less time than many draws for one.
    many = vae_likelihood(chain, chain.x.repeat(1600, 1, 1), **EXACT)
    # Distortion and rates averaged apart: the std of one draw is about 2 nats.
    torch.testing.assert_close(-many.bound.nats.view(1600, 5).mean(0), chain.log_p_x, rtol=0, atol=0.09)
    torch.testing.assert_close(many.rates.sum(0), many.bound.rate)


def test_with_wrong_posteriors_the_weighted_bound_lies_between_the_elbo_and_the_likelihood():
    chain = LinearChain(shift=0.3, log_var=0.4)
    generator = torch.Generator().manual_seed(0)
    # Averaged over draws of draws, since each bound is an expectation.
    x = chain.x.repeat(400, 1, 1)
    bounds = [
        chain.iwae(x[: 5 * repeats], k, num_values=None, generator=generator).view(repeats, 5).mean(0)
        for k, repeats in ((1, 400), (4, 200), (32, 50))
    ]
    elbo = -chain.elbo_terms(x, num_values=None, generator=generator).nats.view(400, 5).mean(0)
    torch.testing.assert_close(bounds[0], elbo, rtol=0, atol=0.5)  # one draw each, the rate by it or exactly
    one, four, many = (bound.mean() for bound in bounds)
    assert one + 0.1 < four < many - 0.05 < many < chain.log_p_x.mean() + 0.02
    x = chain.x.repeat(8, 1, 1)
    large = chain.iwae(x, 1000, num_values=None, chunk_size=1000, generator=generator).view(8, 5).mean(0)
    torch.testing.assert_close(large, chain.log_p_x, rtol=0, atol=0.05)
    assert (chain.log_p_x.mean() - elbo.mean()) > 0.3


@pytest.mark.parametrize("chunk_size", [1, 3, 64])
def test_the_estimate_does_not_depend_on_how_many_draws_are_made_at_once(chunk_size):
    model, x = awake(tiny()).double(), draw(2, 1, 12, 12).double().tanh()

    def estimate(size):
        return vae_likelihood(model, x, num_samples=6, chunk_size=size, generator=torch.Generator().manual_seed(0))

    got, expected = estimate(chunk_size), estimate(6)
    torch.testing.assert_close(got.importance_weighted, expected.importance_weighted, rtol=1e-9, atol=0)
    torch.testing.assert_close(got.rates, expected.rates, rtol=1e-9, atol=0)


def test_rates_and_ratios_of_levels_are_those_of_torch_distributions():
    model, x = awake(tiny(latent_channels=(3, 2, 1))).double(), draw(4, 1, 12, 12).double()
    chain = model.encode(x, sample_posterior=True, generator=torch.Generator().manual_seed(0)).latent_dist
    assert [z.shape[1:] for z in chain.latents] == [(3, 2, 2), (2, 3, 3), (1, 6, 6)]
    rates, log_ratio = chain.kl_by_level(), 0
    for rate, z, q, p in zip(rates, chain.latents, chain.posteriors, chain.priors, strict=True):
        q, p = Normal(q.mean, q.std), Normal(p.mean, p.std)
        torch.testing.assert_close(rate, kl_divergence(q, p).flatten(1).sum(1))
        log_ratio = log_ratio + (p.log_prob(z) - q.log_prob(z)).flatten(1).sum(1)
    torch.testing.assert_close(chain.log_ratio(), log_ratio)
    assert (rates > 0.01).all()
    top = chain.priors[0]
    assert not top.mean.any() and not top.logvar.any()


def test_the_posterior_is_relative_to_the_prior():
    """q = N(mu + d_mu, (sigma d_sigma)^2): with the shift of the network at zero it is the prior, wherever that is."""
    model, x = awake(tiny()), draw(2, 1, 12, 12)
    for level in model.top_down:
        torch.nn.init.zeros_(level.posterior_out.weight)
        torch.nn.init.zeros_(level.posterior_out.bias)
    chain = model.encode(x, sample_posterior=True).latent_dist
    for q, p in zip(chain.posteriors, chain.priors, strict=True):
        torch.testing.assert_close((q.mean, q.logvar), (p.mean, p.logvar))
    assert chain.priors[-1].mean.std() > 0.01
    model.top_down[-1].posterior_out.bias.data.copy_(torch.tensor([0.5] * 4 + [math.log(2)] * 4))
    moved = model.encode(x, noise=draw(2, model.num_latents)).latent_dist
    q, p = moved.posteriors[-1], moved.priors[-1]
    torch.testing.assert_close(q.mean, p.mean + 0.5)
    # Log standard deviations are bounded by 5 tanh(s / 5).
    torch.testing.assert_close(q.std, p.std * math.exp(5 * math.tanh(math.log(2) / 5)))


def test_the_terms_of_the_bound_are_those_of_the_draw():
    model, x, noise = awake(tiny(likelihood_scale=0.3)), draw(2, 1, 12, 12).tanh(), None
    noise = draw(2, model.num_latents)
    terms = model.elbo_terms(x, noise=noise, num_values=None)
    chain, out = model.encode(x, noise=noise).latent_dist, model(x, noise=noise)
    decoded = model.decode(chain.latents[-1]).sample
    torch.testing.assert_close(terms.distortion, -Normal(decoded, 0.3).log_prob(x).flatten(1).sum(1))
    torch.testing.assert_close(terms.rates, chain.kl_by_level())
    torch.testing.assert_close(terms.nats, terms.distortion + terms.rates.sum(0))
    torch.testing.assert_close(torch.stack([kl.flatten(1).sum(1) for kl in out.kl]), terms.rates)
    torch.testing.assert_close(out.sample, decoded)
    assert out.log_scale.exp().item() == pytest.approx(0.3)


# The chain from the top.


def test_each_level_depends_on_that_above_alone_and_the_image_on_the_lowest():
    model = awake(tiny())
    latents = model.sample_prior(2, torch.Generator().manual_seed(0))
    noise = model.split_noise(draw(2, model.num_latents, seed=7))
    prior, _ = model.prior_of(2, latents[1], 2)
    held = model._descend(2, lambda index, dist: dist.sample(noise=noise[index]), given=latents[:2])
    torch.testing.assert_close(held.priors[2].mean, prior.mean)
    other_top = [latents[0] + 1, latents[1]]
    again = model._descend(2, lambda index, dist: dist.sample(noise=noise[index]), given=other_top)
    torch.testing.assert_close(again.latents[2], held.latents[2])
    assert not torch.allclose(model.prior_of(1, latents[0], 2)[0].mean, model.prior_of(1, latents[0] + 1, 2)[0].mean)
    full = model.decode([latents[0] + 1, latents[1] - 1, latents[2]]).sample
    torch.testing.assert_close(full, model.decode(latents[2]).sample)


def test_samples_keep_the_upper_levels_that_are_held():
    model = awake(tiny())
    first = model.sample_prior(3, torch.Generator().manual_seed(0))
    again = model.sample_prior(3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(first, again)
    for upper in range(1, 4):
        held = model.sample_prior(3, torch.Generator().manual_seed(1), latents=[z[:1] for z in first[:upper]])
        for index in range(3):
            if index < upper:
                torch.testing.assert_close(held[index], first[index][:1].expand_as(first[index]))
            else:
                assert held[index][0].sub(held[index][1]).abs().mean() > 0.1
    images = model.sample(3, torch.Generator().manual_seed(1), latents=first)
    torch.testing.assert_close(images, model.decode(first[-1]).sample)
    assert images.shape == (3, 1, 12, 12)


def test_temperature_scales_each_priors_standard_deviation():
    model, generators = awake(tiny()), [torch.Generator().manual_seed(0) for _ in "123"]
    hot, cold = (model.sample_prior(2, g, temperature=t) for g, t in zip(generators, (1.0, 0.25), strict=False))
    torch.testing.assert_close(cold[0], 0.25 * hot[0])
    prior, _ = model.prior_of(1, cold[0], 2)
    hot_prior, _ = model.prior_of(1, hot[0], 2)
    torch.testing.assert_close((cold[1] - prior.mean) / prior.std, 0.25 * (hot[1] - hot_prior.mean) / hot_prior.std)
    means = model.sample(2, generators[2], temperature=0.0)
    torch.testing.assert_close(means[0], means[1])


def test_upper_levels_alone_decode_by_the_means_below_them():
    model, x = awake(tiny()), draw(2, 1, 12, 12)
    latents = model.encode(x).latent_dist.mode()
    z = latents[0]
    for index in (1, 2):
        z = model.prior_of(index, z, 2)[0].mean
    torch.testing.assert_close(model.decode(latents[:1]).sample, model.decode(z).sample)
    torch.testing.assert_close(model.decode(latents).sample, model(x).sample)


# Shapes, options, files.


@pytest.mark.parametrize(
    "config, shapes",
    [
        ({}, [(4, 2, 2), (4, 3, 3), (4, 6, 6)]),
        ({"num_levels": 1}, [(4, 6, 6)]),
        (
            {"num_levels": 5, "latent_channels": (5, 4, 3, 2, 1)},
            [(5, 1, 1), (4, 1, 1), (3, 2, 2), (2, 3, 3), (1, 6, 6)],
        ),
        ({"sample_size": (8, 14), "layers_per_block": 2}, [(4, 1, 2), (4, 2, 4), (4, 4, 7)]),
        ({"dims": 1, "sample_size": 26, "mid_block_add_attention": False}, [(4, 4), (4, 7), (4, 13)]),
        ({"block_out_channels": (8,), "in_channels": 3, "out_channels": 2}, [(4, 3, 3), (4, 6, 6), (4, 12, 12)]),
        ({"sample_size": 32, "block_out_channels": (16, 32), "num_levels": 2}, [(4, 8, 8), (4, 16, 16)]),
    ],
)
def test_every_size_that_the_config_allows(config, shapes):
    model = tiny(**config)
    size = model.config.sample_size
    size = size if isinstance(size, tuple) else (size,) * model.config.dims
    assert [level.shape for level in model.levels] == shapes
    assert [level.number for level in model.levels] == list(range(len(shapes), 0, -1))
    x = draw(2, model.config.in_channels, *size)
    out = model(x, sample_posterior=True)
    assert out.sample.shape == model.sample(2).shape == (2, model.config.out_channels, *size)
    assert [tuple(kl.shape[1:]) for kl in out.kl] == shapes
    assert model.num_latents == sum(math.prod(shape) for shape in shapes)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"sample_size": 13}, "sample_size must be a multiple of 2, .* got 13 x 13"),
        ({"num_levels": 0}, "num_levels must be at least 1, got 0"),
        ({"latent_channels": (4, 4)}, r"one for each of 3 levels, from the top, got \(4, 4\)"),
        ({"latent_channels": 0}, "latent_channels must be one positive number or one for each"),
        ({"block_out_channels": ()}, "block_out_channels must be one or more positive numbers"),
        ({"dims": 3}, "dims must be one of 1, 2, got 3"),
        ({"likelihood": "beta"}, "likelihood must be one of bernoulli, gaussian, laplace, got 'beta'"),
        ({"likelihood_scale": 0.0}, "likelihood_scale must be positive, got 0"),
        ({"likelihood": "bernoulli", "learn_scale": True}, "learn_scale has no meaning"),
    ],
)
def test_a_config_that_cannot_work_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        tiny(**config)


def test_inputs_that_do_not_fit_are_refused():
    model = tiny()
    latents = model.sample_prior(2)
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 1, height, width\), got \(1, 3, 12, 12\)"):
        model.encode(draw(1, 3, 12, 12))
    with pytest.raises(ValueError, match="x must be of sample_size 12, which the levels are made for, got 16 x 16"):
        model.encode(draw(1, 1, 16, 16))
    with pytest.raises(ValueError, match=r"latents of level 1 must have shape \(batch, 4, 6, 6\), got \(2, 4, 2, 2\)"):
        model.decode(latents[0])
    with pytest.raises(ValueError, match=r"latents of level 3 must have shape \(batch, 4, 2, 2\), got \(2, 4, 6, 6\)"):
        model.sample(2, latents=latents[::-1])
    with pytest.raises(ValueError, match="latents must be a list with those of up to 3 levels, got one tensor"):
        model.sample(2, latents=latents[0])
    with pytest.raises(ValueError, match=r"latents must be those of one sample or of 3, got \[2\]"):
        model.sample(3, latents=latents[:1])
    with pytest.raises(ValueError, match="z must hold latents of at least the top level, got none"):
        model.decode([])
    with pytest.raises(ValueError, match="temperature must be 0 or a positive number, got -1"):
        model.sample(1, temperature=-1.0)
    with pytest.raises(ValueError, match=r"noise must have shape \(batch, 196\), got \(2, 4\)"):
        model(draw(2, 1, 12, 12), noise=draw(2, 4))


def test_the_priors_of_an_untrained_model_are_standard_normal():
    chain = tiny().encode(draw(2, 1, 12, 12), sample_posterior=True).latent_dist
    assert all(not p.mean.any() and not p.logvar.any() for p in chain.priors)
    assert (chain.kl_by_level() > 0).all()


def test_every_parameter_gets_a_gradient_with_and_without_checkpointing():
    x, noise, grads = draw(2, 1, 12, 12), None, []
    for checkpointing in (False, True):
        model = awake(tiny(likelihood="laplace", learn_scale=True))
        noise = draw(2, model.num_latents)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train().elbo_terms(x, noise=noise, num_values=None).nats.sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
        assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []
    torch.testing.assert_close(*grads)


def test_bernoulli_means_stay_in_range():
    model = awake(tiny(likelihood="bernoulli"))
    z = 20 * model.sample_prior(2)[-1]
    torch.testing.assert_close(model.decode(z).sample, 2 * model.decode_parameters(z).sigmoid() - 1)


def test_it_compiles_without_graph_breaks():
    model, x = awake(tiny(num_levels=2)), draw(2, 1, 12, 12)
    noise = draw(2, model.num_latents)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, noise=noise).sample, model(x, noise=noise).sample, rtol=1e-4, atol=1e-5)


def test_bf16_autocast_is_as_close_as_its_rounding():
    model, x = awake(tiny()), draw(2, 1, 12, 12)
    noise = draw(2, model.num_latents)
    exact = model(x, noise=noise)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(x, noise=noise)
    assert rounded.sample.dtype == rounded.latents[-1].dtype == rounded.kl[0].dtype == torch.float32
    assert (rounded.sample - exact.sample).norm() < 0.05 * exact.sample.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_keep_weights_levels_and_dtype(tmp_path, dtype):
    model = awake(tiny(latent_channels=(3, 2, 1), learn_scale=True)).to(dtype).eval()
    model.save_pretrained(tmp_path / "vae")  # as of a pipeline
    loaded = AutoModel.from_pretrained(str(tmp_path), subfolder="vae", torch_dtype=dtype)
    assert isinstance(loaded, diffusers_ext.HierarchicalVAEModel) and loaded.levels == model.levels
    assert_same_weights(loaded, model)
    x = draw(2, 1, 12, 12).to(dtype)
    assert loaded(x).sample.dtype == dtype
    assert_same_output(loaded(x).sample, model(x).sample)
