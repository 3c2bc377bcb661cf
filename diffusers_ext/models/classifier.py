"""A classifier of noisy samples, for guidance by its gradient (Dhariwal & Nichol 2021, arXiv 2105.05233, Section 4)."""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from diffusers_ext.models.embeddings import TimestepEmbedding, timestep_of_each
from diffusers_ext.models.layers import (
    AffineGroupNorm,
    attention,
    convolution,
    num_heads,
    project_heads,
    zero_,
    zero_residual_branches,
)
from diffusers_ext.models.network import Network
from diffusers_ext.models.unet import (
    UNetBlock,
    block_maker,
    check_options,
    make_encoder,
    run_module,
    stem,
)
from diffusers_ext.sizes import as_size, check_size, downsampling_factor


@dataclass
class NoisyClassifierOutput(BaseOutput):
    """`logits` of the labels, shape `(batch, num_classes)`."""

    logits: Tensor


class AttentionPool(nn.Module):
    """A feature map to a vector: its mean attends to all positions (Radford et al. 2021, arXiv 2103.00020, Section 2.4).

    Args:
        channels: Of the map and of the vector.
        num_positions: Of the map; each has a learned embedding, and so has the mean.
        head_dim: Channels of an attention head; rounded up to the next size that divides `channels`.
    """

    def __init__(self, channels: int, num_positions: int, head_dim: int = 64):
        super().__init__()
        self.num_heads = num_heads(channels, head_dim)
        self.norm = AffineGroupNorm(channels)
        self.positions = nn.Parameter(torch.randn(num_positions + 1, channels) * channels**-0.5)
        self.to_q = nn.Linear(channels, channels)
        self.to_kv = nn.Linear(channels, 2 * channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Shape `(batch, channels, height, width)` to `(batch, channels)`."""
        tokens = F.silu(self.norm(x)).flatten(2).transpose(1, 2)  # (batch, positions, channels)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + self.positions.to(tokens.dtype)
        return self.to_out(attention(*project_heads(self, tokens[:, :1], tokens)).flatten(1))


class NoisyClassifierModel(Network):
    """Classifies noisy samples of any noise level: the encoder of `UNetModel`, then pooling by attention.

    `training/train_classifier.py` trains it; `diffusers_ext.ClassifierGuidance` guides by it.

    Args:
        sample_size: Side of the square images, or `(height, width)`; for 1-D data the length. Each must be a multiple
            of `2 ** (len(block_out_channels) - 1)`. Samples have this size, no other.
        in_channels: Channels of the noisy sample.
        num_classes: Number of labels.
        block_out_channels, layers_per_block, attention_resolutions, attention_head_dim: As in `UNetModel`.
        dropout: Share of the features dropped in each residual block while training.
        dims: 2 for images, 1 for series.
        time_embedding_dim: As in `UNetModel`.
        noise_schedule: Description by `diffusers_ext.schedulers.levels.describe_path` of the noising path that it was
            trained on, which a pipeline compares with its scheduler's.
        data_statistics: `DataStatisticsModel.fingerprint` of the statistics by which its samples were normalised, which a
            pipeline compares with its own; `None` for images in [-1, 1], or latents at their VAE's scale.

    Raises:
        ValueError: if the sizes or options do not fit one another.
    """

    _no_split_modules = ["UNetBlock"]
    _repeated_blocks = ["UNetBlock"]
    _hidden_parts = ("encoder", "middle")

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        num_classes: int = 10,
        block_out_channels: tuple[int, ...] = (64, 128, 128),
        layers_per_block: int = 1,
        attention_resolutions: tuple[int, ...] | None = None,
        attention_head_dim: int = 64,
        dropout: float = 0.0,
        dims: int = 2,
        time_embedding_dim: int | None = None,
        noise_schedule: dict[str, Any] | None = None,
        data_statistics: str | None = None,
    ):
        super().__init__()
        check_options(
            in_channels, num_classes, block_out_channels, layers_per_block, attention_head_dim, num_classes, dims
        )
        size = as_size(sample_size, dims)
        check_size(size, block_out_channels)
        embedding_dim = time_embedding_dim or 4 * block_out_channels[0]
        block = block_maker(
            size,
            block_out_channels,
            attention_resolutions,
            embedding_dim=embedding_dim,
            dims=dims,
            head_dim=attention_head_dim,
            dropout=dropout,
        )
        self.time_embedding = TimestepEmbedding(embedding_dim, block_out_channels[0])
        self.conv_in = convolution(in_channels, block_out_channels[0], dims)
        self.encoder, channels = make_encoder(block, block_out_channels, layers_per_block, dims)
        num_positions = prod(size) // downsampling_factor(block_out_channels) ** dims
        self.middle = block(channels[-1], channels[-1], len(block_out_channels) - 1, True)
        self.pool = AttentionPool(channels[-1], num_positions, attention_head_dim)
        self.out = nn.Linear(channels[-1], num_classes)
        self.initialize_weights()

    def initialize_weights(self):
        """Makes each residual branch and the logits start at zero: at first all labels are as likely."""
        zero_residual_branches(self, UNetBlock)
        zero_(self.out)

    def forward(
        self, sample: Tensor, timestep: Tensor | float | int, return_dict: bool = True
    ) -> NoisyClassifierOutput | tuple[Tensor]:
        """Predicts the labels of noisy samples.

        Args:
            sample: x_t, shape `(batch, in_channels, *sample_size)`.
            timestep: One number for all samples, or one for each, shape `(batch,)`.
            return_dict: `False` returns a tuple.

        Returns:
            Logits, shape `(batch, num_classes)`.
        """
        expected = (self.config.in_channels, *as_size(self.config.sample_size, self.config.dims))
        if sample.shape[1:] != expected:
            raise ValueError(
                f"sample must have shape (batch, {', '.join(map(str, expected))}), got {tuple(sample.shape)}"
            )
        timesteps = timestep_of_each(timestep, sample)
        embedding = F.silu(self.time_embedding(timesteps, None, sample.dtype))
        x = stem(self.conv_in, sample)  # (batch, channels, height, width)
        for module in (*self.encoder.values(), self.middle):
            x = run_module(self, module, x, embedding, None, None)
        logits = self.out(self.pool(x))

        return NoisyClassifierOutput(logits=logits) if return_dict else (logits,)
