"""U-Nets of OpenAI's guided-diffusion and improved-diffusion (Dhariwal & Nichol 2021; Nichol & Dhariwal 2021) as diffusers'.

`UNetModel` of this package has other groups of its normalisation and no bias before them, so that it cannot hold these
weights; diffusers' `UNet2DModel` can, where heads of attention have one size throughout. Layers by their names:

    there                              in UNet2DModel
    time_embed.0, .2                   time_embedding.linear_1, .linear_2
    label_emb                          class_embedding
    input_blocks.0.0                   conv_in
    input_blocks.I.0, .1               down_blocks.LEVEL.resnets.R, .attentions.R, or .downsamplers.0
    middle_block.0, .1, .2             mid_block.resnets.0, .attentions.0, .resnets.1
    output_blocks.I.0, .1, last        up_blocks.LEVEL.resnets.R, .attentions.R, .upsamplers.0
    out.0, .2                          conv_norm_out, conv_out

A state says how many levels there are, where they attend, and whether changes of resolution are residual blocks. It does
not say the size of the images, the heads, nor the order of queries, keys and values.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from diffusers import UNet2DModel
from torch import Tensor

from diffusers_ext.conversion.files import load_all
from diffusers_ext.diffusion.betas import make_betas
from diffusers_ext.schedulers import ExtDDIMScheduler


NORM_GROUPS = 32
NOISE_SCHEDULES = ("linear", "cosine")
LINEAR_BETAS = (1e-4, 0.02)  # of a chain of 1000 steps; those of another length are scaled
REFERENCE_TIMESTEPS = 1000

OF_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


@dataclass(frozen=True)
class Layout:
    """The structure of a U-Net, as its state dict says it.

    Raises:
        ValueError: if it is none of these, or none that `UNet2DModel` can have.
    """

    state: Mapping[str, Tensor]

    def __post_init__(self):
        for name in ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.1.qkv.weight", "out.2.weight"):
            if name not in self.state:
                raise ValueError(
                    f"the checkpoint must be the state of a U-Net of guided-diffusion or improved-diffusion, which has {name}; "
                    f"it begins with {', '.join(list(self.state)[:3]) or 'nothing'}"
                )
        if self.state["input_blocks.0.0.weight"].ndim != 4:
            raise ValueError("the checkpoint must be of images, got one of data of another number of dimensions")
        blocks = self.num_blocks
        if blocks % (self.num_res_blocks + 1) or self._count("input_blocks") != blocks:
            raise ValueError(
                f"the checkpoint must have as many input_blocks as output_blocks, and {self.num_res_blocks + 1} of them at "
                f"each resolution, got {self._count('input_blocks')} and {blocks} (conv_resample=False is not converted)"
            )
        first = self.state["input_blocks.0.0.weight"].shape[0]
        if self.widths[0] != first:
            raise ValueError(f"channel_mult must begin with 1, as UNet2DModel's does, got {self.widths[0] / first:g}")
        if any(width % NORM_GROUPS for width in self.widths):
            raise ValueError(f"the widths must be multiples of {NORM_GROUPS}, got {', '.join(map(str, self.widths))}")

    def _count(self, part: str) -> int:
        return 1 + max(int(name.split(".")[1]) for name in self.state if name.startswith(f"{part}."))

    def _has(self, name: str) -> bool:
        return f"{name}.weight" in self.state

    @cached_property
    def num_blocks(self) -> int:
        """Blocks on the way up, in all."""
        return self._count("output_blocks")

    def changer_up(self, index: int) -> str | None:
        """The part of an output block that doubles the resolution, if it has one."""
        for part in (1, 2):
            name = f"output_blocks.{index}.{part}"
            if self._has(f"{name}.conv") or self._has(f"{name}.in_layers.0"):
                return name
        return None

    @cached_property
    def num_res_blocks(self) -> int:
        """At each resolution on the way down; there is one more on the way up, the last of which changes it."""
        return next((index for index in range(self.num_blocks) if self.changer_up(index)), self.num_blocks - 1)

    @cached_property
    def num_levels(self) -> int:
        return self.num_blocks // (self.num_res_blocks + 1)

    def down_block(self, level: int, index: int) -> str:
        return f"input_blocks.{1 + level * (self.num_res_blocks + 1) + index}"

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Channels at each resolution, the full one first."""
        names = [f"{self.down_block(level, 0)}.0.out_layers.3.weight" for level in range(self.num_levels)]
        if missing := [name for name in names if name not in self.state]:
            raise ValueError(f"the checkpoint must have a residual block at each resolution, and has no {missing[0]}")
        return tuple(self.state[name].shape[0] for name in names)

    def attends(self, level: int) -> bool:
        return self._has(f"{self.down_block(level, 0)}.1.qkv")

    @cached_property
    def changes_by_resnets(self) -> bool:
        """Whether changes of resolution are residual blocks (resblock_updown)."""
        return self.num_levels > 1 and self._has(f"{self.down_block(0, self.num_res_blocks)}.0.in_layers.0")

    @cached_property
    def scales_and_shifts(self) -> bool:
        """Whether the embedding is a scale and a shift (use_scale_shift_norm), and not added."""
        return self.state["middle_block.0.emb_layers.1.weight"].shape[0] == 2 * self.widths[-1]

    def head_dim(self, num_heads: int | None, num_head_channels: int | None) -> int | None:
        """Channels of an attention head, one number for all levels; `None` for one head of all channels.

        Raises:
            ValueError: if there is none.
        """
        if (num_heads is None) == (num_head_channels is None):
            raise ValueError(
                "exactly one of num_heads and num_head_channels must be given, as the model was made, got "
                f"{num_heads} and {num_head_channels}"
            )
        if num_heads == 1:
            return None
        widths = {self.widths[level] for level in range(self.num_levels) if self.attends(level)} | {self.widths[-1]}
        if num_head_channels is None and len(widths) > 1:
            raise ValueError(
                f"num_heads {num_heads} at levels of {', '.join(map(str, sorted(widths)))} channels makes heads of several sizes, "
                "and UNet2DModel has one: such a model cannot be converted"
            )
        dim = num_head_channels or max(widths) // num_heads
        if any(width % dim for width in widths):
            raise ValueError(
                f"heads of {dim} channels must divide the widths, got {', '.join(map(str, sorted(widths)))}"
            )
        return dim


def convert_unet(
    state: Mapping[str, Tensor],
    image_size: int,
    *,
    num_heads: int | None = None,
    num_head_channels: int | None = None,
    use_new_attention_order: bool = False,
) -> UNet2DModel:
    """The network of a checkpoint, in evaluation mode; options by the names that they have there.

    Args:
        state: Its weights, or their EMA.
        image_size: Side of the images.
        num_heads, num_head_channels: Of attention; one of them.
        use_new_attention_order: Whether queries, keys and values are split before heads are.

    Raises:
        ValueError: if it is no such checkpoint, or `UNet2DModel` cannot be that network.
    """
    layout = Layout(state)
    head_dim = layout.head_dim(num_heads, num_head_channels)
    if image_size % 2 ** (layout.num_levels - 1):
        raise ValueError(f"image_size must be a multiple of {2 ** (layout.num_levels - 1)}, got {image_size}")
    down = ["Attn" if layout.attends(level) else "" for level in range(layout.num_levels)]
    plain = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
        if layout.changes_by_resnets
        else ("DownBlock2D", "UpBlock2D")
    )
    kind = "resnet" if layout.changes_by_resnets else "conv"
    labels = state.get("label_emb.weight")
    network = UNet2DModel(
        sample_size=image_size,
        in_channels=state["input_blocks.0.0.weight"].shape[1],
        out_channels=state["out.2.weight"].shape[0],
        block_out_channels=layout.widths,
        layers_per_block=layout.num_res_blocks,
        down_block_types=tuple("AttnDownBlock2D" if attends else plain[0] for attends in down),
        up_block_types=tuple("AttnUpBlock2D" if attends else plain[1] for attends in reversed(down)),
        downsample_type=kind,
        upsample_type=kind,
        attention_head_dim=head_dim,
        norm_num_groups=NORM_GROUPS,
        attn_norm_num_groups=NORM_GROUPS,
        resnet_time_scale_shift="scale_shift" if layout.scales_and_shifts else "default",
        num_class_embeds=None if labels is None else len(labels),
    )
    weights = {
        name: value.float()
        for old, value in state.items()
        for name, value in _renamed(layout, old, value, head_dim, use_new_attention_order).items()
    }
    load_all(network, weights, "UNet2DModel")
    return network.eval()


def _renamed(layout: Layout, name: str, value: Tensor, head_dim: int | None, split_first: bool) -> dict[str, Tensor]:
    """A tensor under its name in `UNet2DModel`; that of queries, keys and values as three."""
    whole = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb": "class_embedding",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    layer, _, kind = name.rpartition(".")
    if layer in whole:
        return {f"{whole[layer]}.{kind}": value}
    match = re.fullmatch(r"(input_blocks\.\d+|middle_block|output_blocks\.\d+)\.(\d+)\.(.+)", layer)
    if match is None:
        raise ValueError(f"the checkpoint has a layer {layer}, which no U-Net of guided-diffusion has")
    block, part, inner = match[1], int(match[2]), match[3]
    place = _place(layout, block, part)
    if inner in OF_RESNET:
        return {f"{place}.{OF_RESNET[inner]}.{kind}": value}
    match inner:
        case "op" | "conv":
            return {f"{place}.conv.{kind}": value}
        case "norm":
            return {f"{place}.group_norm.{kind}": value}
        case "proj_out":
            return {f"{place}.to_out.0.{kind}": value.flatten(1) if kind == "weight" else value}
        case "qkv":
            return {
                f"{place}.to_{letter}.{kind}": each for letter, each in _split(value, head_dim, split_first).items()
            }
    raise ValueError(f"the checkpoint has a layer {layer}, which no U-Net of guided-diffusion has")


def _split(qkv: Tensor, head_dim: int | None, split_first: bool) -> dict[str, Tensor]:
    """Weights or biases of queries, keys and values, `(3 * channels, ...)`, by the letter of each."""
    rows = qkv.flatten(1) if qkv.ndim > 1 else qkv
    if split_first or head_dim is None:
        return dict(zip("qkv", rows.chunk(3), strict=True))
    by_head = rows.unflatten(0, (-1, 3, head_dim))  # head by head, its queries, then its keys, then its values
    return {letter: by_head[:, index].flatten(0, 1) for index, letter in enumerate("qkv")}


def _place(layout: Layout, block: str, part: int) -> str:
    """Where a part of a block is in `UNet2DModel`."""
    per_level = layout.num_res_blocks + 1
    if block == "middle_block":
        return "mid_block.attentions.0" if part == 1 else f"mid_block.resnets.{part // 2}"
    index = int(block.rpartition(".")[2])
    if block.startswith("input"):
        level, position = divmod(index - 1, per_level)
        if position == layout.num_res_blocks:
            return f"down_blocks.{level}.downsamplers.0"
        return f"down_blocks.{level}.{'attentions' if part else 'resnets'}.{position}"
    level, position = divmod(index, per_level)
    if f"{block}.{part}" == layout.changer_up(index):
        return f"up_blocks.{level}.upsamplers.0"
    return f"up_blocks.{level}.{'attentions' if part else 'resnets'}.{position}"


def make_scheduler(
    network: UNet2DModel,
    noise_schedule: str = "linear",
    diffusion_steps: int = 1000,
    predict_xstart: bool = False,
    rescale_timesteps: bool | None = None,
) -> ExtDDIMScheduler:
    """The path that a converted network was trained on; options by the names that they have there.

    Args:
        network: With twice the channels if it learned its variance.
        noise_schedule: One of `NOISE_SCHEDULES`.
        diffusion_steps: Timesteps of the path.
        predict_xstart: Whether the network predicts x_0, and not the noise.
        rescale_timesteps: Whether the network was given timesteps of 1000 whatever `diffusion_steps` is, by default in
            improved-diffusion and not in guided-diffusion. The scheduler then visits those levels alone whose timesteps of 1000
            are whole numbers, a chain of 1000 steps. It must be given where `diffusion_steps` is another number.

    Raises:
        ValueError: for a schedule that there is not, and where it is not said, or cannot be, which timesteps the network knows.
    """
    if noise_schedule not in NOISE_SCHEDULES:
        raise ValueError(f"noise_schedule must be one of {', '.join(NOISE_SCHEDULES)}, got {noise_schedule!r}")
    options = {"beta_schedule": "squaredcos_cap_v2"}
    if noise_schedule == "linear":
        start, end = (beta * REFERENCE_TIMESTEPS / diffusion_steps for beta in LINEAR_BETAS)
        options = {"beta_schedule": "linear", "beta_start": start, "beta_end": end}
    if diffusion_steps != REFERENCE_TIMESTEPS and rescale_timesteps is None:
        raise ValueError(
            f"rescale_timesteps must be given for {diffusion_steps} diffusion_steps: whether the network was given timesteps of "
            f"{REFERENCE_TIMESTEPS}, which improved-diffusion does by default and guided-diffusion does not"
        )
    if diffusion_steps != REFERENCE_TIMESTEPS and rescale_timesteps:
        options = {"trained_betas": _betas_between_whole_timesteps(diffusion_steps, **options)}
        diffusion_steps = REFERENCE_TIMESTEPS
    scheduler = ExtDDIMScheduler(
        num_train_timesteps=diffusion_steps,
        prediction_type="sample" if predict_xstart else "epsilon",
        timestep_spacing="trailing",
        **options,
    )
    if network.config.out_channels == 2 * network.config.in_channels:
        scheduler.register_to_config(variance_type="learned_range")
    return scheduler


def _betas_between_whole_timesteps(diffusion_steps: int, beta_schedule: str, **ends: float) -> list[float]:
    """Betas of the chain of those levels whose timestep, times 1000 / diffusion_steps, is a whole number."""
    every, rest = divmod(diffusion_steps, REFERENCE_TIMESTEPS)
    if rest:
        raise ValueError(
            f"diffusion_steps must be a multiple of {REFERENCE_TIMESTEPS} where timesteps are rescaled to as many, got "
            f"{diffusion_steps}: there are no whole timesteps that the network knows"
        )
    alpha_bar = (1 - make_betas(beta_schedule, diffusion_steps, **ends)).cumprod(0)[::every]
    return [1 - alpha_bar[0].item(), *(1 - alpha_bar[1:] / alpha_bar[:-1]).tolist()]


def tensors_of(checkpoint: Mapping, file: str) -> dict[str, Tensor]:
    """The state dict of a network, which is all that a file of these projects holds.

    Raises:
        ValueError: if there is anything else in it.
    """
    if not (checkpoint and all(isinstance(value, Tensor) for value in checkpoint.values())):
        kinds = ", ".join(map(str, list(checkpoint)[:5])) or "nothing"
        raise ValueError(f"{file} must hold tensors by name, the state dict of a network, got {kinds}")
    return dict(checkpoint)
