"""Where random numbers come from: generators, and the seeds that make them."""

from collections.abc import Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor


# Of 32 bits, which is what PyTorch's generator on CPUs keeps of a seed, and what NumPy's takes.
LARGEST_SEED = 2**32 - 1


def check_seed(seed: int, largest: int = LARGEST_SEED) -> None:
    """Refuses a seed that would be cut to another one.

    Raises:
        ValueError: if it is not in [0, largest].
    """
    if not 0 <= seed <= largest:
        raise ValueError(f"seed must be in [0, {largest}], got {seed}")


def as_generators(generator: Generator | Sequence[Generator] | None, count: int) -> Generator | list[Generator] | None:
    """One source of random numbers for all of so many samples, or a list of one for each.

    Raises:
        TypeError: for what is no generator, such as a seed.
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

    One generator is drawn from for the batch as a whole, as diffusers does.

    Raises:
        TypeError, ValueError: of `as_generators`.
    """
    generator = as_generators(generator, shape[0])
    return randn_tensor(tuple(shape), generator=generator, device=device, dtype=dtype)
