"""A U-Net that predicts noise, clean samples or velocities (Ho et al. 2020; Dhariwal & Nichol 2021)."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from diffusers_ext.models.embeddings import (
    TimestepEmbedding,
    augmentation_layer,
    embed_augmentation,
    pooled_dim,
    timestep_of_each,
)
from diffusers_ext.models.image_condition import (
    check_condition_image,
    check_condition_options,
    concatenate_condition,
    embed_level,
    input_channels,
)
from diffusers_ext.models.layers import (
    AffineGroupNorm,
    Attention,
    Downsample,
    Upsample,
    attention_bias,
    channels_last,
    concatenate,
    convolution,
    group_norm,
    num_groups,
    register_skippable,
    zero_,
    zero_residual_branches,
)
from diffusers_ext.models.network import Network, check_conditions, check_num_classes, check_shape
from diffusers_ext.sizes import as_size, check_size


@dataclass
class UNetOutput(BaseOutput):
    """`sample` is the network's output, shape `(batch, out_channels, *spatial)`."""

    sample: Tensor


class UNetBlock(nn.Module):
    """A residual block with its attention layers.

    The embedding enters as a scale and a shift of the second normalisation.

    Args:
        in_channels, out_channels: Channels before and after.
        embedding_dim: Width of the timestep's embedding.
        dims: 2 for images, 1 for series.
        head_dim: Channels of an attention head.
        self_attention: Whether positions attend to one another.
        context_dim: Width of the tokens that positions attend to across; `None` leaves cross-attention out.
        dropout: Share of the features that are dropped before the last convolution.
    """

    _fused_layers = {"scale_shift": 2}

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_dim: int,
        *,
        dims: int = 2,
        head_dim: int = 64,
        self_attention: bool = False,
        context_dim: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.norm_1 = AffineGroupNorm(in_channels)
        self.conv_1 = convolution(in_channels, out_channels, dims, bias=False)  # the shift is one
        self.scale_shift = nn.Linear(embedding_dim, 2 * out_channels)
        self.norm_2_groups = num_groups(out_channels)
        self.conv_2 = convolution(out_channels, out_channels, dims)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        self.dropout = nn.Dropout(dropout)
        self.attention = Attention(out_channels, head_dim) if self_attention else None
        self.cross_attention = None if context_dim is None else Attention(out_channels, head_dim, context_dim)

    def forward(
        self,
        hidden_states: Tensor,
        embedding: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        scale, shift = self.scale_shift(embedding).chunk(2, dim=-1)
        h = self.conv_1(F.silu(self.norm_1(hidden_states)))
        h = F.silu(group_norm(h, 1 + scale, shift, self.norm_2_groups))
        h = self.skip(hidden_states) + self.conv_2(self.dropout(h))
        if self.attention is not None:
            h = self.attention(h)
        if self.cross_attention is not None:
            h = self.cross_attention(h, context, context_mask)
        return h


register_skippable(UNetBlock)


def block_maker(
    size: tuple[int, ...],
    block_out_channels: tuple[int, ...],
    attention_resolutions: tuple[int, ...] | None,
    cross_attention_dim: int | None = None,
    **options,
) -> Callable[..., UNetBlock]:
    """Makes the blocks of a network by level: `block(in_channels, out_channels, level, attend=None)`.

    Args:
        size: Of the samples.
        attention_resolutions: Sides of the maps with attention, as in `UNetModel`; `attend` overrules them.
        cross_attention_dim: Of the blocks with self-attention.
        options: For each `UNetBlock`.
    """
    sides = [max(size) >> level for level in range(len(block_out_channels))]
    attention_sides = [side for side in sides if side <= 16][:1]
    if attention_resolutions is not None:
        attention_sides = list(attention_resolutions)
        try:
            refuse_unmatched_resolutions(size, len(block_out_channels), attention_resolutions)
        except ValueError as problem:  # no error here, since models may have been saved so
            warnings.warn(str(problem), stacklevel=5)

    def block(in_channels: int, out_channels: int, level: int, attend: bool | None = None) -> UNetBlock:
        if attend is None:
            attend = sides[level] in attention_sides
        context_dim = cross_attention_dim if attend else None
        return UNetBlock(in_channels, out_channels, self_attention=attend, context_dim=context_dim, **options)

    return block


def refuse_unmatched_resolutions(
    size: tuple[int, ...], num_levels: int, attention_resolutions: tuple[int, ...] | None
) -> None:
    """Refuses sides at which there is no feature map.

    Args:
        size: Of the samples.
        num_levels: Number of resolutions.

    Raises:
        ValueError: with the sides that there are.
    """
    sides = [max(size) >> level for level in range(num_levels)]
    unmatched = [side for side in attention_resolutions or () if side not in sides]
    if unmatched:
        raise ValueError(
            f"attention_resolutions must be among the sides of the feature maps, {', '.join(map(str, sides))}, got "
            f"{', '.join(map(str, unmatched))}"
        )


def make_encoder(
    block: Callable[..., UNetBlock],
    block_out_channels: tuple[int, ...],
    layers_per_block: int,
    dims: int,
) -> tuple[nn.ModuleDict, list[int]]:
    """The encoder: modules named by level and index, and the channels of their input and of each of their outputs."""
    encoder, channels = nn.ModuleDict(), block_out_channels[0]
    all_channels = [channels]
    for level, width in enumerate(block_out_channels):
        if level > 0:
            encoder[f"level{level}_down"] = Downsample(channels, dims)
            all_channels.append(channels)
        for i in range(layers_per_block):
            encoder[f"level{level}_block{i}"] = block(channels, width, level)
            channels = width
            all_channels.append(channels)
    return encoder, all_channels


def stem(conv_in: nn.Module, sample: Tensor) -> Tensor:
    """The first feature map of a sample of any dimension, in channels_last on CPUs, and so is every later one."""
    return channels_last(conv_in(sample.unsqueeze(2) if sample.ndim == 3 else sample))


def with_fourier_features(sample: Tensor, exponents: tuple[int, ...]) -> Tensor:
    """A sample with sin(2^n pi x) and cos(2^n pi x) as further channels, in its dtype, for each of the exponents n."""
    if not exponents:
        return sample
    angles = [2.0**n * math.pi * sample.float() for n in exponents]  # which are too large for half precision
    return torch.cat(
        [sample, *(wave(angle).to(sample.dtype) for angle in angles for wave in (torch.sin, torch.cos))], 1
    )


def run_module(
    network: Network, module: nn.Module, x: Tensor, embedding: Tensor, context: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Runs a module of a network: a block, which takes the conditions, or a change of resolution, which does not."""
    return network.run(module, x, *((embedding, context, mask) if isinstance(module, UNetBlock) else ()))


class UNetModel(Network):
    """A U-Net with residual blocks, attention at its lower resolutions, and optional labels and context.

    Built for speed: feature maps stay in channels_last on CPUs, attention heads are wide, and passes over memory are few;
    `docs/speed.md` has the figures beside diffusers' `UNet2DModel`.

    Args:
        sample_size: Side of the square images, or `(height, width)`; for 1-D data the length. Each must be a multiple
            of `2 ** (len(block_out_channels) - 1)`. Other sizes that are such multiples can be given to `forward`.
        in_channels: Channels of the noisy sample.
        out_channels: Channels of the output; twice `in_channels` for a learned variance.
        block_out_channels: Channels at each resolution, the full one first; each further one has half the side.
        layers_per_block: Residual blocks at each resolution of the encoder; one more in the decoder.
        attention_resolutions: Sides (the longer one) of the feature maps that get self-attention, for `sample_size`;
            `None` for the largest map of at most 16. The middle, at the lowest resolution, always has it.
        attention_head_dim: Channels of an attention head. Channels that it does not divide get the next larger size.
        num_classes: Number of labels, or `None`. Label `num_classes` is the null label, which stands for "no label".
        cross_attention_dim: Width of `encoder_hidden_states`, or `None`. Maps with self-attention attend to them.
        dropout: Share of the features dropped in each residual block while training.
        dims: 2 for images, shape `(batch, channels, height, width)`; 1 for series, `(batch, channels, length)`.
        time_embedding_dim: Width of the embedding of timestep and label; `None` for four times the first width.
        time_cond_proj_dim: `None`; in diffusers' networks, the width of an embedding of the guidance scale.
        pool_context: Add the mean of the context's tokens, through a linear layer, to the embedding of the timestep, so
            that each block is conditioned on the mean of the text (as in Imagen, Saharia et al. 2022), which trains faster.
        learned_unconditional: Whether the network was trained to predict without its label or text too, as dropping them
            in a share of the batches does. If not, pipelines refuse to guide by it, and labels must be given; after
            training with such dropout, set it by `model.register_to_config(learned_unconditional=True)`.
        fourier_features: Exponents n of the channels sin(2^n pi x) and cos(2^n pi x) that are put beside the input x, for
            the details that likelihood rests on; 7 and 8 for 8 bits (Kingma et al. 2021, arXiv 2107.00630). Empty for none.
        condition_channels: Channels of the condition image, which is concatenated to x_t; 0 for none.
        condition_level: Take the noise level in the condition image as an input too (arXiv 2106.15282).
        learned_without_image: Whether the network was trained to predict without its condition image too; if not, it must be
            given.
        augmentation_dim: Numbers that say how images of training were changed, which the network takes as an input too (Karras
            et al. 2022, Appendix F.2), so that it samples unchanged ones; 0 for none.

    Raises:
        ValueError: if the sizes or options do not fit one another.
    """

    _no_split_modules = ["UNetBlock"]
    _repeated_blocks = ["UNetBlock"]
    _hidden_parts = ("encoder", "middle", "decoder")

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (64, 128, 128),
        layers_per_block: int = 2,
        attention_resolutions: tuple[int, ...] | None = None,
        attention_head_dim: int = 64,
        num_classes: int | None = None,
        cross_attention_dim: int | None = None,
        dropout: float = 0.0,
        dims: int = 2,
        time_embedding_dim: int | None = None,
        time_cond_proj_dim: None = None,
        pool_context: bool = False,
        learned_unconditional: bool = True,
        fourier_features: tuple[int, ...] = (),
        condition_channels: int = 0,
        condition_level: bool = False,
        learned_without_image: bool = True,
        augmentation_dim: int = 0,
    ):
        super().__init__()
        if time_cond_proj_dim is not None:
            raise ValueError(f"time_cond_proj_dim must be None, got {time_cond_proj_dim}: guidance is not embedded")
        check_options(
            in_channels, out_channels, block_out_channels, layers_per_block, attention_head_dim, num_classes, dims
        )
        check_condition_options(condition_channels, condition_level)
        size = as_size(sample_size, dims)
        check_size(size, block_out_channels)
        embedding_dim = time_embedding_dim or 4 * block_out_channels[0]
        block = block_maker(
            size,
            block_out_channels,
            attention_resolutions,
            cross_attention_dim,
            embedding_dim=embedding_dim,
            dims=dims,
            head_dim=attention_head_dim,
            dropout=dropout,
        )
        self.time_embedding = TimestepEmbedding(
            embedding_dim,
            block_out_channels[0],
            num_classes,
            pooled_dim=pooled_dim(pool_context, cross_attention_dim),
        )
        self.level_embedding = TimestepEmbedding(embedding_dim, block_out_channels[0]) if condition_level else None
        self.augmentation_embedding = augmentation_layer(augmentation_dim, embedding_dim)
        seen_channels = in_channels * (1 + 2 * len(fourier_features)) + input_channels(condition_channels)
        self.conv_in = convolution(seen_channels, block_out_channels[0], dims)

        # Each module of the encoder leaves its output for one block of the decoder; names give level and index.
        self.encoder, skip_channels = make_encoder(block, block_out_channels, layers_per_block, dims)
        self.decoder = nn.ModuleDict()
        channels = skip_channels[-1]

        last = len(block_out_channels) - 1
        self.middle = nn.ModuleList([block(channels, channels, last, True), block(channels, channels, last, False)])

        for level, width in reversed(list(enumerate(block_out_channels))):
            for i in range(layers_per_block + 1):
                self.decoder[f"level{level}_block{i}"] = block(channels + skip_channels.pop(), width, level)
                channels = width
            if level > 0:
                self.decoder[f"level{level}_up"] = Upsample(channels, block_out_channels[level - 1], dims)
                channels = block_out_channels[level - 1]

        self.norm_out = AffineGroupNorm(channels)
        self.conv_out = convolution(channels, out_channels, dims)
        self.initialize_weights()

    def initialize_weights(self):
        """Makes each residual branch and the output start at zero, so that the network starts as its skips alone."""
        zero_residual_branches(self, UNetBlock)
        zero_(self.conv_out)

    @property
    def skippable_blocks(self) -> list[Attention]:
        """The self-attention layers from first to last, which guiders may skip or perturb by their number."""
        modules = [*self.encoder.values(), *self.middle, *self.decoder.values()]
        return [module.attention for module in modules if getattr(module, "attention", None) is not None]

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep_cond: None = None,
        cross_attention_kwargs: None = None,
        added_cond_kwargs: None = None,
        condition_image: Tensor | None = None,
        condition_given: Tensor | None = None,
        condition_level: Tensor | None = None,
        augmentation: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNetOutput | tuple[Tensor]:
        """Predicts from a noisy sample what the network was trained for.

        Args:
            sample: x_t, shape `(batch, in_channels, *spatial)`.
            timestep: One number for all samples, or one for each, shape `(batch,)`.
            class_labels: Integers in `[0, num_classes]`, shape `(batch,)`; `None` stands for the null label. Or sets of
                labels, multi-hot, shape `(batch, num_classes)`.
            encoder_hidden_states: Context, shape `(batch, tokens, cross_attention_dim)`.
            encoder_attention_mask: 1 or True at the tokens of the context to attend to, shape `(batch, tokens)`.
            timestep_cond, cross_attention_kwargs, added_cond_kwargs: Passed by diffusers' pipelines; must be empty.
            condition_image: In [-1, 1], shape `(batch, condition_channels, *spatial)`; `None` for none.
            condition_given: Which samples have a condition image, shape `(batch,)`; by default all, if it is given.
            condition_level: Standard deviation of the noise in the condition image, in [0, 1], shape `(batch,)`; 0 by default.
            augmentation: What was done to the images of training, shape `(batch, augmentation_dim)`; `None` for nothing.
            return_dict: `False` returns a tuple.

        Returns:
            Output of shape `(batch, out_channels, *spatial)`.
        """
        self._check_inputs(sample, class_labels, encoder_hidden_states)
        check_condition_image(self.config, sample, condition_image, condition_given, condition_level)
        if timestep_cond is not None or cross_attention_kwargs or added_cond_kwargs:
            raise ValueError("UNetModel takes no timestep_cond, cross_attention_kwargs or added_cond_kwargs")
        timesteps = timestep_of_each(timestep, sample)
        embedding = F.silu(
            self.time_embedding(timesteps, class_labels, sample.dtype, encoder_hidden_states, encoder_attention_mask)
            + embed_level(self.level_embedding, condition_level, condition_given, sample)
            + embed_augmentation(self.augmentation_embedding, augmentation, sample)
        )
        mask = attention_bias(encoder_attention_mask, sample.dtype)

        x = with_fourier_features(sample, self.config.fourier_features)
        x = concatenate_condition(x, self.config.condition_channels, condition_image, condition_given)
        x = stem(self.conv_in, x)
        skips = [x]
        for module in self.encoder.values():
            x = run_module(self, module, x, embedding, encoder_hidden_states, mask)
            skips.append(x)
        for module in self.middle:
            x = run_module(self, module, x, embedding, encoder_hidden_states, mask)
        for module in self.decoder.values():
            if isinstance(module, UNetBlock):
                x = concatenate(x, skips.pop())
            x = run_module(self, module, x, embedding, encoder_hidden_states, mask)
        x = self.conv_out(F.silu(self.norm_out(x)))
        x = x.squeeze(2) if self.config.dims == 1 else x

        return UNetOutput(sample=x) if return_dict else (x,)

    def _check_inputs(self, sample: Tensor, class_labels: Tensor | None, context: Tensor | None):
        config = self.config
        check_shape(sample, config.in_channels, config.dims)
        check_size(sample.shape[2:], config.block_out_channels)
        check_conditions(config, sample, class_labels, context)


def check_options(in_channels, out_channels, block_out_channels, layers_per_block, head_dim, num_classes, dims):
    if dims not in (1, 2):
        raise ValueError(f"dims must be 1 or 2, got {dims}")
    if not block_out_channels or min(in_channels, out_channels, *block_out_channels, layers_per_block, head_dim) < 1:
        raise ValueError(
            "in_channels, out_channels, block_out_channels, layers_per_block and attention_head_dim must be at least 1, "
            f"got {in_channels}, {out_channels}, {tuple(block_out_channels)}, {layers_per_block} and {head_dim}"
        )
    if block_out_channels[0] % 2:
        raise ValueError(f"the first of block_out_channels must be even, got {block_out_channels[0]}")
    check_num_classes(num_classes)
