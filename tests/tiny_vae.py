"""Autoencoders of diffusers, small enough for any test."""

import torch
from diffusers import AutoencoderKL


def tiny_vae(latent_channels: int = 4, channels: int = 3, **config) -> AutoencoderKL:
    """Halves the images once."""
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=latent_channels,
        **config,
    ).eval()
