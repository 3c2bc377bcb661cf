"""The encoder and the decoder of an autoencoder, which are one class each for either direction."""

import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_ext.models.layers import AffineGroupNorm, Attention, Downsample, Upsample, channels_last, convolution


class VAEBlock(nn.Module):
    """A residual block: normalisation, SiLU and convolution, twice; and attention over positions if asked for."""

    def __init__(self, in_channels: int, out_channels: int, dims: int, self_attention: bool = False):
        super().__init__()
        self.norm_1 = AffineGroupNorm(in_channels)
        self.conv_1 = convolution(in_channels, out_channels, dims)
        self.norm_2 = AffineGroupNorm(out_channels)
        self.conv_2 = convolution(out_channels, out_channels, dims)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        self.attention = Attention(out_channels) if self_attention else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x)))
        h = self.skip(x) + self.conv_2(F.silu(self.norm_2(h)))
        return h if self.attention is None else self.attention(h)


class ConvCoder(nn.Module):
    """One half of a convolutional autoencoder: a stack of blocks between two convolutions.

    Args:
        in_channels, out_channels: Before the first and after the last convolution.
        widths: Channels at each resolution, in the order in which they are passed.
        num_blocks: Residual blocks at each resolution.
        upward: Whether the side doubles from one resolution to the next, or halves.
        dims: 2 or 1.
        mid_attention: Whether positions attend to one another at the lowest resolution.
    """

    _hidden_parts = ("stack",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: tuple[int, ...],
        num_blocks: int,
        *,
        upward: bool,
        dims: int,
        mid_attention: bool,
    ):
        super().__init__()
        channels = widths[0]
        self.conv_in = convolution(in_channels, channels, dims)

        lowest = widths[0] if upward else widths[-1]
        middle = {
            "middle_block0": VAEBlock(lowest, lowest, dims, mid_attention),
            "middle_block1": VAEBlock(lowest, lowest, dims),
        }
        self.stack = nn.ModuleDict(middle if upward else {})
        for level, width in enumerate(widths):
            if level > 0 and upward:
                self.stack[f"level{level}_up"] = Upsample(channels, width, dims)
                channels = width
            elif level > 0:
                self.stack[f"level{level}_down"] = Downsample(channels, dims)
            for block in range(num_blocks):
                self.stack[f"level{level}_block{block}"] = VAEBlock(channels, width, dims)
                channels = width
        self.stack.update({} if upward else middle)
        self.norm_out = AffineGroupNorm(channels)
        self.conv_out = convolution(channels, out_channels, dims)

    def forward(self, x: Tensor, run) -> Tensor:
        """Args: run: Calls a module on a feature map, with or without checkpointing."""
        x = channels_last(self.conv_in(x))  # and so is every feature map from here on
        for module in self.stack.values():
            x = run(module, x)
        return self.conv_out(F.silu(self.norm_out(x)))


class DenseCoder(nn.Module):
    """One half of a fully connected autoencoder: `(batch, widths[0])` to `(batch, widths[-1])` by SiLU layers."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)])

    def forward(self, x: Tensor, run) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = run(layer, F.silu(x) if number else x)
        return x
