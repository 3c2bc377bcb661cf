"""A transformer over patches that predicts noise, clean samples or velocities (Peebles & Xie 2022, "DiT")."""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from diffusers_ext.models.caching import CachedBlocksMixin
from diffusers_ext.models.dit_blocks import DiTBlock, modulated_norm
from diffusers_ext.models.dit_checks import PATCH_SIZES, check_inputs, check_options, check_size
from diffusers_ext.models.dit_parts import (
    ConvPatchEmbedding,
    FirstValues,
    Mlp,
    Norm,
    PatchEmbedding,
    PositionEmbedding,
    init_skip_,
    num_long_skips,
    patch_layer,
    rotary_table,
)
from diffusers_ext.models.embeddings import (
    TimestepEmbedding,
    augmentation_layer,
    embed_augmentation,
    pooled_dim,
    timestep_of_each,
)
from diffusers_ext.models.embeddings import position_embedding as sincos_embedding
from diffusers_ext.models.image_condition import (
    check_condition_image,
    concatenate_condition,
    embed_level,
    input_channels,
)
from diffusers_ext.models.layers import (
    attention_bias,
    zero_,
)
from diffusers_ext.models.network import Network
from diffusers_ext.models.parallel import SpreadTokensMixin
from diffusers_ext.sizes import as_size


# Widths and depths of the paper (Table 1). The names end with the patch size: DiT-S/2, DiT-XL/4.
DIT_CONFIGS = {
    "DiT-S": {"hidden_size": 384, "num_layers": 12, "num_attention_heads": 6},
    "DiT-B": {"hidden_size": 768, "num_layers": 12, "num_attention_heads": 12},
    "DiT-L": {"hidden_size": 1024, "num_layers": 24, "num_attention_heads": 16},
    "DiT-XL": {"hidden_size": 1152, "num_layers": 28, "num_attention_heads": 16},
}

FREQUENCIES = 256  # width of the sinusoidal embedding of timesteps, as in the paper's code


def dit_config(name: str) -> dict[str, int]:
    """The options of `DiTModel` for a name of the paper, such as "DiT-S/2".

    Raises:
        ValueError: for a name that is none.
    """
    match = re.fullmatch(r"(DiT-\w+)/(\d+)", name)
    if match is None or match[1] not in DIT_CONFIGS or int(match[2]) not in PATCH_SIZES:
        raise ValueError(
            f"the name must be one of {', '.join(DIT_CONFIGS)}, a slash and a patch size in [{PATCH_SIZES[0]}, "
            f"{PATCH_SIZES[-1]}], such as DiT-S/2, got {name!r}"
        )
    return DIT_CONFIGS[match[1]] | {"patch_size": int(match[2])}


@dataclass
class DiTOutput(BaseOutput):
    """`sample` is the network's output, shape `(batch, out_channels, height, width)`.

    `internal_sample`, of the same shape, is that of the head on a middle layer, if the network has one.
    """

    sample: Tensor
    internal_sample: Tensor | None = None


class DiTModel(SpreadTokensMixin, CachedBlocksMixin, Network):
    """A diffusion transformer: patches as tokens, with labels or a text as condition.

    Works as `transformer` of diffusers' `DiTPipeline`, as `denoiser` of `GuidedDiffusionPipeline`, and is converted from
    and to diffusers' `DiTTransformer2DModel` by `from_diffusers` and `to_diffusers`.

    Args:
        sample_size: Side of the square samples, or `(height, width)`; a multiple of `patch_size`. Other sizes that are
            such multiples can be given to `forward`: positions are then scaled to the grid of this one.
        patch_size: Side of the square patches, in [1, 8]. Half the side makes four times the tokens.
        in_channels: Channels of the noisy sample.
        out_channels: Channels of the output; `None` for `in_channels`, twice that for a learned variance.
        hidden_size: Width of the tokens, a multiple of 4 and of `num_attention_heads`.
        num_layers: Number of blocks.
        num_attention_heads: Number of attention heads.
        mlp_ratio: Width of the feed-forward layers' hidden features, as a multiple of `hidden_size`.
        num_classes: Number of labels, or `None`. Label `num_classes` is the null label, which stands for "no label".
        cross_attention_dim: Width of `encoder_hidden_states`, which each block then attends to, or `None`.
        dropout: Share of the features dropped while training: of attention's outputs, and within feed-forward layers.
        qk_norm: Normalise queries and keys, which keeps attention's logits bounded in long runs.
        position_embedding: "sincos" adds sines and cosines of a patch's row and column to its token; "rope" turns queries and
            keys by them, so that attention depends on distances (in two axes, arXiv 2403.13298). Registers are not turned.
        norm: "layer", or "rms", which divides by the root mean square without subtracting the mean (arXiv 1910.07467).
        mlp: Feed-forward layers: "gelu", or "swiglu", gated and of two thirds of the width, so that there are as many
            parameters (arXiv 2002.05202).
        value_residual: Attention's values, but in the first block, are a learned mix of the block's own and those of the
            first (arXiv 2410.17897).
        patch_embedding: "linear", or "conv": strided convolutions, for a `patch_size` of 1, 2, 4 or 8 (arXiv 2106.14881).
        internal_guidance_layer: Predict also from the tokens after this number of blocks, in [1, num_layers - 1], by an output
            layer of its own, for `InternalGuidance` (arXiv 2512.24176); `None` for no such output. It is trained along.
        long_skips: Join the output of each of the first blocks to the input of its mirror image among the last (U-ViT, arXiv
            2209.12152).
        num_registers: Learned tokens that the others can attend to and that are dropped at the end (Darcet et al. 2023).
        mlp_norm_eps: Added to the variance by the normalisation before feed-forward layers. diffusers has 1e-5.
        embedding_per_block: Give each block an embedding of timestep and label of its own, as diffusers' has it.
        pool_context: Add the mean of the context's tokens, through a linear layer, to the embedding of the timestep, so
            that each block is conditioned on the mean of the text (as in Imagen, Saharia et al. 2022), which trains faster.
        learned_unconditional: Whether the network was trained to predict without its label or text too, as dropping them
            in a share of the batches does. If not, pipelines refuse to guide by it, and labels must be given; after
            training with such dropout, set it by `model.register_to_config(learned_unconditional=True)`.
        condition_channels: Channels of the condition image, which is concatenated to x_t; 0 for none.
        condition_level: Take the noise level in the condition image as an input too (arXiv 2106.15282).
        learned_without_image: Whether the network was trained to predict without its condition image too; if not, it must be
            given.
        augmentation_dim: Numbers that say how images of training were changed, which the network takes as an input too (Karras
            et al. 2022, Appendix F.2), so that it samples unchanged ones; 0 for none.

    Raises:
        ValueError: if the sizes or options do not fit one another.
    """

    _no_split_modules = ["DiTBlock"]
    _repeated_blocks = ["DiTBlock"]
    _hidden_parts = ("transformer_blocks",)
    _skip_layerwise_casting_patterns = [
        "patch_in",
        "norm",
        "time_embedding",
        "block_embeddings",
        "level_embedding",
        "augmentation",
    ]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 3,
        out_channels: int | None = None,
        hidden_size: int = 384,
        num_layers: int = 12,
        num_attention_heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int | None = None,
        cross_attention_dim: int | None = None,
        dropout: float = 0.0,
        qk_norm: bool = False,
        num_registers: int = 0,
        mlp_norm_eps: float = 1e-6,
        embedding_per_block: bool = False,
        pool_context: bool = False,
        learned_unconditional: bool = True,
        condition_channels: int = 0,
        condition_level: bool = False,
        learned_without_image: bool = True,
        position_embedding: PositionEmbedding = "sincos",
        norm: Norm = "layer",
        mlp: Mlp = "gelu",
        value_residual: bool = False,
        patch_embedding: PatchEmbedding = "linear",
        long_skips: bool = False,
        internal_guidance_layer: int | None = None,
        augmentation_dim: int = 0,
    ):
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.register_to_config(out_channels=out_channels)  # a number, since pipelines read it
        check_options(self.config)
        size = as_size(sample_size)
        check_size(size, patch_size)

        self.grid = (size[0] // patch_size, size[1] // patch_size)
        seen_channels = in_channels + input_channels(condition_channels)
        self.patch_in = patch_layer(patch_embedding, seen_channels, hidden_size, patch_size)
        self.register_buffer("positions", self._make_positions(self.grid), persistent=False)
        self.registers = nn.Parameter(torch.zeros(num_registers, hidden_size)) if num_registers else None

        pooled = pooled_dim(pool_context, cross_attention_dim)

        def embedding() -> TimestepEmbedding:
            return TimestepEmbedding(hidden_size, FREQUENCIES, num_classes, endpoint=True, pooled_dim=pooled)

        self.time_embedding = embedding()
        self.level_embedding = TimestepEmbedding(hidden_size, FREQUENCIES, endpoint=True) if condition_level else None
        self.num_skips = num_long_skips(num_layers) if long_skips else 0
        self.augmentation_embedding = augmentation_layer(augmentation_dim, hidden_size)
        # The first block, and the output, have the one above.
        self.block_embeddings = nn.ModuleList(embedding() for _ in range((num_layers - 1) * embedding_per_block))
        self.transformer_blocks = nn.ModuleList(
            DiTBlock(
                hidden_size,
                num_attention_heads,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                qk_norm=qk_norm,
                context_dim=cross_attention_dim,
                mlp_norm_eps=mlp_norm_eps,
                norm=norm,
                mlp=mlp,
                mixes_values=value_residual and i > 0,
                takes_skip=num_layers - i <= self.num_skips,
            )
            for i in range(num_layers)
        )
        self.modulation_out = nn.Linear(hidden_size, 2 * hidden_size)
        self.patch_out = nn.Linear(hidden_size, patch_size**2 * out_channels)
        has_internal = internal_guidance_layer is not None
        self.internal_modulation_out = nn.Linear(hidden_size, 2 * hidden_size) if has_internal else None
        self.internal_patch_out = nn.Linear(hidden_size, patch_size**2 * out_channels) if has_internal else None
        self.initialize_weights()

    @classmethod
    def from_name(cls, name: str, **kwargs) -> "DiTModel":
        """A new model of one of the paper's sizes, such as "DiT-S/2"; `kwargs` are the other options."""
        return cls(**dit_config(name) | kwargs)

    @classmethod
    def from_diffusers(cls, model: ModelMixin) -> "DiTModel":
        """The same network as a `DiTTransformer2DModel` of diffusers; see `diffusers_ext.models.dit_conversion`."""
        from diffusers_ext.models.dit_conversion import from_diffusers

        return from_diffusers(cls, model)

    def to_diffusers(self) -> ModelMixin:
        """The same network as a `DiTTransformer2DModel` of diffusers; see `diffusers_ext.models.dit_conversion`."""
        from diffusers_ext.models.dit_conversion import to_diffusers

        return to_diffusers(self)

    def remove_internal_output(self) -> None:
        """Takes away the output of the middle layer, and leaves all else as it is."""
        self.internal_modulation_out = self.internal_patch_out = None
        self.register_to_config(internal_guidance_layer=None)

    def initialize_weights(self):
        """As in the paper's code: each residual branch and the output start at zero, so that a block is the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        level = [] if self.level_embedding is None else [self.level_embedding]
        for embedding in (self.time_embedding, *self.block_embeddings, *level):
            for layer in (embedding.linear_1, embedding.linear_2, embedding.class_embedding):
                if layer is not None:
                    nn.init.normal_(layer.weight, std=0.02)
        if self.registers is not None:
            nn.init.normal_(self.registers, std=0.02)
        if isinstance(self.patch_in, ConvPatchEmbedding):
            for conv in self.patch_in.convs:
                nn.init.kaiming_normal_(conv.weight)
                nn.init.zeros_(conv.bias)
        zero = [self.modulation_out, self.patch_out]
        if self.internal_patch_out is not None:
            zero += [self.internal_modulation_out, self.internal_patch_out]
        for block in self.transformer_blocks:
            zero += [block.modulation] if block.cross_attn is None else [block.modulation, block.cross_attn.to_out]
            if block.skip_in is not None:
                init_skip_(block.skip_in)
        for layer in zero:
            zero_(layer)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        condition_image: Tensor | None = None,
        condition_given: Tensor | None = None,
        condition_level: Tensor | None = None,
        augmentation: Tensor | None = None,
        return_dict: bool = True,
    ) -> DiTOutput | tuple[Tensor]:
        """Predicts from a noisy sample what the network was trained for.

        Args:
            sample: x_t, shape `(batch, in_channels, height, width)`.
            timestep: One number for all samples, or one for each, shape `(batch,)`.
            class_labels: Integers in `[0, num_classes]`, shape `(batch,)`; `None` stands for the null label, and so does
                1000 in a model of fewer labels, which is the null label of diffusers' `DiTPipeline`. Or sets, multi-hot,
                shape `(batch, num_classes)`.
            encoder_hidden_states: Context, shape `(batch, tokens, cross_attention_dim)`.
            encoder_attention_mask: 1 or True at the tokens of the context to attend to, shape `(batch, tokens)`.
            condition_image: In [-1, 1], shape `(batch, condition_channels, height, width)`; `None` for none.
            condition_given: Which samples have a condition image, shape `(batch,)`; by default all, if it is given.
            condition_level: Standard deviation of the noise in the condition image, in [0, 1], shape `(batch,)`; 0 by default.
            augmentation: What was done to the images of training, shape `(batch, augmentation_dim)`; `None` for nothing.
            return_dict: `False` returns a tuple of `sample` alone.

        Returns:
            Output of shape `(batch, out_channels, height, width)`, and that of the middle layer if the network has one.
        """
        class_labels = check_inputs(self.config, sample, class_labels, encoder_hidden_states)
        check_condition_image(self.config, sample, condition_image, condition_given, condition_level)
        patch = self.config.patch_size
        grid = (sample.shape[2] // patch, sample.shape[3] // patch)
        timesteps = timestep_of_each(timestep, sample)
        level = embed_level(self.level_embedding, condition_level, condition_given, sample)
        level = level + embed_augmentation(self.augmentation_embedding, augmentation, sample)
        embeddings = [
            F.silu(embed(timesteps, class_labels, sample.dtype, encoder_hidden_states, encoder_attention_mask) + level)
            for embed in (self.time_embedding, *self.block_embeddings)
        ]
        mask = attention_bias(encoder_attention_mask, sample.dtype)

        x = concatenate_condition(sample, self.config.condition_channels, condition_image, condition_given)
        if self.config.patch_embedding == "linear":
            x = F.pixel_unshuffle(x, patch).flatten(2).transpose(1, 2)  # (batch, patches, channels * patch ** 2)
        x = self.patch_in(x)  # (batch, patches, hidden_size)
        positions, rotation = self._positions(grid), None
        if self.config.position_embedding == "rope":
            rotation = positions
        else:
            x = x + positions.to(x.dtype)
        first_values = FirstValues() if self.config.value_residual else None
        if self.registers is not None:  # last, since smoothed energy guidance takes the first tokens for the image
            x = torch.cat([x, self.registers.to(x.dtype).expand(len(x), -1, -1)], dim=1)
        self._check_tokens(x.shape[1])
        skips: list[Tensor] = []
        internal = None
        for i, block in enumerate(self.transformer_blocks):
            embedding = embeddings[i if self.block_embeddings else 0]
            skip = None if block.skip_in is None else skips.pop()
            x = self.run(block, x, embedding, encoder_hidden_states, mask, skip, rotation, first_values)
            if i < self.num_skips:
                skips.append(x)
            if i + 1 == self.config.internal_guidance_layer and return_dict:
                internal = self._predict(x, embeddings[0], grid, self.internal_modulation_out, self.internal_patch_out)
        x = self._predict(x, embeddings[0], grid, self.modulation_out, self.patch_out)
        return DiTOutput(sample=x, internal_sample=internal) if return_dict else (x,)

    def _predict(
        self, x: Tensor, embedding: Tensor, grid: tuple[int, int], modulation: nn.Linear, patch_out: nn.Linear
    ) -> Tensor:
        """Tokens `(batch, tokens, hidden_size)` to an output, by the two layers of a head."""
        patch = self.config.patch_size
        shift, scale = modulation(embedding).chunk(2, dim=-1)
        x = patch_out(modulated_norm(x, scale, shift, 1e-6, self.config.norm))
        # Without the registers, and here, where context parallelism has gathered the tokens.
        x = x[:, : grid[0] * grid[1]]
        x = x.unflatten(1, grid).unflatten(3, (patch, patch, -1))  # (batch, rows, columns, patch, patch, channels)
        x = x.permute(0, 5, 1, 3, 2, 4)
        # A copy, since FSDP warns of a view, which one channel of single pixels would be: (batch, out_channels, height, width).
        image = x.reshape(*x.shape[:2], grid[0] * patch, grid[1] * patch)
        return image.clone() if x.is_contiguous() else image

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        if grid == self.grid:
            return self.positions
        return self._make_positions(grid, self.positions.device)

    def _make_positions(self, grid: tuple[int, int], device=None) -> Tensor:
        """What is added to the tokens, or by which queries and keys are turned."""
        config = self.config
        if config.position_embedding == "rope":
            head_dim = config.hidden_size // config.num_attention_heads
            return rotary_table(grid, self.grid, head_dim, config.num_registers, device)
        return sincos_embedding(grid, self.grid, config.hidden_size, device)
