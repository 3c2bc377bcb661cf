"""The `Unet` of denoising_diffusion_pytorch 2.x after its layout, with the names of its state dict, and its `GaussianDiffusion`.

Written for tests: small, in formulas of its own, and without regard to speed.
"""

import math

import torch
from torch import nn


class Norm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x):
        return x / x.square().mean(1, keepdim=True).sqrt() * self.g


class Block(nn.Module):
    def __init__(self, channels, out_channels):
        super().__init__()
        self.proj, self.norm = nn.Conv2d(channels, out_channels, 3, padding=1), Norm(out_channels)


class ResnetBlock(nn.Module):
    def __init__(self, channels, out_channels, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * out_channels))
        self.block1, self.block2 = Block(channels, out_channels), Block(out_channels, out_channels)
        self.res_conv = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x, embedding):
        scale, shift = self.mlp(embedding)[..., None, None].tensor_split(2, dim=1)
        h = self.block1.norm(self.block1.proj(x))
        h = nn.functional.silu(h + h * scale + shift)
        h = nn.functional.silu(self.block2.norm(self.block2.proj(h)))
        return h + self.res_conv(x)


class Attention(nn.Module):
    """Over all pairs of pixels, or linear: softmax of queries over features and of keys over pixels."""

    def __init__(self, channels, heads, head_dim, full):
        super().__init__()
        self.heads, self.full, width = heads, full, heads * head_dim
        self.norm, self.to_qkv = Norm(channels), nn.Conv2d(channels, 3 * width, 1, bias=False)
        self.mem_kv = nn.Parameter(torch.empty(2, heads, *((4, head_dim) if full else (head_dim, 4))))
        last = nn.Conv2d(width, channels, 1)
        self.to_out = last if full else nn.Sequential(last, Norm(channels))

    def forward(self, x):
        batch, _, height, width = x.shape
        # (queries, keys or values; batch; head; feature; pixel)
        parts = self.to_qkv(self.norm(x)).reshape(batch, 3, self.heads, -1, height * width).transpose(0, 1)
        memories = self.mem_kv.mT if self.full else self.mem_kv
        query = parts[0]
        key, value = (
            torch.cat([m[None].repeat(batch, 1, 1, 1), p], dim=3) for m, p in zip(memories, parts[1:], strict=True)
        )
        if self.full:
            weights = torch.einsum("bhdi,bhdj->bhij", query, key) / math.sqrt(query.shape[2])
            out = torch.einsum("bhij,bhdj->bhdi", weights.softmax(-1), value)
        else:
            query, key = query.softmax(2) / math.sqrt(query.shape[2]), key.softmax(3)
            out = torch.einsum("bhdn,bhen,bhdm->bhem", key, value, query)
        return x + self.to_out(out.reshape(batch, -1, height, width))


class ReferenceUnet(nn.Module):
    """Options by their names there."""

    def __init__(
        self, dim=8, dim_mults=(1, 2), channels=3, init_dim=None, out_dim=None, full_attn=(False, True), attn_heads=(2, 2),
        attn_dim_head=(4, 4), self_condition=False, learned_sinusoidal_dim=None,
    ):  # fmt: skip
        super().__init__()
        self.dim, self.self_condition = dim, self_condition
        widths = [init_dim or dim, *(dim * mult for mult in dim_mults)]
        levels = list(zip(widths, widths[1:], attn_heads, attn_dim_head, full_attn, strict=False))
        self.init_conv = nn.Conv2d(channels * (1 + self_condition), widths[0], 7, padding=3)
        first = nn.Identity()
        if learned_sinusoidal_dim:
            first.weights = nn.Parameter(torch.empty(learned_sinusoidal_dim // 2))
        waves = learned_sinusoidal_dim + 1 if learned_sinusoidal_dim else dim
        self.time_mlp = nn.Sequential(first, nn.Linear(waves, 4 * dim), nn.GELU(), nn.Linear(4 * dim, 4 * dim))
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()

        def parts(channels, out_channels, level):
            blocks = [ResnetBlock(channels, out_channels, 4 * dim) for _ in range(2)]
            return [*blocks, Attention(out_channels, *level[2:])]

        for level in levels:
            before, after = level[:2]
            change = nn.Sequential(nn.Identity(), nn.Conv2d(4 * before, after, 1))
            if level is levels[-1]:
                change = nn.Conv2d(before, after, 3, padding=1)
            self.downs.append(nn.ModuleList([*parts(before, before, level), change]))
        for level in reversed(levels):
            before, after = level[:2]
            change = nn.Conv2d(after, before, 3, padding=1)
            if level is not levels[0]:
                change = nn.Sequential(nn.Identity(), change)
            self.ups.append(nn.ModuleList([*parts(before + after, after, level), change]))
        self.mid_block1, self.mid_block2 = (ResnetBlock(widths[-1], widths[-1], 4 * dim) for _ in range(2))
        self.mid_attn = Attention(widths[-1], attn_heads[-1], attn_dim_head[-1], True)
        self.final_res_block = ResnetBlock(2 * widths[0], widths[0], 4 * dim)
        self.final_conv = nn.Conv2d(widths[0], out_dim or channels, 1)

    def embed(self, t):
        if hasattr(self.time_mlp[0], "weights"):
            angles = 2 * math.pi * t[:, None] * self.time_mlp[0].weights
            waves = torch.cat([t[:, None], angles.sin(), angles.cos()], dim=1)
        else:
            half = self.dim // 2
            frequencies = torch.tensor([10000 ** (-i / (half - 1)) for i in range(half)])
            waves = torch.cat([(t[:, None] * frequencies).sin(), (t[:, None] * frequencies).cos()], dim=1)
        return self.time_mlp(waves)

    def forward(self, x, t, x_self_cond=None):
        if self.self_condition:
            x = torch.cat([torch.zeros_like(x) if x_self_cond is None else x_self_cond, x], dim=1)
        embedding = self.embed(t.float())
        first = x = self.init_conv(x)
        skips = []
        for block1, block2, attention, change in self.downs:
            skips.append(x := block1(x, embedding))
            skips.append(x := attention(block2(x, embedding)))
            if isinstance(change, nn.Sequential):  # each square of four pixels becomes channels: channel, row, column
                batch, channels, height, width = x.shape
                x = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
                x = x.reshape(batch, 4 * channels, height // 2, width // 2)
            x = change(x)
        x = self.mid_block2(self.mid_attn(self.mid_block1(x, embedding)), embedding)
        for block1, block2, attention, change in self.ups:
            x = block1(torch.cat([x, skips.pop()], dim=1), embedding)
            x = attention(block2(torch.cat([x, skips.pop()], dim=1), embedding))
            x = change(x.repeat_interleave(2, 2).repeat_interleave(2, 3) if isinstance(change, nn.Sequential) else x)
        return self.final_conv(self.final_res_block(torch.cat([x, first], dim=1), embedding))


def diffusion_tables(betas, objective="pred_v", largest_snr=None):
    """Buffers of `GaussianDiffusion`, float32, from float64 betas; `largest_snr` is that of min-SNR weighting."""
    alpha_bar = (1 - betas).cumprod(0)
    snr = alpha_bar / (1 - alpha_bar)
    weight = snr if largest_snr is None else snr.clamp(max=largest_snr)
    weight = {"pred_noise": weight / snr, "pred_x0": weight, "pred_v": weight / (snr + 1)}[objective]
    return {
        name: value.float()
        for name, value in zip(("betas", "alphas_cumprod", "loss_weight"), (betas, alpha_bar, weight), strict=True)
    }
