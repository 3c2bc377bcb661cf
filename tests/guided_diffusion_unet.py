"""The U-Net of guided-diffusion and improved-diffusion, after their description, with the names of their state dict.

Written for tests: small, and without regard to speed. Dhariwal & Nichol 2021 (arXiv 2105.05233), Section 3 and Appendix.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Norm(nn.GroupNorm):
    def __init__(self, channels):
        super().__init__(32, channels)


class ResBlock(nn.Module):
    """A residual block whose embedding is added, or scales and shifts; `change` halves or doubles the resolution in it."""

    def __init__(self, channels, out_channels, dim, scale_shift, change=None):
        super().__init__()
        self.scale_shift, self.change = scale_shift, change
        self.in_layers = nn.Sequential(Norm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(dim, (1 + scale_shift) * out_channels))
        last = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.out_layers = nn.Sequential(Norm(out_channels), nn.SiLU(), nn.Dropout(0.0), last)
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, embedding):
        h = self.in_layers[1](self.in_layers[0](x))
        if self.change == "down":
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        elif self.change == "up":
            x, h = F.interpolate(x, scale_factor=2.0), F.interpolate(h, scale_factor=2.0)
        h = self.in_layers[2](h)
        embedded = self.emb_layers(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = embedded.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
        else:
            h = self.out_layers[0](h + embedded)
        return self.skip_connection(x) + self.out_layers[3](self.out_layers[1](h))


class AttentionBlock(nn.Module):
    """`split_first`: whether the channels of `qkv` are split into queries, keys and values before they are into heads."""

    def __init__(self, channels, heads, split_first):
        super().__init__()
        self.heads, self.split_first = heads, split_first
        self.norm, self.qkv, self.proj_out = (
            Norm(channels),
            nn.Conv1d(channels, 3 * channels, 1),
            nn.Conv1d(channels, channels, 1),
        )

    def forward(self, x, _):
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x.flatten(2)))
        shape = (batch, self.heads, channels // self.heads, height * width)
        if self.split_first:
            q, k, v = (part.reshape(shape) for part in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(batch, self.heads, -1, height * width).chunk(3, dim=2)
        logits = torch.einsum("bhdi,bhdj->bhij", q, k) / math.sqrt(channels // self.heads)
        out = torch.einsum("bhij,bhdj->bhdi", logits.softmax(-1), v).reshape(batch, channels, -1)
        return x + self.proj_out(out).view_as(x)


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, _):
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, _):
        return self.conv(F.interpolate(x, scale_factor=2.0))


class Sequence(nn.Sequential):
    def forward(self, x, embedding):
        for layer in self:
            x = layer(x) if isinstance(layer, nn.Conv2d) else layer(x, embedding)
        return x


class GuidedDiffusionUNet(nn.Module):
    """Options by their names there; `attention_levels` are those with attention, of which level 0 is the full resolution."""

    def __init__(
        self,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_levels=(1,),
        num_heads=None,
        num_head_channels=None,
        in_channels=3,
        out_channels=3,
        num_classes=None,
        use_scale_shift_norm=True,
        resblock_updown=False,
        use_new_attention_order=False,
    ):
        super().__init__()
        self.width, dim = model_channels, 4 * model_channels

        def res(channels, out, change=None):
            return ResBlock(channels, out, dim, use_scale_shift_norm, change)

        def attention(channels):
            heads = num_heads or channels // num_head_channels
            return AttentionBlock(channels, heads, use_new_attention_order)

        self.time_embed = nn.Sequential(nn.Linear(model_channels, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label_emb = None if num_classes is None else nn.Embedding(num_classes, dim)
        channels = channel_mult[0] * model_channels
        self.input_blocks = nn.ModuleList([Sequence(nn.Conv2d(in_channels, channels, 3, padding=1))])
        skips, last = [channels], len(channel_mult) - 1
        for level, factor in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers = [res(channels, factor * model_channels)]
                channels = factor * model_channels
                self.input_blocks.append(
                    Sequence(*layers, *([attention(channels)] if level in attention_levels else []))
                )
                skips.append(channels)
            if level < last:
                down = res(channels, channels, "down") if resblock_updown else Downsample(channels)
                self.input_blocks.append(Sequence(down))
                skips.append(channels)
        self.middle_block = Sequence(res(channels, channels), attention(channels), res(channels, channels))
        self.output_blocks = nn.ModuleList()
        for level, factor in reversed(list(enumerate(channel_mult))):
            for index in range(num_res_blocks + 1):
                layers = [res(channels + skips.pop(), factor * model_channels)]
                channels = factor * model_channels
                layers += [attention(channels)] if level in attention_levels else []
                if level and index == num_res_blocks:
                    layers.append(res(channels, channels, "up") if resblock_updown else Upsample(channels))
                self.output_blocks.append(Sequence(*layers))
        self.out = nn.Sequential(Norm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))

    def forward(self, x, timesteps, labels=None):
        half = self.width // 2
        angles = timesteps[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype))
        if self.label_emb is not None:
            embedding = embedding + self.label_emb(labels)
        skips = []
        for block in self.input_blocks:
            x = block(x, embedding)
            skips.append(x)
        x = self.middle_block(x, embedding)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), embedding)
        return self.out(x)
