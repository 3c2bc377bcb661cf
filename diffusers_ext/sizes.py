"""Sizes of samples: one number or one for each axis, and what halving them at each resolution allows."""

from collections.abc import Mapping, Sequence
from typing import Any


def as_size(size: int | Sequence[int], dims: int = 2, name: str = "sample_size") -> tuple[int, ...]:
    """The length of each of `dims` axes; one number stands for all of them.

    Raises:
        ValueError: if there are not `dims` of them, or one is not positive; `name` is that of the size.
    """
    sides = (size,) * dims if isinstance(size, int) else tuple(size)
    if len(sides) != dims or min(sides) < 1:
        raise ValueError(f"{name} must be one positive number or one for each of {dims} axes, got {size}")
    return sides


def one_if_equal(sides: Sequence[int]) -> int | tuple[int, ...]:
    """The length of equal axes as one number, which is what pipelines of diffusers ask a config for."""
    return sides[0] if len(set(sides)) == 1 else tuple(sides)


def downsampling_factor(block_out_channels: Sequence[int]) -> int:
    """Ratio of a sample's side to that of the lowest resolution, of which each is half of the one before."""
    return 2 ** (len(block_out_channels) - 1)


def compression(config: Mapping[str, Any]) -> int:
    """Ratio of an image's side to that of its latents, by the config of an autoencoder, of this package or of diffusers."""
    widths = config.get("block_out_channels") or config.get("encoder_block_out_channels") or (0,)
    return downsampling_factor(widths)


def check_size(size: Sequence[int], block_out_channels: Sequence[int], name: str = "the sample") -> None:
    """Refuses a size that cannot be halved from each resolution to the next.

    Raises:
        ValueError: if a side is not a multiple of the factor of downsampling; `name` is that of the size.
    """
    factor = downsampling_factor(block_out_channels)
    if any(side < factor or side % factor for side in size):
        raise ValueError(
            f"each side of {name} must be a multiple of {factor}, since {len(block_out_channels)} block_out_channels "
            f"halve it {len(block_out_channels) - 1} times, got {' x '.join(map(str, size))}"
        )
