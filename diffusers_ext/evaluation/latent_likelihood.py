"""The likelihood of images under a pipeline in latents: the bound of its autoencoder with the diffusion model as the prior.

    -log P(x)  <=  E_q[-log P(x | z)  +  log q(z | x)  -  log p(z)]

for one draw z of the posterior, and the last term again at most the variational bound of z as the network knows it, with
the change of variables between the two. The first term is the distortion, the other two are the rate.
"""

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Generator, Tensor

from diffusers_ext.diffusion.noising import normal_log_prob
from diffusers_ext.draws import draw_normal
from diffusers_ext.latents import latent_scale
from diffusers_ext.models.statistics import DataStatisticsModel
from diffusers_ext.models.vae import VAEModel
from diffusers_ext.models.vae_likelihood import log_likelihood
from diffusers_ext.pipelines.stock import STOCK_NAMES


class Coded(NamedTuple):
    """Images as latents of the network, and what these cost beside the bound on -log p of theirs, in nats of each image.

    Attributes:
        x0: Shape `(batch, *latent_shape)`.
        distortion: -log P(x | z), shape `(batch,)`.
        rate: log q(z | x), as a density of `x0`, shape `(batch,)`.
    """

    x0: Tensor
    distortion: Tensor
    rate: Tensor


@dataclass(frozen=True)
class LatentCoder:
    """An autoencoder with a likelihood of images in 8 bits, and the statistics that its latents are normalised by, or None."""

    vae: VAEModel
    statistics: DataStatisticsModel | None = None

    @classmethod
    def of(cls, pipeline: Any) -> "LatentCoder | None":
        """That of a pipeline; None for one in pixels.

        Raises:
            ValueError: if its autoencoder has no likelihood of images in 8 bits.
        """
        vae = next((part for name in STOCK_NAMES["vae"] if (part := getattr(pipeline, name, None)) is not None), None)
        if vae is None:
            return None
        if not isinstance(vae, VAEModel) or vae.config.likelihood == "bernoulli":
            kind = f"likelihood {vae.config.likelihood!r}" if isinstance(vae, VAEModel) else f"a {type(vae).__name__}"
            raise ValueError(
                f"{type(pipeline).__name__} makes latents, whose bits are not those of images: bits_per_dim needs the "
                f"probabilities of a VAEModel with the likelihood gaussian or laplace, got {kind}"
            )
        return cls(vae, getattr(pipeline, "statistics", None))

    def encode(self, images: Tensor, labels: Tensor | None, generators: list[Generator]) -> Coded:
        """Latents drawn from the posterior of images in [-1, 1], image i by generator i."""
        vae = self.vae
        posterior = vae.encode(images.to(vae.dtype)).latent_dist
        noise = draw_normal(posterior.mean.shape, generators, device=posterior.mean.device, dtype=posterior.mean.dtype)
        z = posterior.sample(noise=noise)
        parameters = vae.decode_parameters(z)
        distortion = -log_likelihood(vae.config.likelihood, images, parameters, vae.likelihood_log_scale, levels=256)
        log_q = normal_log_prob(noise.to(images)) - 0.5 * posterior.logvar.to(images)
        shift, scale = (each.to(images) for each in latent_scale(vae, z))
        x0, log_scale = (z.to(images) - shift) * scale, scale.log().expand(z.shape)
        if self.statistics is not None:
            x0, units = self.statistics.normalise(x0, labels), self.statistics.units(labels, x0)
            log_scale = log_scale - units.scale.to(images).log()
        return Coded(x0, distortion.to(images), (log_q - log_scale).flatten(1).sum(1))


def without_autoencoder(pipeline: Any) -> Any:
    """The same pipeline as one of its latents alone; the given one stays as it is."""
    view = copy.copy(pipeline)
    for name in ("vae", "statistics"):
        if getattr(view, name, None) is not None:
            object.__setattr__(view, name, None)
    return view
