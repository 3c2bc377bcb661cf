"""The parts of `DiTModel` that its options put in the place of the paper's: positions, normalisation, patches, skips.

rotary positions        Su et al. 2021, arXiv 2104.09864; in two axes, Heo et al. 2024, arXiv 2403.13298
RMS normalisation       Zhang & Sennrich 2019, arXiv 1910.07467
gated feed-forward      Shazeer 2020, arXiv 2002.05202
convolutional stem      Xiao et al. 2021, arXiv 2106.14881
value residual          Zhou et al. 2024, arXiv 2410.17897
long skips              Bao et al. 2022, arXiv 2209.12152
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_ext.machine import widest_float
from diffusers_ext.models.derivatives import needs_plain_operators
from diffusers_ext.models.layers import channels_last, convolution


PositionEmbedding = Literal["sincos", "rope"]
Norm = Literal["layer", "rms"]
Mlp = Literal["gelu", "swiglu"]
PatchEmbedding = Literal["linear", "conv"]

# The options of `DiTModel` that choose them.
PARTS_OF_DIT = (
    "position_embedding",
    "norm",
    "mlp",
    "value_residual",
    "patch_embedding",
    "long_skips",
    "internal_guidance_layer",
)

# Positions of images are few: Heo et al. take 100 for the 10000 of texts, so that the slowest rotation is felt.
ROTARY_BASE = 100.0


def rotary_table(
    size: Sequence[int], base_size: Sequence[int], head_dim: int, num_unrotated: int = 0, device=None
) -> Tensor:
    """Cosines and sines of the angles by which queries and keys are turned, so that their product depends on distances.

    The axes share the pairs of features evenly, those of the first axis first, each at frequencies from 1 down to nearly
    1 / `ROTARY_BASE` radians per position.

    Args:
        size: Positions on each axis: rows and columns of the patches, or the length of a sequence.
        base_size: Those that the network was made for. Positions of another size lie between those of this one, so that a
            point of the image keeps its position.
        head_dim: Features of an attention head, a multiple of twice the number of axes.
        num_unrotated: Tokens after those of the grid, which have no position and are turned by 0.

    Returns:
        float32, shape `(2, tokens, head_dim // 2)`.
    """
    like = {"dtype": widest_float(device), "device": device}
    count = head_dim // (2 * len(size))  # pairs of features for each axis
    frequencies = ROTARY_BASE ** -(torch.arange(count, **like) / count)
    of_axes = [torch.arange(n, **like) * (base / n) for n, base in zip(size, base_size, strict=True)]
    positions = torch.stack(torch.meshgrid(*of_axes, indexing="ij"), dim=-1).flatten(0, -2)  # (tokens, axes)
    angles = (positions[..., None] * frequencies).flatten(1)
    angles = F.pad(angles, (0, 0, 0, num_unrotated))
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns the pairs of features `(2 i, 2 i + 1)` by the angles of `rotary_table`, in float32 or wider.

    Args:
        x: Queries or keys, shape `(batch, heads, tokens, head_dim)`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs, (cos, sin) = x.to(wide).unflatten(-1, (-1, 2)), table.to(wide)
    if x.device.type == "cpu" and not (torch.compiler.is_compiling() or needs_plain_operators(x)):
        # One pass over the memory each way, and a quarter of the time of the sums below.
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    else:
        first, second = pairs.unbind(-1)
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def normalise(x: Tensor, norm: str, eps: float) -> Tensor:
    """Layer normalisation, or division by the root mean square, of each token `(..., dim)`; nothing in it is learned."""
    if norm == "rms":
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    return F.layer_norm(x, x.shape[-1:], eps=eps)


class RMSNorm(nn.Module):
    """Division by the root mean square, and a learned scale, which takes the precision of the tokens `(..., dim)`."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return normalise(x, "rms", self.eps) * self.weight.to(x.dtype)


def learned_norm(dim: int, norm: str, *, eps: float, bias: bool) -> nn.Module:
    """A normalisation of tokens with a learned scale and, of layer normalisation, perhaps a shift."""
    return RMSNorm(dim, eps) if norm == "rms" else nn.LayerNorm(dim, eps=eps, bias=bias)


def gated_width(hidden_dim: int) -> int:
    """The width of a gated layer that has as many parameters as two linear layers of `hidden_dim`, to a multiple of 8.

    It has three matrices where the other has two.
    """
    return max(8, round(hidden_dim * 2 / 3 / 8) * 8)


class ConvPatchEmbedding(nn.Module):
    """Patches by strided convolutions, one for each time that a side is halved, and a linear layer.

    It costs about half as much as a block. There is no normalisation in it, which would hide how bright an image is.

    Args:
        in_channels: Of the sample.
        dim: Width of the tokens.
        patch_size: A power of 2.
    """

    def __init__(self, in_channels: int, dim: int, patch_size: int):
        super().__init__()
        num_halvings = int(math.log2(patch_size))
        widths = [dim >> i for i in reversed(range(max(num_halvings, 1)))]
        stride = 2 if num_halvings else 1
        self.convs = nn.ModuleList(
            convolution(before, after, 2, stride=stride)
            for before, after in zip([in_channels, *widths[:-1]], widths, strict=True)
        )
        self.proj = nn.Linear(dim, dim)

    def forward(self, sample: Tensor) -> Tensor:
        """Sample `(batch, in_channels, height, width)` to tokens `(batch, patches, dim)`."""
        x = channels_last(sample)
        for conv in self.convs:
            x = F.silu(conv(x))
        return self.proj(x.flatten(2).transpose(1, 2))


def patch_layer(patch_embedding: str, in_channels: int, dim: int, patch_size: int) -> nn.Module:
    """From patches to tokens: a linear layer of unfolded patches, or convolutions of the sample."""
    if patch_embedding == "conv":
        return ConvPatchEmbedding(in_channels, dim, patch_size)
    return nn.Linear(in_channels * patch_size**2, dim)


class FirstValues:
    """The values of the first block's attention, `(batch, heads, tokens, head_dim)`, on their way to the later blocks.

    It is filled by the first block and read by the others. Where hooks skip the first block's attention, it stays empty, and
    the later blocks have their own values alone. Each call of the network has one of its own; FSDP, which copies lists and
    tuples among the arguments of a block, hands it on as it is.
    """

    value: Tensor | None = None

    def mixed(self, value: Tensor, share: Tensor | None) -> Tensor:
        """The values of a block, of which `share`, shape `(1,)`, are its own; of the first block, which has none, all."""
        if share is None:
            self.value = value
            return value
        return value if self.value is None else torch.lerp(self.value, value, share.to(value.dtype))


def num_long_skips(num_layers: int) -> int:
    """How many of the first blocks are joined to as many of the last: those with another block between them."""
    return (num_layers - 1) // 2


def init_skip_(layer: nn.Linear) -> None:
    """Makes a layer of `(x, skip)` begin as x."""
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:, : len(layer.weight)].fill_diagonal_(1)
        layer.bias.zero_()
