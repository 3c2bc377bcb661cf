"""The options of a denoiser, and the network that they make."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from diffusers_ext.models.dit import PATCH_SIZES, DiTModel, dit_config
from diffusers_ext.models.dit_parts import PARTS_OF_DIT, Mlp, Norm, PatchEmbedding, PositionEmbedding
from diffusers_ext.models.layers import num_heads
from diffusers_ext.models.unet import UNetModel, refuse_unmatched_resolutions
from diffusers_ext.options import fixed_option
from diffusers_ext.sizes import as_size, downsampling_factor
from diffusers_ext.trainer.config import TrainerConfig


NETWORKS = ("unet", "dit")

# The DiT that is made without options: small images, or latents, on a CPU.
DEFAULT_DIT = {"hidden_size": 256, "num_layers": 6}
MAX_PATCHES = 64  # that the patch size leaves, where it is left open
HEAD_DIM = 64  # of the attention heads, where their number is left open

unet_option = partial(fixed_option, needs={"model": ("unet",)})
dit_option = partial(fixed_option, needs={"model": ("dit",)})


@dataclass(frozen=True)
class NetworkConfig(TrainerConfig):
    """Options of a training run with a denoiser.

    Raises:
        ValueError: if options contradict one another, are out of range, or are those of another network.
    """

    model: Literal[NETWORKS] = fixed_option(
        "unet", "kind of network: convolutions, or a transformer over patches", "model"
    )
    dropout: float | None = fixed_option(
        None, "share of the features dropped in each block; by default 0, or that of pretrained_pipeline"
    )
    block_out_channels: tuple[int, ...] = unet_option(
        (64, 128, 128), "channels at each resolution, the full one first", "unet", at_least=1
    )
    layers_per_block: int = unet_option(2, "residual blocks at each resolution", at_least=1)
    attention_resolutions: tuple[int, ...] | None = unet_option(
        None, "sides of the maps with attention; by default the largest of at most 16"
    )
    attention_head_dim: int = unet_option(64, "channels of an attention head", at_least=1)
    fourier_features: tuple[int, ...] = unet_option(
        (), "exponents n of the inputs sin(2^n pi x) and cos(2^n pi x), such as 7 8, for likelihood in 8 bits"
    )
    dit_size: str | None = dit_option(
        None, "a size of the paper, such as DiT-S/2, that the options below change", "dit"
    )
    patch_size: int | None = dit_option(
        None, f"side of the patches; by default the smallest that leaves at most {MAX_PATCHES} of them"
    )
    hidden_size: int | None = dit_option(None, f"width of the tokens; by default {DEFAULT_DIT['hidden_size']}")
    num_layers: int | None = dit_option(None, f"number of blocks; by default {DEFAULT_DIT['num_layers']}")
    num_attention_heads: int | None = dit_option(
        None, f"attention heads; by default one for each {HEAD_DIM} of the width"
    )
    mlp_ratio: float = dit_option(4.0, "width of the feed-forward layers, as a multiple of hidden_size")
    qk_norm: bool = dit_option(False, "normalise queries and keys, for long runs")
    num_registers: int = dit_option(0, "learned tokens beside those of the patches")
    position_embedding: PositionEmbedding = dit_option(
        "sincos", "positions added to the tokens, or by which queries and keys are turned (rope)"
    )
    norm: Norm = dit_option("layer", "normalisation of the tokens: layer, or by the root mean square (rms)")
    mlp: Mlp = dit_option(
        "gelu", "feed-forward layers: plain, or gated (swiglu) with as many parameters, at two thirds of the width"
    )
    value_residual: bool = dit_option(False, "mix the first block's values of attention into the later blocks'")
    patch_embedding: PatchEmbedding = dit_option(
        "linear", "patches by a linear layer, or by strided convolutions (conv), for patches of 1, 2, 4 or 8"
    )
    long_skips: bool = dit_option(False, "join the output of each of the first blocks to the input of one of the last")
    internal_guidance_layer: int | None = dit_option(
        None, "train a second output after this number of blocks along, for internal guidance"
    )
    pretrained_pipeline: str | None = fixed_option(
        None,
        "begin with the network of a pipeline, a folder or a name on the Hub: one of this package, whose EMA weights are those "
        "that are saved, or a DDPM, DDIM or DiT pipeline of diffusers. Its path, prediction type, size and VAE are taken over",
        "fine-tuning",
    )

    OLDER_THAN: ClassVar[dict[str, Any]] = TrainerConfig.OLDER_THAN | {"dropout": 0.0}

    def __post_init__(self):
        super().__post_init__()
        if self.dropout is None:  # resolved here, so that a run's options say what it was
            object.__setattr__(self, "dropout", 0.0)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout:g}")
        if self.model == "dit":
            with torch.device("meta"):
                DiTModel(sample_size=self.size_multiple, **self.dit_options(self.size_multiple))  # which checks them
        for side in self.resolution or ():
            if side % self.size_multiple:
                near = side // self.size_multiple * self.size_multiple
                near = " or ".join(str(other) for other in (near, near + self.size_multiple) if other)
                raise ValueError(
                    f"resolution must be a multiple of {self.size_multiple}, since {self._why_multiple()}, got {side}: "
                    f"take {near}"
                )

    def dit_options(self, sample_size: int | tuple[int, int]) -> dict:
        """Options of `DiTModel`, with those that were left open settled, for samples of that size."""
        options = DEFAULT_DIT if self.dit_size is None else dit_config(self.dit_size)
        given = {
            name: getattr(self, name) for name in ("patch_size", "hidden_size", "num_layers", "num_attention_heads")
        }
        if self.hidden_size is not None:  # what follows from the width
            options = {name: value for name, value in options.items() if name != "num_attention_heads"}
        options = options | {name: value for name, value in given.items() if value is not None}
        options.setdefault("patch_size", _default_patch_size(sample_size))
        if "num_attention_heads" not in options:
            width = options["hidden_size"]
            options["num_attention_heads"] = num_heads(width, HEAD_DIM)
        rest = ("mlp_ratio", "qk_norm", "num_registers", "dropout", *PARTS_OF_DIT)
        return options | {name: getattr(self, name) for name in rest}

    @property
    def size_multiple(self) -> int:
        """The sides of the samples must be multiples of this."""
        if self.model == "unet":
            return downsampling_factor(self.block_out_channels)
        return self.patch_size or (1 if self.dit_size is None else dit_config(self.dit_size)["patch_size"])

    def check_sample(self, size: tuple[int, ...], resolution: tuple[int, ...]) -> None:
        """Refuses samples that the network cannot halve or cut into patches, or has not the maps of that options name.

        Args:
            size: (height, width), or (length,), of the samples: of the images, or of their latents.
            resolution: Of the images.

        Raises:
            ValueError: if a side is no multiple of `size_multiple`, or no map has a side of `attention_resolutions`.
        """
        multiple = self.size_multiple
        if any(side % multiple for side in size):
            sizes = ["x".join(map(str, sides)) for sides in (size, resolution)]
            factor = max(1, round(resolution[0] / size[0]))
            raise ValueError(
                f"the sides of the latents must be multiples of {multiple}, since {self._why_multiple()}, got {sizes[0]} from "
                f"images of {sizes[1]}: take a resolution that is a multiple of {multiple * factor}"
            )

        if self.model == "unet":
            refuse_unmatched_resolutions(size, len(self.block_out_channels), self.attention_resolutions)

    def _why_multiple(self) -> str:
        if self.model == "dit":
            return f"patch_size is {self.size_multiple}"
        return f"block_out_channels has {len(self.block_out_channels)} widths and each but the last halves the images"


def _default_patch_size(sample_size: int | tuple[int, int]) -> int:
    height, width = as_size(sample_size)
    fitting = [patch for patch in PATCH_SIZES if height % patch == width % patch == 0]
    few = [patch for patch in fitting if height * width <= MAX_PATCHES * patch**2]
    return few[0] if few else fitting[-1]


def build_network(
    config: NetworkConfig,
    *,
    sample_size: int | tuple[int, ...],
    in_channels: int,
    out_channels: int,
    num_classes: int | None,
    cross_attention_dim: int | None = None,
    pool_context: bool = False,
    learned_unconditional: bool = True,
    augmentation_dim: int = 0,
    **of_condition_image,
) -> UNetModel | DiTModel:
    """A new network with weights that follow from the seed.

    Args:
        of_condition_image: Options of the network for a condition image; without, it takes none.

    Raises:
        ValueError: if a DiT is asked for sequences.
    """
    dims = 2 if isinstance(sample_size, int) else len(sample_size)
    if config.model == "dit" and dims == 1:
        raise ValueError(
            "model dit, which a run by time takes by default, cuts images into patches, and the data are sequences: take "
            "--model unet"
        )
    torch.manual_seed(config.seed)
    common = of_condition_image | {
        "sample_size": sample_size,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "num_classes": num_classes,
        "cross_attention_dim": cross_attention_dim,
        "pool_context": pool_context,
        "augmentation_dim": augmentation_dim,
        "learned_unconditional": learned_unconditional,
    }
    if config.model == "dit":
        return DiTModel(**common, **config.dit_options(sample_size))
    return UNetModel(
        **common,
        dims=dims,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        attention_resolutions=config.attention_resolutions,
        attention_head_dim=config.attention_head_dim,
        dropout=config.dropout,
        fourier_features=config.fourier_features,
    )
