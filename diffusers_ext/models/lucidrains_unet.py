"""The U-Net of denoising_diffusion_pytorch, for weights that were trained there.

Its residual blocks normalise by the root mean square over the channels, and each pair of them is followed by attention: at
high resolutions linear in the number of pixels, at the lowest one over all pairs of them. Neither `UNetModel` nor diffusers'
`UNet2DModel` has such layers.

References:
    The layout and the names of weights: `Unet` of github.com/lucidrains/denoising-diffusion-pytorch, releases 2.x.
    RMS normalisation: Zhang & Sennrich 2019, arXiv 1910.07467.
    Linear attention: Shen et al. 2018, arXiv 1812.01243.
    Learned keys and values beside those of the pixels: Sukhbaatar et al. 2019, arXiv 1907.01470.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from diffusers_ext.models.embeddings import timestep_of_each
from diffusers_ext.models.layers import attention
from diffusers_ext.models.network import Network, check_shape
from diffusers_ext.models.unet import UNetOutput
from diffusers_ext.sizes import as_size, check_size


class ChannelRMSNorm(nn.Module):
    """Divides each pixel by the root mean square of its channels; shape `(batch, channels, height, width)` to the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.g * self.g.shape[1] ** 0.5


class Waves(nn.Module):
    """Sines and cosines of timesteps, `(batch,)` to `(batch, dim)`, at frequencies from 1 down to `1 / max_period`."""

    def __init__(self, dim: int, max_period: float):
        super().__init__()
        self.dim, self.max_period = dim, max_period

    def forward(self, timesteps: Tensor) -> Tensor:
        # Rounded in the order in which it was trained, since a large timestep makes much of the last digit.
        half = self.dim // 2
        step = -math.log(self.max_period) / (half - 1)
        angles = timesteps[:, None] * torch.exp(torch.arange(half, device=timesteps.device) * step)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class FourierWaves(nn.Module):
    """The timestep beside its sines and cosines at frequencies of their own, `(batch,)` to `(batch, dim + 1)`."""

    def __init__(self, dim: int):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(dim // 2))

    def forward(self, timesteps: Tensor) -> Tensor:
        angles = timesteps[:, None] * self.weights.float() * 2 * math.pi
        return torch.cat([timesteps[:, None], angles.sin(), angles.cos()], dim=-1)


class ConvolutionBlock(nn.Module):
    """A convolution, its normalisation, a scale and a shift if there are any, and SiLU."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm = ChannelRMSNorm(out_channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = self.norm(self.proj(x))
        if scale_shift is not None:
            scale, shift = scale_shift
            x = x * (scale + 1) + shift
        return self.dropout(F.silu(x))


class LucidrainsBlock(nn.Module):
    """Two convolutions beside a skip; the embedding scales and shifts the first of them."""

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int, dropout: float = 0.0):
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(embedding_dim, 2 * out_channels))
        self.block1 = ConvolutionBlock(in_channels, out_channels, dropout)
        self.block2 = ConvolutionBlock(out_channels, out_channels)
        self.res_conv = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.mlp(embedding)[:, :, None, None].chunk(2, dim=1)
        return self.res_conv(x) + self.block2(self.block1(x, (scale, shift)))


class PixelAttention(nn.Module):
    """What both kinds of attention over the pixels of a feature map have, with a skip beside them."""

    def __init__(self, channels: int, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = ChannelRMSNorm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * num_heads * head_dim, 1, bias=False)

    def query_key_value(self, x: Tensor) -> list[Tensor]:
        """Shape `(batch, heads, head_dim, pixels)` each."""
        return [
            part.flatten(2).unflatten(1, (self.num_heads, -1)) for part in self.to_qkv(self.norm(x)).chunk(3, dim=1)
        ]


class LinearAttention(PixelAttention):
    """Queries are distributions over features and keys over pixels, so that no pair of pixels is looked at."""

    def __init__(self, channels: int, num_heads: int, head_dim: int, num_memories: int):
        super().__init__(channels, num_heads, head_dim)
        self.mem_kv = nn.Parameter(torch.randn(2, num_heads, head_dim, num_memories))
        self.to_out = nn.Sequential(nn.Conv2d(num_heads * head_dim, channels, 1), ChannelRMSNorm(channels))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.query_key_value(x)
        key, value = (
            torch.cat([memory.to(x.dtype).expand(len(x), -1, -1, -1), part], dim=-1)
            for memory, part in zip(self.mem_kv, (key, value), strict=True)
        )
        query = query.softmax(dim=-2) * query.shape[-2] ** -0.5
        context = key.softmax(dim=-1) @ value.mT  # (batch, heads, head_dim of keys, head_dim of values)
        out = context.mT @ query
        return x + self.to_out(out.flatten(1, 2).unflatten(2, x.shape[2:]))


class FullAttention(PixelAttention):
    """Attention of each pixel to all (Vaswani et al. 2017)."""

    def __init__(self, channels: int, num_heads: int, head_dim: int, num_memories: int):
        super().__init__(channels, num_heads, head_dim)
        self.mem_kv = nn.Parameter(torch.randn(2, num_heads, num_memories, head_dim))
        self.to_out = nn.Conv2d(num_heads * head_dim, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.mT for part in self.query_key_value(x))
        key, value = (
            torch.cat([memory.to(x.dtype).expand(len(x), -1, -1, -1), part], dim=-2)
            for memory, part in zip(self.mem_kv, (key, value), strict=True)
        )
        out = attention(query, key, value)  # (batch, heads, pixels, head_dim)
        return x + self.to_out(out.mT.flatten(1, 2).unflatten(2, x.shape[2:]))


class LucidrainsUNetModel(Network):
    """The `Unet` of denoising_diffusion_pytorch, releases 2.x, with its names of weights: a denoiser without labels.

    It is there to go on with what was trained by that project (`training/convert_checkpoint.py`); for a new model,
    `UNetModel` has labels, texts and condition images, and faster layers.

    Args:
        sample_size: Side of the square images, or `(height, width)`; each a multiple of
            `2 ** (len(block_out_channels) - 1)`. Other sizes that are such multiples can be given to `forward`.
        in_channels: Channels of the noisy sample.
        out_channels: Channels of the output; twice `in_channels` for a learned variance.
        block_out_channels: Channels that each level hands on, the full resolution first; there `dim` times `dim_mults`.
        stem_channels: Channels of the first feature map, there `init_dim`; `None` for `width`.
        width: Of the timestep's waves, there `dim`; their embedding is four times as wide.
        fourier_dim: Number of waves of own frequencies in the place of these, there `learned_sinusoidal_dim`; `None` for none.
        max_period: The longest period of the waves over 2 pi, there `sinusoidal_pos_emb_theta`.
        full_attention: Whether each level attends over all pairs of pixels; `None` for the last level alone.
        num_attention_heads, attention_head_dim: At each level; one number for all.
        num_memories: Learned keys and values of each layer of attention.
        dropout: Share of the features dropped in each residual block while training.

    Raises:
        ValueError: if the sizes or options do not fit one another.
    """

    _no_split_modules = ["LucidrainsBlock", "LinearAttention", "FullAttention"]
    _repeated_blocks = ["LucidrainsBlock"]
    _group_offload_block_modules = ["downs", "ups"]  # lists of the lists of each level's modules

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (64, 128, 256, 512),
        stem_channels: int | None = None,
        width: int = 64,
        fourier_dim: int | None = None,
        max_period: float = 10000.0,
        full_attention: tuple[bool, ...] | None = None,
        num_attention_heads: int | tuple[int, ...] = 4,
        attention_head_dim: int | tuple[int, ...] = 32,
        num_memories: int = 4,
        dropout: float = 0.0,
    ):
        super().__init__()
        levels = len(block_out_channels)
        heads, head_dims = _of_levels(num_attention_heads, levels), _of_levels(attention_head_dim, levels)
        full = (*[False] * (levels - 1), True) if full_attention is None else tuple(full_attention)
        if not levels or {len(heads), len(head_dims), len(full)} != {levels}:
            raise ValueError(
                "full_attention, num_attention_heads and attention_head_dim must have a value for each of the "
                f"{levels} block_out_channels, got {len(full)}, {len(heads)} and {len(head_dims)}"
            )
        if (
            min(in_channels, out_channels, *block_out_channels, *heads, *head_dims, num_memories) < 1
            or max_period <= 1
        ):
            raise ValueError("numbers of channels, heads and memories must be at least 1, and max_period above 1")
        if width < 4 or width % 2 or (fourier_dim is not None and (fourier_dim < 2 or fourier_dim % 2)):
            raise ValueError(
                f"width must be even and at least 4, and fourier_dim even or None, got {width} and {fourier_dim}"
            )
        check_size(as_size(sample_size), block_out_channels)
        widths = (stem_channels or width, *block_out_channels)
        embedding_dim = 4 * width

        def block(in_channels: int, out_channels: int) -> LucidrainsBlock:
            return LucidrainsBlock(in_channels, out_channels, embedding_dim, dropout)

        def attend(channels: int, level: int, over_pairs: bool) -> PixelAttention:
            layer = FullAttention if over_pairs else LinearAttention
            return layer(channels, heads[level], head_dims[level], num_memories)

        self.init_conv = nn.Conv2d(in_channels, widths[0], 7, padding=3)
        self.time_mlp = nn.Sequential(
            Waves(width, max_period) if fourier_dim is None else FourierWaves(fourier_dim),
            nn.Linear(width if fourier_dim is None else fourier_dim + 1, embedding_dim),
            nn.GELU(),
            nn.Linear(embedding_dim, embedding_dim),
        )
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for level, (before, after) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            is_last = level == levels - 1
            pair = [block(before, before), block(before, before), attend(before, level, full[level])]
            self.downs.append(nn.ModuleList([*pair, _change_down(before, after, keep=is_last)]))
            pair = [block(before + after, after), block(before + after, after), attend(after, level, full[level])]
            self.ups.insert(0, nn.ModuleList([*pair, _change_up(after, before, keep=level == 0)]))
        self.mid_block1, self.mid_block2 = block(widths[-1], widths[-1]), block(widths[-1], widths[-1])
        self.mid_attn = attend(widths[-1], -1, True)
        self.final_res_block = block(2 * widths[0], widths[0])
        self.final_conv = nn.Conv2d(widths[0], out_channels, 1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: None = None,
        return_dict: bool = True,
    ) -> UNetOutput | tuple[Tensor]:
        """Predicts from a noisy sample what the network was trained for.

        Args:
            sample: x_t, shape `(batch, in_channels, height, width)`.
            timestep: One number for all samples, or one for each, shape `(batch,)`.
            class_labels: Passed by pipelines; must be `None`.
            return_dict: `False` returns a tuple.

        Returns:
            Output of shape `(batch, out_channels, height, width)`.
        """
        check_shape(sample, self.config.in_channels)
        check_size(sample.shape[2:], self.config.block_out_channels)
        if class_labels is not None:
            raise ValueError("class_labels were given to a LucidrainsUNetModel, which has no labels")
        waves, *layers = self.time_mlp
        embedding = waves(timestep_of_each(timestep, sample).float()).to(sample.dtype)
        for layer in layers:
            embedding = layer(embedding)

        x = self.init_conv(sample)
        skips = [x]
        for block1, block2, attend, change in self.downs:
            x = self.run(block1, x, embedding)
            skips.append(x)
            x = self.run(attend, self.run(block2, x, embedding))
            skips.append(x)
            x = change(x)
        x = self.run(self.mid_block1, x, embedding)
        x = self.run(self.mid_block2, self.run(self.mid_attn, x), embedding)
        for block1, block2, attend, change in self.ups:
            for block in (block1, block2):
                x = self.run(block, torch.cat([x, skips.pop()], dim=1), embedding)
            x = change(self.run(attend, x))
        x = self.run(self.final_res_block, torch.cat([x, skips.pop()], dim=1), embedding)
        x = self.final_conv(x)
        return UNetOutput(sample=x) if return_dict else (x,)


def _of_levels(value: int | Sequence[int], levels: int) -> tuple[int, ...]:
    return (value,) * levels if isinstance(value, int) else tuple(value)


def _change_down(in_channels: int, out_channels: int, keep: bool) -> nn.Module:
    """To half the resolution, each square of four pixels as one of four times the channels; or a convolution alone."""
    if keep:
        return nn.Conv2d(in_channels, out_channels, 3, padding=1)
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * in_channels, out_channels, 1))


def _change_up(in_channels: int, out_channels: int, keep: bool) -> nn.Module:
    """To twice the resolution by repetition and a convolution, or a convolution alone."""
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    return convolution if keep else nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest"), convolution)
