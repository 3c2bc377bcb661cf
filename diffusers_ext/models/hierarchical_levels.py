"""The levels of latents of a hierarchical autoencoder: their shapes, their distributions, and the terms of their bound."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_ext.diffusion.precision import to_float64
from diffusers_ext.models.layers import AffineGroupNorm, Upsample, channels_last, concatenate, convolution
from diffusers_ext.models.vae_coders import VAEBlock
from diffusers_ext.models.vae_likelihood import DiagonalGaussian
from diffusers_ext.sizes import as_size, downsampling_factor


# Log standard deviations, of priors and relative to them, stay within this of 0.
MAX_LOG_STD = 5.0


class Level(NamedTuple):
    """A level of latents: its number, 1 for that which the image is decoded from, and the shape of a sample's latents."""

    number: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Numbers of a sample's latents."""
        return math.prod(self.shape)


class LatentChain(NamedTuple):
    """One pass from the top down; all lists begin at the top.

    Attributes:
        latents: z_L, ..., z_1, shape `(batch, *level.shape)` each.
        posteriors: q(z_l | z_{l+1}, x) of each, given the latents above it.
        priors: p(z_l | z_{l+1}) of each, given the same.
    """

    latents: tuple[Tensor, ...]
    posteriors: tuple[DiagonalGaussian, ...]
    priors: tuple[DiagonalGaussian, ...]

    def mode(self) -> tuple[Tensor, ...]:
        """The latents, as `decode` takes them; of an encoder that did not draw, the mean of each given that above."""
        return self.latents

    def kl_per_latent(self) -> tuple[Tensor, ...]:
        """KL divergence of each latent of each level from its prior in nats, shaped like the latents."""
        return tuple(q.kl_per_latent(p) for q, p in zip(self.posteriors, self.priors, strict=True))

    def kl_by_level(self) -> Tensor:
        """KL divergence of each level in nats, shape `(num_levels, batch)`."""
        return torch.stack([kl.flatten(1).sum(1) for kl in self.kl_per_latent()])

    def log_ratio(self) -> Tensor:
        """log p(z) - log q(z | x) of these latents in nats, shape `(batch,)`, `to_float64`."""
        triples = zip(self.latents, self.posteriors, self.priors, strict=True)
        return sum(to_float64(q.nll(z)) - to_float64(p.nll(z)) for z, q, p in triples)


class LevelBound(NamedTuple):
    """The negative ELBO in its terms, nats: `distortion` of shape `(batch,)`; `rates` of each level from the top,
    `(num_levels, batch)`."""

    distortion: Tensor
    rates: Tensor

    @property
    def nats(self) -> Tensor:
        """The negative ELBO, shape `(batch,)`."""
        return self.distortion + self.rates.sum(0)


def levels_of(config) -> tuple[Level, ...]:
    """The levels of a `HierarchicalVAEModel`, from the top."""
    factor = downsampling_factor(config.block_out_channels)
    size = tuple(side // factor for side in as_size(config.sample_size, config.dims))
    sizes = [size]
    for _ in range(config.num_levels - 1):
        sizes.append(tuple(-(-side // 2) for side in sizes[-1]))
    channels = config.latent_channels
    channels = (channels,) * config.num_levels if isinstance(channels, int) else channels
    numbers = range(config.num_levels, 0, -1)
    return tuple(
        Level(number, (count, *size)) for number, count, size in zip(numbers, channels, sizes[::-1], strict=True)
    )


def bounded(log_std: Tensor) -> Tensor:
    """Close to the identity near 0, and within `MAX_LOG_STD` of it: no draw of an untrained network is far out."""
    return MAX_LOG_STD * torch.tanh(log_std / MAX_LOG_STD)


class TopDownLevel(nn.Module):
    """The two distributions of a level of latents: its prior given the level above, its posterior relative to that.

    Args:
        channels: Of the latents.
        channels_above: Of the latents above; `None` at the top, where the prior is the standard normal.
        width: Of the feature maps.
        num_blocks: Residual blocks at the level's own resolution.
        attention: Whether positions of the level above attend to one another.
    """

    _hidden_parts = ("block_above", "upsample", "blocks", "posterior_block")

    def __init__(
        self, channels: int, channels_above: int | None, width: int, num_blocks: int, dims: int, attention: bool
    ):
        super().__init__()
        self.is_top = channels_above is None
        if not self.is_top:
            self.conv_in = convolution(channels_above, width, dims)
            self.block_above = VAEBlock(width, width, dims, attention)
            self.upsample = Upsample(width, width, dims)
            self.blocks = nn.ModuleList([VAEBlock(width, width, dims) for _ in range(num_blocks)])
            self.prior_norm = AffineGroupNorm(width)
            self.prior_out = convolution(width, 2 * channels, dims)
        self.posterior_block = VAEBlock(width if self.is_top else 2 * width, width, dims)
        self.posterior_norm = AffineGroupNorm(width)
        self.posterior_out = convolution(width, 2 * channels, dims)

    def prior(self, above: Tensor, size: tuple[int, int], run) -> tuple[Tensor, Tensor]:
        """Mean and log std of the prior in one map, and the feature map that they are made of."""
        h = run(self.block_above, channels_last(self.conv_in(above)))
        # The level above is half of this one, rounded up.
        h = channels_last(run(self.upsample, h)[..., : size[0], : size[1]])
        for block in self.blocks:
            h = run(block, h)
        return self.prior_out(F.silu(self.prior_norm(h))), h

    def shift(self, features: Tensor, from_above: Tensor | None, run) -> Tensor:
        """How far mean and log std of the posterior are from the prior's, in one map."""
        h = features if from_above is None else concatenate(from_above, features)
        return self.posterior_out(F.silu(self.posterior_norm(run(self.posterior_block, h))))
