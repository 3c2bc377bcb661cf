"""A variational autoencoder (Kingma & Welling 2013), convolutional or fully connected."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from diffusers_ext.draws import draw_normal
from diffusers_ext.models.layers import zero_residual_branches
from diffusers_ext.models.network import check_shape
from diffusers_ext.models.vae_coders import ConvCoder, DenseCoder, VAEBlock
from diffusers_ext.models.vae_likelihood import DiagonalGaussian, LatentDraws, gaussian_draws, mean_of
from diffusers_ext.models.vae_network import AutoencoderNetwork, check_likelihood
from diffusers_ext.models.vae_tiling import apply_tiled
from diffusers_ext.sizes import as_size, check_size, downsampling_factor


ARCHITECTURES = ("conv", "mlp")


@dataclass
class EncoderOutput(BaseOutput):
    """`latent_dist` is the posterior over the latents, a `DiagonalGaussian`."""

    latent_dist: DiagonalGaussian


@dataclass
class DecoderOutput(BaseOutput):
    """`sample` is the mean of p(x | z) in [-1, 1] up to the network's overshoot, shape `(batch, channels, *spatial)`."""

    sample: Tensor


@dataclass
class VAEOutput(BaseOutput):
    """The output of a forward pass.

    Attributes:
        sample: Mean of p(x | z), shape `(batch, out_channels, *spatial)`.
        parameters: Parameters of p(x | z), of the same shape: logits for "bernoulli", else the mean itself.
        log_scale: Log of the likelihood's scale, shape `()`.
        mean, logvar: Of the posterior over the latents.
        latents: The z that was decoded.
    """

    sample: Tensor
    parameters: Tensor | None = None
    log_scale: Tensor | None = None
    mean: Tensor | None = None
    logvar: Tensor | None = None
    latents: Tensor | None = None


class VAEModel(AutoencoderNetwork):
    """A variational autoencoder: images to latents and back, with a likelihood.

    Latents are normalised for a denoiser as `(z - shift_factor) * scaling_factor`. `training/train_vae.py` measures
    both: it moves the mean into `latent_offset`, so that `shift_factor` is 0 and the formula is right too in pipelines
    of diffusers that divide by `scaling_factor` and use no shift, such as `StableDiffusionPipeline` and `DiTPipeline`.
    Until it is measured, `scaling_factor` is 1, the latents as they are, and `shift_factor` is `None`.

    Args:
        sample_size: Side of the square images, or `(height, width)`; for 1-D data the length. The convolutional form
            takes other sizes too; each must be a multiple of `2 ** (len(block_out_channels) - 1)`.
        in_channels, out_channels: Channels of the images given and returned.
        block_out_channels: Channels at each resolution, the full one first; each further one has half the side. 1 to 5
            widths make latents 1 to 16 times smaller.
        latent_channels: Channels of the latents, shape `(batch, latent_channels, *spatial)`.
        layers_per_block: Residual blocks at each resolution of the encoder; one more in the decoder.
        mid_block_add_attention: Whether positions attend to one another at the lowest resolution.
        dims: 2 for images, shape `(batch, channels, height, width)`; 1 for series, `(batch, channels, length)`.
        architecture: "conv"; or "mlp", fully connected, with flat latents `(batch, latent_dim)` and a sigmoid at the
            end, which keeps the mean of p(x | z) within [-1, 1].
        latent_dim, hidden_dims: Of "mlp": size of the latents and widths of the encoder's hidden layers, which the
            decoder has in reverse. The convolutional form's options do not matter then, and these not for "conv".
        likelihood: p(x | z): "gaussian", "laplace" (L1), or "bernoulli" for images that are black or white.
        likelihood_scale: Standard deviation of "gaussian", b of "laplace", where data is in [-1, 1].
        learn_scale: Whether that is where the scale starts and it is learned, one number for all pixels.
        scaling_factor, shift_factor: See above.
        value_scale: Of series, between [-1, 1] and own units of the data that it was trained on, see `GuidedDiffusionPipeline`;
            what is trained on its latents reads its data so. It does not change what is encoded or decoded.
        latent_offset: Taken from the encoder's means and added again before the decoder. The prior of the latents is
            N(-latent_offset, 1): without the offset it is the standard normal.

    Raises:
        ValueError: if the sizes or options do not fit one another.
    """

    _no_split_modules = ["VAEBlock"]
    _repeated_blocks = ["VAEBlock"]
    _group_offload_block_modules = ["encoder", "decoder"]  # which `encode` and `decode` call, and not `forward`

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, ...] = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (64, 128, 128),
        latent_channels: int = 4,
        layers_per_block: int = 1,
        mid_block_add_attention: bool = True,
        dims: int = 2,
        architecture: Literal["conv", "mlp"] = "conv",
        latent_dim: int = 16,
        hidden_dims: tuple[int, ...] = (512,),
        likelihood: Literal["bernoulli", "gaussian", "laplace"] = "gaussian",
        likelihood_scale: float = 1.0,
        learn_scale: bool = False,
        scaling_factor: float = 1.0,
        shift_factor: float | None = None,
        latent_offset: float = 0.0,
        value_scale: dict | None = None,
    ):
        super().__init__()
        _check_options(self.config)
        size = as_size(sample_size, dims)
        if architecture == "mlp":
            self.encoder = DenseCoder((in_channels * math.prod(size), *hidden_dims, 2 * latent_dim))
            self.decoder = DenseCoder((latent_dim, *reversed(hidden_dims), out_channels * math.prod(size)))
        else:
            check_size(size, block_out_channels, "sample_size")
            options = {"dims": dims, "mid_attention": mid_block_add_attention}
            self.encoder = ConvCoder(
                in_channels, 2 * latent_channels, block_out_channels, layers_per_block, upward=False, **options
            )
            self.decoder = ConvCoder(
                latent_channels, out_channels, block_out_channels[::-1], layers_per_block + 1, upward=True, **options
            )
        self.start_scale()
        self.use_slicing = self.use_tiling = False
        self.initialize_weights()

    def initialize_weights(self):
        """Makes each residual branch start at zero, so that a deep network starts as easy to train as a shallow one."""
        zero_residual_branches(self, VAEBlock)

    @property
    def downsampling(self) -> int:
        """Ratio of an image's side to that of its latents."""
        return downsampling_factor(self.config.block_out_channels)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of the latents of one sample of `sample_size`."""
        config = self.config
        if config.architecture == "mlp":
            return (config.latent_dim,)
        size = as_size(config.sample_size, config.dims)
        return (config.latent_channels, *(side // self.downsampling for side in size))

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the decoder's last layer."""
        return self.decoder.layers[-1].weight if self.config.architecture == "mlp" else self.decoder.conv_out.weight

    @property
    def is_measured(self) -> bool:
        """Whether `scaling_factor` and `shift_factor` were measured or given, and are not just the defaults."""
        return self.config.shift_factor is not None or self.config.scaling_factor not in (None, 1.0)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[DiagonalGaussian]:
        """The posterior over the latents of images in [-1, 1], shape `(batch, in_channels, *spatial)`."""
        self._check_images(x)
        mean, logvar = self._by_slices(self._encode, x).to(self.dtype).chunk(2, dim=1)
        offset = self.config.latent_offset
        posterior = DiagonalGaussian(mean - offset if offset else mean, logvar, prior_mean=-offset)
        return EncoderOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """The mean of p(x | z): images in [-1, 1], up to the network's overshoot.

        Args:
            z: Latents as `encode` gives them, not normalised, shape `(batch, *latent_shape)`.
            generator: Passed by diffusers' pipelines, and not used: decoding is deterministic.
        """
        sample = mean_of(self.config.likelihood, self.decode_parameters(z))
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def decode_parameters(self, z: Tensor) -> Tensor:
        """The parameters of p(x | z): logits for "bernoulli", else the mean; shape `(batch, out_channels, *spatial)`."""
        self._check_latents(z)
        offset = self.config.latent_offset
        return self._by_slices(self._decode, z + offset if offset else z).to(self.dtype)

    def posterior_draws(self, x: Tensor, generator: torch.Generator | None = None) -> Callable[[int], LatentDraws]:
        """Draws from the posterior of images in [-1, 1], as `importance_weighted_bound` takes them."""
        return gaussian_draws(self.encode(x).latent_dist, generator)

    def sample_prior(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Latents drawn from the prior, shape `(num_samples, *latent_shape)`."""
        shape = (num_samples, *self.latent_shape)
        noise = draw_normal(shape, generator=generator, device=self.device, dtype=self.dtype)
        return noise - self.config.latent_offset

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> VAEOutput | tuple[Tensor]:
        """Encodes and decodes.

        Args:
            sample: Images in [-1, 1], shape `(batch, in_channels, *spatial)`.
            sample_posterior: Whether to decode a draw from the posterior, and not its mean.
            return_dict: `False` returns the decoded images alone, in a tuple.
            generator: For that draw.
            noise: Standard normal noise for that draw, of the latents' shape; given, it makes one.
        """
        posterior = self.encode(sample).latent_dist
        drawn = sample_posterior or noise is not None
        z = posterior.sample(generator, noise) if drawn else posterior.mode()
        parameters = self.decode_parameters(z)
        decoded = mean_of(self.config.likelihood, parameters)
        if not return_dict:
            return (decoded,)
        return VAEOutput(
            sample=decoded,
            parameters=parameters,
            log_scale=self.likelihood_log_scale,
            mean=posterior.mean,
            logvar=posterior.logvar,
            latents=z,
        )

    def enable_slicing(self, use_slicing: bool = True):
        """Passes the samples of a batch through the network one by one, which saves memory."""
        self.use_slicing = use_slicing

    def disable_slicing(self):
        self.use_slicing = False

    def enable_tiling(self, use_tiling: bool = True, tile_size: int | None = None, overlap: float = 0.25):
        """Passes large samples through the network tile by tile; see `apply_tiled` for how close that is to one pass.

        Args:
            tile_size: Side of a tile in pixels, a multiple of `downsampling`; by default `sample_size`.
            overlap: Share of a tile's side in [0, 1) that it shares with each neighbour.

        Raises:
            ValueError: if the tile does not fit; or for "mlp", whose size is fixed.
        """
        config = self.config
        if config.architecture == "mlp" and use_tiling:
            raise ValueError("tiling needs architecture 'conv': a fully connected autoencoder takes one size alone")
        size = as_size(config.sample_size if tile_size is None else tile_size, config.dims, "tile_size")
        check_size(size, config.block_out_channels, "tile_size")
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap must be in [0, 1), got {overlap:g}")
        self.use_tiling = use_tiling
        self._tile = tuple(side // self.downsampling for side in size)
        self._overlap = tuple(min(round(side * overlap), side - 1) for side in self._tile)

    def disable_tiling(self):
        self.use_tiling = False

    def _by_slices(self, function, x: Tensor) -> Tensor:
        if self.use_slicing and len(x) > 1:
            return torch.cat([function(part) for part in x.split(1)])
        return function(x)

    def _encode(self, x: Tensor) -> Tensor:
        if self.config.architecture == "mlp":
            return self.encoder(x.flatten(1), self.run)
        if self.use_tiling:
            tiling = {"tile": self._tile, "overlap": self._overlap, "in_scale": self.downsampling}
            return apply_tiled(self._encode_tile, x, **tiling)
        return self._encode_tile(x)

    def _decode(self, z: Tensor) -> Tensor:
        config = self.config
        if config.architecture == "mlp":
            logits = self.decoder(z, self.run).unflatten(1, (-1, *as_size(config.sample_size, config.dims)))
            return logits if config.likelihood == "bernoulli" else mean_of("bernoulli", logits)
        if self.use_tiling:
            tiling = {"tile": self._tile, "overlap": self._overlap, "out_scale": self.downsampling}
            return apply_tiled(self._decode_tile, z, **tiling)
        return self._decode_tile(z)

    def _encode_tile(self, x: Tensor) -> Tensor:
        return self._in_2d(self.encoder, x)

    def _decode_tile(self, z: Tensor) -> Tensor:
        return self._in_2d(self.decoder, z)

    def _in_2d(self, coder: ConvCoder, x: Tensor) -> Tensor:
        if self.config.dims == 1:
            return coder(x.unsqueeze(2), self.run).squeeze(2)
        return coder(x, self.run)

    def _check_images(self, x: Tensor):
        config = self.config
        check_shape(x, config.in_channels, config.dims, "x")
        if config.architecture == "conv":
            check_size(x.shape[2:], config.block_out_channels)
        elif tuple(x.shape[2:]) != as_size(config.sample_size, config.dims):
            raise ValueError(
                f"a fully connected autoencoder takes samples of sample_size {config.sample_size} alone, got "
                f"{' x '.join(map(str, x.shape[2:]))}"
            )

    def _check_latents(self, z: Tensor):
        shape = self.latent_shape
        if z.ndim != len(shape) + 1 or z.shape[1] != shape[0]:
            wanted = ", ".join(map(str, (shape[0], *("height", "width")[-self.config.dims :]) if shape[1:] else shape))
            raise ValueError(f"z must have shape (batch, {wanted}), got {tuple(z.shape)}")


def _check_options(config):
    check_likelihood(config)
    for name, choices in {"architecture": ARCHITECTURES, "dims": (1, 2)}.items():
        if config[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {config[name]!r}")
    for name in ("in_channels", "out_channels", "latent_channels", "layers_per_block", "latent_dim"):
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {config[name]}")
    if not config.block_out_channels or min(config.block_out_channels) < 1:
        raise ValueError(f"block_out_channels must be one or more positive numbers, got {config.block_out_channels}")
    if any(width < 1 for width in config.hidden_dims):
        raise ValueError(f"hidden_dims must be positive, got {config.hidden_dims}")
    if config.scaling_factor is not None and config.scaling_factor <= 0:
        raise ValueError(f"scaling_factor must be positive, got {config.scaling_factor:g}")
