"""A variational autoencoder with several levels of latents, each drawn given the one above it.

    p(x, z)     =  p(x | z_1) p(z_1 | z_2) ... p(z_{L-1} | z_L) p(z_L)          Markov from the top, p(z_L) = N(0, 1)
    q(z | x)    =  q(z_L | x) q(z_{L-1} | z_L, x) ... q(z_1 | z_2, x)           in the same order (Sonderby et al. 2016)

    p(z_l | z_{l+1})     =  N(mu, sigma^2)
    q(z_l | z_{l+1}, x)  =  N(mu + d_mu, (sigma d_sigma)^2)                     residual (Vahdat & Kautz 2020, NVAE)

A deterministic encoder makes features of the image for each level, from the image up; the latents are then drawn from the
top down. Levels are numbered from the image, z_1 to z_L, and every list of them begins at the top, z_L, as they are drawn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from diffusers_ext.draws import draw_normal
from diffusers_ext.models.hierarchical_levels import (
    LatentChain,
    Level,
    LevelBound,
    TopDownLevel,
    bounded,
    levels_of,
)
from diffusers_ext.models.layers import Downsample, channels_last, zero_residual_branches
from diffusers_ext.models.network import check_shape
from diffusers_ext.models.vae import DecoderOutput
from diffusers_ext.models.vae_coders import ConvCoder, VAEBlock
from diffusers_ext.models.vae_likelihood import (
    DiagonalGaussian,
    LatentDraws,
    log_likelihood,
    mean_of,
    repeated,
    vae_likelihood,
)
from diffusers_ext.models.vae_network import AutoencoderNetwork, check_likelihood
from diffusers_ext.sizes import as_size, check_size


@dataclass
class HierarchicalEncoderOutput(BaseOutput):
    """`latent_dist` is a `LatentChain`."""

    latent_dist: LatentChain


@dataclass
class HierarchicalVAEOutput(BaseOutput):
    """The output of a forward pass.

    Attributes:
        sample: Mean of p(x | z_1), shape `(batch, out_channels, *spatial)`.
        parameters: Parameters of p(x | z_1), of the same shape: logits for "bernoulli", else the mean itself.
        log_scale: Log of the likelihood's scale, shape `()`.
        kl: KL divergence of each latent from its prior in nats, a tensor for each level from the top.
        latents: z_L, ..., z_1.
    """

    sample: Tensor
    parameters: Tensor | None = None
    log_scale: Tensor | None = None
    kl: tuple[Tensor, ...] | None = None
    latents: tuple[Tensor, ...] | None = None


class HierarchicalVAEModel(AutoencoderNetwork):
    """A variational autoencoder with several levels of latents: a prior that is learned, with a likelihood.

    The lowest level has the resolution of `VAEModel`'s latents, half of which, rounded up, is that of each further one;
    with one level the prior is the standard normal, as in `VAEModel`. It is a generative model by itself, and no first
    stage of a diffusion model, which takes latents of one level.

    Args:
        sample_size: Side of the square images, or `(height, width)`; for 1-D data the length. Each must be a multiple of
            `2 ** (len(block_out_channels) - 1)`.
        in_channels, out_channels: Channels of the images given and returned.
        block_out_channels: Channels at each resolution down to that of the lowest level, the full one first; the levels
            above have the last of them.
        num_levels: Levels of latents. Where a level has one position, further ones have one too.
        latent_channels: Channels of each level's latents: one number, or one for each level from the top.
        layers_per_block: Residual blocks at each resolution of the encoder and of the levels; one more in the decoder.
        mid_block_add_attention: Whether positions attend to one another at the lowest level and above.
        dims: 2 for images, shape `(batch, channels, height, width)`; 1 for series, `(batch, channels, length)`.
        likelihood, likelihood_scale, learn_scale: As for `VAEModel`.

    Raises:
        ValueError: if the sizes or options do not fit one another.
    """

    _no_split_modules = ["VAEBlock"]
    _repeated_blocks = ["VAEBlock"]
    _hidden_parts = ("encoder_levels",)

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, ...] = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (64, 128),
        num_levels: int = 3,
        latent_channels: int | tuple[int, ...] = 4,
        layers_per_block: int = 1,
        mid_block_add_attention: bool = True,
        dims: int = 2,
        likelihood: Literal["bernoulli", "gaussian", "laplace"] = "gaussian",
        likelihood_scale: float = 1.0,
        learn_scale: bool = False,
    ):
        super().__init__()
        _check_options(self.config)
        self.levels = levels_of(self.config)
        coder = {"dims": dims, "mid_attention": mid_block_add_attention}
        width, lowest = block_out_channels[-1], self.levels[-1].shape[0]
        self.encoder = ConvCoder(in_channels, width, block_out_channels, layers_per_block, upward=False, **coder)
        self.encoder_levels = nn.ModuleList(
            [
                nn.ModuleList(
                    [Downsample(width, dims), *(VAEBlock(width, width, dims) for _ in range(layers_per_block))]
                )
                for _ in self.levels[1:]
            ]
        )
        self.top_down = nn.ModuleList()
        above = None
        for level in self.levels:
            self.top_down.append(
                TopDownLevel(level.shape[0], above, width, layers_per_block, dims, mid_block_add_attention)
            )
            above = level.shape[0]
        self.decoder = ConvCoder(
            lowest, out_channels, block_out_channels[::-1], layers_per_block + 1, upward=True, **coder
        )
        self.start_scale()
        self.initialize_weights()

    def initialize_weights(self):
        """Makes each residual branch start at zero, and each prior as the standard normal."""
        zero_residual_branches(self, VAEBlock)
        for level in self.top_down:
            if not level.is_top:
                nn.init.zeros_(level.prior_out.weight)
                nn.init.zeros_(level.prior_out.bias)

    def enable_group_offload(self, onload_device, offload_device="cpu", offload_type="block_level", **options) -> None:
        """Moves the weights of layers away until they are called, as `diffusers.ModelMixin.enable_group_offload`.

        Raises:
            ValueError: if it is by blocks: the prior and the posterior of a level share some, and are not called in turn.
        """
        if offload_type != "leaf_level":
            raise ValueError(
                f'offload_type must be "leaf_level", layer by layer, for this model, got {offload_type!r}'
            )
        super().enable_group_offload(onload_device, torch.device(offload_device), offload_type, **options)

    @property
    def num_latents(self) -> int:
        """Numbers of all levels of a sample."""
        return sum(level.size for level in self.levels)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the decoder's last layer."""
        return self.decoder.conv_out.weight

    # The distributions of a level.

    def prior_of(self, index: int, above: Tensor | None, batch: int) -> tuple[DiagonalGaussian, Tensor | None]:
        """p(z_l | z_{l+1}) of a level, and the feature map that it is made of.

        Args:
            index: Of the level in `levels`, 0 at the top.
            above: z_{l+1}, shape `(batch, *levels[index - 1].shape)`; `None` at the top.
        """
        shape = self.levels[index].shape
        if above is None:
            zeros = torch.zeros(batch, *shape, device=self.device, dtype=self.dtype)
            return DiagonalGaussian(zeros, zeros), None
        size = (1, *shape[1:])[-2:]
        parameters, features = self.top_down[index].prior(self._to_map(above), size, self.run)
        mean, log_std = self._from_map(parameters).chunk(2, dim=1)
        return DiagonalGaussian(mean, 2 * bounded(log_std)), features

    def posterior_of(
        self, index: int, prior: DiagonalGaussian, from_above: Tensor | None, features: Tensor
    ) -> DiagonalGaussian:
        """q(z_l | z_{l+1}, x) of a level.

        Args:
            index: Of the level in `levels`, 0 at the top.
            prior, from_above: Of `prior_of`.
            features: Of the images, one of `image_features`.
        """
        shift = self._from_map(self.top_down[index].shift(features, from_above, self.run))
        mean, log_std = shift.chunk(2, dim=1)
        return DiagonalGaussian(prior.mean + mean, prior.logvar + 2 * bounded(log_std))

    def image_features(self, x: Tensor) -> list[Tensor]:
        """Feature maps of images in [-1, 1] for each level, from the top."""
        config = self.config
        check_shape(x, config.in_channels, config.dims, "x")
        if tuple(x.shape[2:]) != as_size(config.sample_size, config.dims):
            raise ValueError(
                f"x must be of sample_size {config.sample_size}, which the levels are made for, got "
                f"{' x '.join(map(str, x.shape[2:]))}"
            )
        features = [channels_last(self.encoder(self._to_map(x), self.run))]
        for modules in self.encoder_levels:
            h = features[-1]
            for module in modules:
                h = self.run(module, h)
            features.append(h)
        return features[::-1]

    # From the top down.

    def _descend(
        self,
        batch: int,
        draw: Callable[[int, DiagonalGaussian], Tensor],
        features: list[Tensor] | None = None,
        given: Sequence[Tensor] = (),
    ) -> LatentChain:
        """Latents of all levels: the given ones, below them draws of the posterior, or of the prior without features."""
        latents, posteriors, priors = [], [], []
        for index in range(len(self.levels)):
            prior, from_above = self.prior_of(index, latents[-1] if latents else None, batch)
            posterior = prior if features is None else self.posterior_of(index, prior, from_above, features[index])
            latents.append(given[index] if index < len(given) else draw(index, posterior))
            posteriors.append(posterior)
            priors.append(prior)
        return LatentChain(tuple(latents), tuple(posteriors), tuple(priors))

    def _drawn_by(self, noise: Tensor, temperature: float = 1.0) -> Callable[[int, DiagonalGaussian], Tensor]:
        parts = self.split_noise(noise)
        return lambda index, distribution: distribution.sample(noise=temperature * parts[index])

    def split_noise(self, noise: Tensor) -> list[Tensor]:
        """Standard normal numbers `(batch, num_latents)` as those of each level, from the top."""
        if noise.ndim != 2 or noise.shape[1] != self.num_latents:
            raise ValueError(f"noise must have shape (batch, {self.num_latents}), got {tuple(noise.shape)}")
        parts = noise.split([level.size for level in self.levels], dim=1)
        return [part.unflatten(1, level.shape) for part, level in zip(parts, self.levels, strict=True)]

    def _noise(self, batch: int, generator) -> Tensor:
        return draw_normal((batch, self.num_latents), generator=generator, device=self.device, dtype=self.dtype)

    @apply_forward_hook
    def encode(
        self,
        x: Tensor,
        return_dict: bool = True,
        *,
        sample_posterior: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: Tensor | None = None,
    ) -> HierarchicalEncoderOutput | tuple[LatentChain]:
        """The posteriors of all levels, each given the latents above it.

        Args:
            x: Images in [-1, 1], shape `(batch, in_channels, *spatial)`.
            sample_posterior: Whether the latents are drawn, and not the mean of each posterior given that above.
            generator: For the draw.
            noise: Standard normal numbers for the draw, shape `(batch, num_latents)`; given, it makes one.
        """
        features = self.image_features(x)
        chain = self._descend(len(x), self._how(len(x), sample_posterior, generator, noise), features)
        return HierarchicalEncoderOutput(latent_dist=chain) if return_dict else (chain,)

    def _how(self, batch: int, sample_posterior: bool, generator, noise: Tensor | None):
        if noise is None and not sample_posterior:
            return lambda index, distribution: distribution.mode()
        return self._drawn_by(self._noise(batch, generator) if noise is None else noise)

    @apply_forward_hook
    def decode(
        self, z: Tensor | Sequence[Tensor], return_dict: bool = True, generator=None
    ) -> DecoderOutput | tuple[Tensor]:
        """The mean of p(x | z_1): images in [-1, 1], up to the network's overshoot.

        Args:
            z: z_1; or latents of levels from the top, of which the levels that are missing take the mean of
                p(z_l | z_{l+1}). Of all levels, the image depends on z_1 alone.
            generator: Passed by diffusers' pipelines, and not used: decoding is deterministic.
        """
        if not isinstance(z, Tensor):
            upper = self._check_upper(z)
            if not upper:
                raise ValueError("z must hold latents of at least the top level, got none")
            z = self._descend(len(upper[0]), lambda index, prior: prior.mode(), given=upper).latents[-1]
        sample = mean_of(self.config.likelihood, self.decode_parameters(z))
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def decode_parameters(self, z: Tensor) -> Tensor:
        """The parameters of p(x | z_1): logits for "bernoulli", else the mean; shape `(batch, out_channels, *spatial)`."""
        _check_latents(z, self.levels[-1])
        return self._from_map(self.decoder(self._to_map(z), self.run))

    def sample_prior(
        self,
        num_samples: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Sequence[Tensor] = (),
        temperature: float = 1.0,
    ) -> tuple[Tensor, ...]:
        """Latents of all levels from the top, `(num_samples, *level.shape)` each, drawn from the prior.

        Args:
            num_samples: How many.
            generator: Of the draws; it draws for all levels, also for those that are given.
            latents: Of the upper levels, from the top, which are held fixed: `num_samples` of them, or one for all.
            temperature: Factor of each prior's standard deviation: at 0 the means, at 1 the model.

        Raises:
            ValueError: if the latents are not those of upper levels, or the temperature is negative.
        """
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or a positive number, got {temperature:g}")
        upper = self._check_upper(latents)
        if any(len(z) not in (1, num_samples) for z in upper):
            raise ValueError(f"latents must be those of one sample or of {num_samples}, got {[len(z) for z in upper]}")
        upper = [z.to(self.device, self.dtype).expand(num_samples, *z.shape[1:]) for z in upper]
        draw = self._drawn_by(self._noise(num_samples, generator), temperature)
        return self._descend(num_samples, draw, given=upper).latents

    @torch.no_grad()
    def sample(
        self,
        num_samples: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Sequence[Tensor] = (),
        temperature: float = 1.0,
    ) -> Tensor:
        """Means of p(x | z_1) for draws of `sample_prior`, whose arguments it takes: `(num_samples, channels, *spatial)`."""
        return self.decode(self.sample_prior(num_samples, generator, latents, temperature)[-1]).sample

    # Bounds.

    def posterior_draws(self, x: Tensor, generator: torch.Generator | None = None) -> Callable[[int], LatentDraws]:
        """Draws from the posterior of images in [-1, 1], as `importance_weighted_bound` takes them."""
        features = self.image_features(x)

        def draw(copies: int) -> LatentDraws:
            # One draw of all images after the other, so that it makes no difference how many are made at once.
            noise = torch.cat([self._noise(len(x), generator) for _ in range(copies)])
            many = [channels_last(repeated(feature, copies)) for feature in features]
            chain = self._descend(len(noise), self._drawn_by(noise), many)
            return LatentDraws(chain.latents[-1], chain.log_ratio(), chain.kl_by_level())

        return draw

    def elbo_terms(
        self,
        x: Tensor,
        *,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        num_values: int | None = 256,
    ) -> LevelBound:
        """The terms of the negative ELBO for one draw of the latents, with gradients.

        Args:
            x: Images in [-1, 1].
            generator, noise: Of the draw, as for `encode`.
            num_values: Values that a pixel can have, evenly spread over [-1, 1]; `None` takes densities. "bernoulli"
                leaves it out.
        """
        chain = self.encode(x, sample_posterior=True, generator=generator, noise=noise).latent_dist
        parameters = self.decode_parameters(chain.latents[-1])
        log_prob = log_likelihood(self.config.likelihood, x, parameters, self.likelihood_log_scale, levels=num_values)
        return LevelBound(-log_prob, chain.kl_by_level())

    def iwae(
        self,
        x: Tensor,
        num_samples: int = 64,
        *,
        generator: torch.Generator | None = None,
        num_values: int | None = 256,
        chunk_size: int = 8,
    ) -> Tensor:
        """The importance-weighted bound on log p(x) from `num_samples` draws (Burda et al. 2016), float64, `(batch,)`.

        It rises to log p(x) with the number of draws. `vae_likelihood` gives the ELBO of the same draws beside it.
        """
        settings = {"num_samples": num_samples, "chunk_size": chunk_size, "generator": generator}
        return -vae_likelihood(self, x, levels=num_values, **settings).importance_weighted

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: Tensor | None = None,
    ) -> HierarchicalVAEOutput | tuple[Tensor]:
        """Encodes and decodes.

        Args:
            sample: Images in [-1, 1], shape `(batch, in_channels, *spatial)`.
            return_dict: `False` returns the decoded images alone, in a tuple.
            sample_posterior, generator, noise: As for `encode`.
        """
        features = self.image_features(sample)
        chain = self._descend(len(sample), self._how(len(sample), sample_posterior, generator, noise), features)
        parameters = self.decode_parameters(chain.latents[-1])
        decoded = mean_of(self.config.likelihood, parameters)
        if not return_dict:
            return (decoded,)
        return HierarchicalVAEOutput(
            sample=decoded,
            parameters=parameters,
            log_scale=self.likelihood_log_scale,
            kl=chain.kl_per_latent(),
            latents=chain.latents,
        )

    def _to_map(self, x: Tensor) -> Tensor:
        return x.unsqueeze(2) if self.config.dims == 1 else x

    def _from_map(self, x: Tensor) -> Tensor:
        return (x.squeeze(2) if self.config.dims == 1 else x).to(self.dtype)

    def _check_upper(self, latents: Sequence[Tensor]) -> list[Tensor]:
        if isinstance(latents, Tensor) or len(latents) > len(self.levels):
            got = "one tensor" if isinstance(latents, Tensor) else len(latents)
            raise ValueError(f"latents must be a list with those of up to {len(self.levels)} levels, got {got}")
        for z, level in zip(latents, self.levels, strict=False):
            _check_latents(z, level)
        return list(latents)


def _check_latents(z: Tensor, level: Level) -> None:
    if tuple(z.shape[1:]) != level.shape:
        wanted = ", ".join(map(str, level.shape))
        raise ValueError(f"latents of level {level.number} must have shape (batch, {wanted}), got {tuple(z.shape)}")


def _check_options(config) -> None:
    check_likelihood(config)
    if config.dims not in (1, 2):
        raise ValueError(f"dims must be one of 1, 2, got {config.dims!r}")
    for name in ("in_channels", "out_channels", "num_levels", "layers_per_block"):
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {config[name]}")
    if not config.block_out_channels or min(config.block_out_channels) < 1:
        raise ValueError(f"block_out_channels must be one or more positive numbers, got {config.block_out_channels}")
    channels = config.latent_channels
    counts = (channels,) * config.num_levels if isinstance(channels, int) else tuple(channels)
    if len(counts) != config.num_levels or min(counts) < 1:
        raise ValueError(
            f"latent_channels must be one positive number or one for each of {config.num_levels} levels, from the top, got "
            f"{channels}"
        )
    check_size(as_size(config.sample_size, config.dims), config.block_out_channels, "sample_size")
