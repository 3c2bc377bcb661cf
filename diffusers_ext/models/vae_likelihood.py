"""The distributions of a variational autoencoder, q(z | x) and p(x | z), and the bounds on log p(x) from them.

    -log p(x)  <=  E_q[-log p(x | z)]  +  KL(q(z | x) || p(z))          the negative ELBO (Kingma & Welling 2013)
    nats           distortion             rate

All are nats per image; `diffusers_ext.diffusion.variational_bound.bits_per_dim` converts them. Bits per dimension need a
probability of each pixel, not a density: that of the discretised likelihoods (`levels=256`) is the mass of "gaussian" or
"laplace" in the bin around the pixel's value. "bernoulli" is a probability where images are black or white, and for grey
ones a cross-entropy.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_ext.diffusion.noising import normal_log_prob
from diffusers_ext.diffusion.precision import to_float64
from diffusers_ext.diffusion.variational_bound import binned_log_prob
from diffusers_ext.draws import draw_normal


LIKELIHOODS = ("bernoulli", "gaussian", "laplace")


class DiagonalGaussian:
    """The posterior q(z | x) = N(mean, diag(exp(logvar))) over latents of any shape, and its prior.

    The names are those of the distribution that diffusers' `AutoencoderKL` returns.

    Args:
        mean, logvar: Shape `(batch, *latent_shape)`; `logvar` is clamped to [-30, 20].
        prior_mean: The prior is N(prior_mean, 1) for each latent.
    """

    deterministic = False

    def __init__(self, mean: Tensor, logvar: Tensor, prior_mean: float = 0.0):
        self.mean, self.logvar, self.prior_mean = mean, logvar.clamp(-30.0, 20.0), prior_mean

    @property
    def parameters(self) -> Tensor:
        """Mean and log of the variance, shape `(batch, 2 * channels, ...)`."""
        return torch.cat([self.mean, self.logvar], dim=1)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        return torch.exp(self.logvar)

    def sample(
        self, generator: torch.Generator | list[torch.Generator] | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Latents mean + std * noise, with standard normal noise: the given one, or drawn with the generator."""
        if noise is None:
            noise = draw_normal(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.dtype)

    def mode(self) -> Tensor:
        return self.mean

    def kl_per_latent(self, other: "DiagonalGaussian | None" = None) -> Tensor:
        """KL divergence from the prior, or from `other`, of each latent by itself: nats, float32 or float64.

        KL(N(m, v) || N(M, V)) = ((m - M)^2 / V + v / V - 1 - log(v / V)) / 2
        """
        mean, logvar = widened(self.mean), widened(self.logvar)
        if other is None:
            return 0.5 * ((mean - self.prior_mean).square() + torch.expm1(logvar) - logvar)
        other_logvar = widened(other.logvar)
        log_ratio = logvar - other_logvar
        return 0.5 * ((mean - other.mean).square() * torch.exp(-other_logvar) + torch.expm1(log_ratio) - log_ratio)

    def kl(self, other: "DiagonalGaussian | None" = None) -> Tensor:
        """KL divergence from the prior, or from `other`: nats, shape `(batch,)`."""
        return self.kl_per_latent(other).flatten(1).sum(1)

    def nll(self, sample: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        """-log q(sample) in nats, summed over all axes but the first, or over `dims`."""
        terms = -normal_log_prob(sample, self.mean, 0.5 * widened(self.logvar))
        return terms.flatten(1).sum(1) if dims is None else terms.sum(list(dims))

    def prior_log_prob(self, sample: Tensor) -> Tensor:
        """log p(sample) under the prior in nats, shape `(batch,)`."""
        return normal_log_prob(widened(sample), self.prior_mean).flatten(1).sum(1)


def widened(x: Tensor) -> Tensor:
    """At least float32: sums over thousands of values need more digits than bfloat16 has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_of(likelihood: str, parameters: Tensor) -> Tensor:
    """The mean of p(x | z) where data is in [-1, 1].

    Args:
        parameters: Logits of white for "bernoulli", else the mean itself.
    """
    # 2 sigmoid(x) - 1
    return torch.tanh(parameters / 2) if likelihood == "bernoulli" else parameters


def log_likelihood(
    likelihood: str, x: Tensor, parameters: Tensor, log_scale: Tensor | None = None, *, levels: int | None = None
) -> Tensor:
    """log p(x | z) in nats, summed over all axes but the first: shape `(batch,)`.

    Args:
        likelihood: One of `LIKELIHOODS`.
        x: Data in [-1, 1], shape `(batch, ...)`.
        parameters: Of the same shape; see `mean_of`.
        log_scale: Log of the standard deviation of "gaussian" or of b of "laplace", where data is in [-1, 1].
        levels: Number of values of a pixel, evenly spread over [-1, 1]; `None` takes densities. Not for "bernoulli",
            which needs none.
    """
    x, parameters = widened(x), widened(parameters)
    if likelihood == "bernoulli":
        return -F.binary_cross_entropy_with_logits(parameters, (x + 1) / 2, reduction="none").flatten(1).sum(1)
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"likelihood must be one of {', '.join(LIKELIHOODS)}, got {likelihood!r}")
    log_scale = widened(log_scale)
    if levels is not None:
        return discretized_log_prob(likelihood, x, parameters, log_scale, levels).flatten(1).sum(1)
    if likelihood == "gaussian":
        terms = normal_log_prob(x, parameters, log_scale)
    else:
        terms = -((x - parameters) * torch.exp(-log_scale)).abs() - log_scale - math.log(2)
    return terms.flatten(1).sum(1)


def discretized_log_prob(likelihood: str, x: Tensor, mean: Tensor, log_scale: Tensor, levels: int) -> Tensor:
    """Log of the mass that a Gaussian or Laplace density has in the pixel's bin; elementwise, nats, `to_float64`.

    Bins reach half-way to the neighbours, the first and the last to infinity (Salimans et al. 2017 with a logistic
    density), so that the masses of all levels sum to 1.

    Args:
        x: Values -1 + 2 k / (levels - 1) for k = 0, 1, ..., levels - 1.
    """
    log_cdf = torch.special.log_ndtr if likelihood == "gaussian" else _log_laplace_cdf
    x, mean, log_scale = to_float64(x), to_float64(mean), to_float64(log_scale)
    return binned_log_prob(x, mean, log_scale.exp(), levels, log_cdf)


def _log_laplace_cdf(x: Tensor) -> Tensor:
    # Each branch sees only its own side, so that the other's overflow does not reach the gradient.
    return torch.where(x < 0, x.clamp(max=0) - math.log(2), torch.log1p(-0.5 * torch.exp(-x.clamp(min=0))))


class Bound(NamedTuple):
    """The two terms of the negative ELBO in nats, shape `(batch,)` each."""

    distortion: Tensor
    rate: Tensor

    @property
    def nats(self) -> Tensor:
        return self.distortion + self.rate


class LikelihoodEstimate(NamedTuple):
    """Bounds on -log p(x) in nats, float64 (on the CPU for a device without it), shape `(batch,)` each.

    Attributes:
        bound: The negative ELBO in its two terms, the distortion averaged over the draws.
        importance_weighted: The negative importance-weighted bound (Burda et al. 2016). It falls to -log p(x) as the
            number of draws grows, and is at most `elbo_of_draws`.
        elbo_of_draws: The negative ELBO from the very same draws, the rate by them too.
        rates: The rate of each level of latents, from the top, shape `(num_levels, batch)`; they sum to that of `bound`.
    """

    bound: Bound
    importance_weighted: Tensor
    elbo_of_draws: Tensor
    rates: Tensor


class LatentDraws(NamedTuple):
    """Draws from q(z | x), `copies` for each of `batch` images: rows image by image within each copy.

    Attributes:
        latents: What p(x | z) is decoded from, shape `(copies * batch, *latent_shape)`.
        log_ratio: log p(z) - log q(z | x) in nats, shape `(copies * batch,)`.
        rates: KL divergence of each level of latents, from the top, given the draws above: nats, shape
            `(num_levels, copies * batch)`.
    """

    latents: Tensor
    log_ratio: Tensor
    rates: Tensor


def gaussian_draws(
    posterior: DiagonalGaussian, generator: torch.Generator | None = None
) -> Callable[[int], LatentDraws]:
    """Draws latents of one level; takes the number of `copies`."""

    def draw(copies: int) -> LatentDraws:
        # One draw of all images after the other, so that it makes no difference how many are made at once.
        z = torch.cat([posterior.sample(generator) for _ in range(copies)])
        many = DiagonalGaussian(
            repeated(posterior.mean, copies), repeated(posterior.logvar, copies), posterior.prior_mean
        )
        log_ratio = to_float64(many.prior_log_prob(z)) + to_float64(many.nll(z))
        return LatentDraws(z, log_ratio, posterior.kl().repeat(copies).unsqueeze(0))

    return draw


@torch.no_grad()
def importance_weighted_bound(
    draw: Callable[[int], LatentDraws],
    log_prob: Callable[[Tensor, int], Tensor],
    *,
    num_samples: int = 64,
    chunk_size: int = 8,
) -> LikelihoodEstimate:
    """Bounds on -log p(x) from draws of the posterior.

        log p(x) >= E[log 1/K sum_k w_k],   w_k = p(x | z_k) p(z_k) / q(z_k | x)

    Args:
        draw: Gives the draws of that many copies; see `LatentDraws`.
        log_prob: Takes their latents and `copies`; gives log p(x | z) in nats, shape `(copies * batch,)`.
        num_samples: K, draws for each image.
        chunk_size: Draws that are decoded at once.

    Raises:
        ValueError: if one of these is less than 1.
    """
    if num_samples < 1 or chunk_size < 1:
        raise ValueError(f"num_samples and chunk_size must be at least 1, got {num_samples} and {chunk_size}")
    log_weights, log_probs, rates = [], [], []
    for start in range(0, num_samples, chunk_size):
        copies = min(chunk_size, num_samples - start)
        z, log_ratio, rates_of_draws = draw(copies)
        log_p_x = to_float64(log_prob(z, copies)).view(copies, -1)
        log_weights.append(log_p_x + to_float64(log_ratio).view(copies, -1))
        log_probs.append(log_p_x)
        rates.append(to_float64(rates_of_draws).unflatten(1, (copies, -1)))
    log_weights, rates = torch.cat(log_weights), torch.cat(rates, dim=1).mean(1)
    return LikelihoodEstimate(
        bound=Bound(-torch.cat(log_probs).mean(0), rates.sum(0)),
        importance_weighted=math.log(num_samples) - log_weights.logsumexp(0),
        elbo_of_draws=-log_weights.mean(0),
        rates=rates,
    )


def estimate_likelihood(
    posterior: DiagonalGaussian,
    log_prob: Callable[[Tensor, int], Tensor],
    *,
    num_samples: int = 64,
    chunk_size: int = 8,
    generator: torch.Generator | None = None,
) -> LikelihoodEstimate:
    """`importance_weighted_bound` of one level of latents, whose posterior q(z | x) is at hand."""
    draw = gaussian_draws(posterior, generator)
    return importance_weighted_bound(draw, log_prob, num_samples=num_samples, chunk_size=chunk_size)


@torch.no_grad()
def vae_likelihood(
    vae, x: Tensor, *, levels: int | None = 256, num_samples: int = 64, chunk_size: int = 8, generator=None
) -> LikelihoodEstimate:
    """Bounds on -log p(x) of images in [-1, 1] under a `VAEModel` or a `HierarchicalVAEModel`.

    Args:
        levels: As for `log_likelihood`; "bernoulli" leaves it out.
        num_samples, chunk_size: As for `importance_weighted_bound`.
        generator: Of the draws.
    """
    kind, log_scale = vae.config.likelihood, vae.likelihood_log_scale

    def log_prob(z: Tensor, copies: int) -> Tensor:
        return log_likelihood(kind, repeated(x, copies), vae.decode_parameters(z), log_scale, levels=levels)

    draw = vae.posterior_draws(x, generator)
    return importance_weighted_bound(draw, log_prob, num_samples=num_samples, chunk_size=chunk_size)


def repeated(x: Tensor, copies: int) -> Tensor:
    """`copies` of a batch, one after the other."""
    return x.repeat(copies, *[1] * (x.ndim - 1))
