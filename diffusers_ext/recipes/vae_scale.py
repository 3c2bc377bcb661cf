"""The mean and the standard deviation of a trained autoencoder's latents, which a denoiser is to see as 0 and 1."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_ext.models.vae import VAEModel
from diffusers_ext.models.vae_likelihood import DiagonalGaussian


@dataclass(frozen=True)
class LatentMoments:
    """Moments of the latents of a set of images.

    Attributes:
        mean, std: Of all values of all latents drawn from the posteriors.
        kl: Nats for each dimension or channel, averaged over images and positions, shape `(latent_shape[0],)`.
        mean_var: Variance over the images of each latent's posterior mean, shape `latent_shape`.
        rate: KL divergence from the prior in nats an image.
        num_images: How many were encoded.
    """

    mean: float
    std: float
    kl: Tensor
    mean_var: Tensor
    rate: float
    num_images: int


class LatentStatistics:
    """Gathers `LatentMoments` in one pass, in float64.

    The moments are those of draws, mean + std * noise, by the law of total variance, with no noise drawn.
    """

    def __init__(self, latent_shape: tuple[int, ...]):
        self.count = 0
        self.sums = torch.zeros(4, *latent_shape, dtype=torch.float64)  # mean, mean^2, var, kl of each latent

    def update(self, posterior: DiagonalGaussian) -> None:
        mean, var, kl = (x.detach().cpu().double() for x in (posterior.mean, posterior.var, posterior.kl_per_latent()))
        self.sums += torch.stack([mean.sum(0), mean.square().sum(0), var.sum(0), kl.sum(0)])
        self.count += len(mean)

    def moments(self) -> LatentMoments:
        """Raises: ValueError: if nothing was encoded, or all of it to one point."""
        if not self.count:
            raise ValueError("the moments of latents need at least one image")
        mean, square, var, kl = self.sums / self.count
        overall = mean.mean()
        std = ((square + var).mean() - overall.square()).clamp(min=0).sqrt().item()
        if not std > 0:
            raise ValueError("the latents are all the same, so that nothing can be scaled to a std of 1")
        return LatentMoments(
            mean=overall.item(),
            std=std,
            kl=kl.flatten(1).mean(1) if kl.ndim > 1 else kl,
            mean_var=(square - mean.square()).clamp(min=0),
            rate=kl.sum().item(),
            num_images=self.count,
        )


@torch.no_grad()
def measure_latents(vae: VAEModel, batches: Iterable[Tensor], accelerator=None) -> LatentMoments:
    """Encodes batches of images in [-1, 1].

    Args:
        accelerator: Whose processes each encode a part, or None.
    """
    statistics = LatentStatistics(vae.latent_shape)
    for images in batches:
        statistics.update(vae.encode(images).latent_dist)
    if accelerator is not None and accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        parts = gather_object([(statistics.count, statistics.sums)])
        statistics.count, statistics.sums = sum(count for count, _ in parts), sum(sums for _, sums in parts)
    return statistics.moments()


def store_scale(vae: VAEModel, moments: LatentMoments) -> None:
    """Centres the latents at 0 and writes their scale into the config.

    The mean goes into `latent_offset`, so that `shift_factor` is 0 and pipelines that know no shift are right too.
    """
    vae.register_to_config(
        latent_offset=vae.config.latent_offset + moments.mean, shift_factor=0.0, scaling_factor=1 / moments.std
    )
