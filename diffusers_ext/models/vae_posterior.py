"""The encoder's answer: a Gaussian over latents with a mean and a variance for each of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusers_ext.diffusion.noising import normal_log_prob
from diffusers_ext.draws import draw_normal


class DiagonalGaussian:
    """N(mean, diag(exp(logvar))) over latents of any shape, with the prior that it is measured against.

    The names are those of the distribution that diffusers' `AutoencoderKL` returns.

    Args:
        mean, logvar: Shape `(batch, *latent_shape)`; `logvar` is clamped to [-30, 20].
        prior_mean: The prior is N(prior_mean, 1) for each latent.
    """

    def __init__(self, mean: Tensor, logvar: Tensor, prior_mean: float = 0.0):
        self.mean, self.logvar, self.prior_mean = mean, logvar.clamp(-30.0, 20.0), prior_mean

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
        logvar = widened(self.logvar)
        terms = -normal_log_prob((sample - self.mean) * torch.exp(-0.5 * logvar), 0.5 * logvar)
        return terms.flatten(1).sum(1) if dims is None else terms.sum(list(dims))

    def prior_log_prob(self, sample: Tensor) -> Tensor:
        """log p(sample) under the prior in nats, shape `(batch,)`."""
        return normal_log_prob(widened(sample) - self.prior_mean).flatten(1).sum(1)


def widened(x: Tensor) -> Tensor:
    """At least float32: sums over thousands of values need more digits than bfloat16 has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
