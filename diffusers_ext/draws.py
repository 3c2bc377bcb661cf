"""Random numbers: generators, their seeds, and normal draws."""

from collections.abc import Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor


# PyTorch's generator on CPUs keeps 32 bits of a seed, and NumPy's takes no more.
LARGEST_SEED = 2**32 - 1


def check_seed(seed: int, largest: int = LARGEST_SEED) -> None:
    """Refuses a seed that generators would truncate to another one.

    Raises:
        ValueError: if it is not in [0, largest].
    """
    if not 0 <= seed <= largest:
        raise ValueError(f"seed must be in [0, {largest}], got {seed}")


def as_generators(generator: Generator | Sequence[Generator] | None, count: int) -> Generator | list[Generator] | None:
    """Checks generators: one for a batch of `count` samples, or a list of one for each sample.

    Raises:
        TypeError: for anything but generators, such as a seed.
        ValueError: for a list of another length.
    """
    if generator is None or isinstance(generator, Generator):
        return generator
    if not isinstance(generator, list | tuple):
        hint = ""
        if isinstance(generator, int) and not isinstance(generator, bool):
            hint = f"; for a seed give torch.Generator().manual_seed({generator})"
        raise TypeError(
            f"generator must be a torch.Generator or a list with one for each sample, got {generator!r}{hint}"
        )
    for each in generator:
        if not isinstance(each, Generator):
            raise TypeError(f"generator must be a list of torch.Generator, got {each!r} in it")
    if len(generator) != count:
        raise ValueError(f"generator must be one or one for each of {count} samples, got {len(generator)}")
    return list(generator)


def draw_normal(
    shape: Sequence[int],
    generator: Generator | Sequence[Generator] | None,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Standard normal numbers `(batch, ...)`; with a list, those of sample i are from generator i alone.

    A single generator is drawn from once for all of the batch, as in diffusers.

    Raises:
        TypeError, ValueError: of `as_generators`.
    """
    generator = as_generators(generator, shape[0])
    return randn_tensor(tuple(shape), generator=generator, device=device, dtype=dtype)
