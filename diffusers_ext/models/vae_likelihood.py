"""What a variational autoencoder's p(x | z) says of data, and the bounds on log p(x) that follow from it.

    -log p(x)  <=  E_q[-log p(x | z)]  +  KL(q(z | x) || p(z))          the negative ELBO (Kingma & Welling 2013)
    nats           distortion             rate

All in nats for a whole image, bits per dimension only by `diffusers_ext.diffusion.variational_bound.bits_per_dim`. Densities of pixels
say nothing in bits per dimension: a pixel of 8 bits has a probability, and the discretised likelihoods (`levels=256`)
give it. Those of "gaussian" and "laplace" are the masses between the pixel's neighbours; "bernoulli" is a probability
where images are black or white, and for grey ones a mere cross-entropy.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_ext.diffusion.noising import normal_log_prob
from diffusers_ext.diffusion.precision import to_float64
from diffusers_ext.diffusion.variational_bound import binned_log_prob
from diffusers_ext.models.vae_posterior import DiagonalGaussian, widened


LIKELIHOODS = ("bernoulli", "gaussian", "laplace")


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
    scaled = (x - parameters) * torch.exp(-log_scale)
    if likelihood == "gaussian":
        terms = normal_log_prob(scaled, log_scale)
    else:
        terms = -scaled.abs() - log_scale - math.log(2)
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
    """What is known of -log p(x) in nats, float64 (on the CPU for a device without it), shape `(batch,)` each.

    Attributes:
        bound: The negative ELBO in its two terms, the distortion averaged over the draws.
        importance_weighted: The negative importance-weighted bound (Burda et al. 2016). It falls to -log p(x) as the
            number of draws grows, and is at most `elbo_of_draws`.
        elbo_of_draws: The negative ELBO from the very same draws, the rate by them too.
    """

    bound: Bound
    importance_weighted: Tensor
    elbo_of_draws: Tensor


@torch.no_grad()
def estimate_likelihood(
    posterior: DiagonalGaussian,
    log_prob: Callable[[Tensor, int], Tensor],
    *,
    num_samples: int = 64,
    chunk_size: int = 8,
    generator: torch.Generator | None = None,
) -> LikelihoodEstimate:
    """Bounds on -log p(x) from draws of the posterior.

        log p(x) >= E[log 1/K sum_k w_k],   w_k = p(x | z_k) p(z_k) / q(z_k | x)

    Args:
        posterior: q(z | x) of `batch` images.
        log_prob: Takes latents of `copies * batch` rows, image by image within each copy, and `copies`; gives
            log p(x | z) in nats, shape `(copies * batch,)`.
        num_samples: K, draws for each image.
        chunk_size: Draws that are decoded at once.

    Raises:
        ValueError: if one of these is less than 1.
    """
    if num_samples < 1 or chunk_size < 1:
        raise ValueError(f"num_samples and chunk_size must be at least 1, got {num_samples} and {chunk_size}")
    batch = len(posterior.mean)
    log_weights, log_probs = [], []
    for start in range(0, num_samples, chunk_size):
        copies = min(chunk_size, num_samples - start)
        # One draw of all images after the other, so that the chunks make no difference.
        z = torch.cat([posterior.sample(generator) for _ in range(copies)])
        many = DiagonalGaussian(
            _repeat(posterior.mean, copies), _repeat(posterior.logvar, copies), posterior.prior_mean
        )
        log_p_x, log_prior, nll = map(to_float64, (log_prob(z, copies), many.prior_log_prob(z), many.nll(z)))
        log_weights.append((log_p_x + log_prior + nll).view(copies, batch))
        log_probs.append(log_p_x.view(copies, batch))
    log_weights = torch.cat(log_weights)
    return LikelihoodEstimate(
        bound=Bound(-torch.cat(log_probs).mean(0), to_float64(posterior.kl())),
        importance_weighted=math.log(num_samples) - log_weights.logsumexp(0),
        elbo_of_draws=-log_weights.mean(0),
    )


def vae_likelihood(
    vae, x: Tensor, *, levels: int | None = 256, num_samples: int = 64, chunk_size: int = 8, generator=None
) -> LikelihoodEstimate:
    """Bounds on -log p(x) of images in [-1, 1] under a `VAEModel`.

    Args:
        levels: As for `log_likelihood`; "bernoulli" leaves it out.
        num_samples, chunk_size, generator: As for `estimate_likelihood`.
    """
    kind, log_scale = vae.config.likelihood, vae.likelihood_log_scale

    def log_prob(z: Tensor, copies: int) -> Tensor:
        return log_likelihood(kind, _repeat(x, copies), vae.decode_parameters(z), log_scale, levels=levels)

    with torch.no_grad():
        posterior = vae.encode(x).latent_dist
    return estimate_likelihood(
        posterior, log_prob, num_samples=num_samples, chunk_size=chunk_size, generator=generator
    )


def _repeat(x: Tensor, copies: int) -> Tensor:
    return x.repeat(copies, *[1] * (x.ndim - 1))
