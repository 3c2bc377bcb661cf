"""Sizes that networks which halve their samples can take."""

from collections.abc import Sequence


def as_size(size: int | Sequence[int], dims: int, what: str = "sample_size") -> tuple[int, ...]:
    """A side for each of `dims` axes; one number means the same for all.

    Raises:
        ValueError: if there are others than `dims` of them, or one is not positive; `what` names the size.
    """
    sides = (size,) * dims if isinstance(size, int) else tuple(size)
    if len(sides) != dims or min(sides) < 1:
        raise ValueError(f"{what} must be one positive number or {dims}, for dims={dims}, got {size}")
    return sides


def check_size(size: Sequence[int], block_out_channels: Sequence[int], what: str = "the sample") -> None:
    """Refuses a size that cannot be halved once between each two of the blocks.

    Raises:
        ValueError: if a side is no multiple of 2 to the number of halvings; `what` names the size.
    """
    factor = 2 ** (len(block_out_channels) - 1)
    if any(side < factor or side % factor for side in size):
        raise ValueError(
            f"each side of {what} must be a multiple of {factor}, since {len(block_out_channels)} block_out_channels "
            f"halve it {len(block_out_channels) - 1} times, got {' x '.join(map(str, size))}"
        )
