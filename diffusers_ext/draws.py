"""Random numbers: generators, their seeds, and normal draws."""

import random
from collections.abc import Sequence

import numpy as np
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


def between_draws(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Noise on the arc from one normal draw to another, of about their norm (DDIM, arXiv 2010.02502, Eq. 67).

    Args:
        first, second: Of one shape; the angle is between them as a whole.
        share: In [0, 1]; 0 is the first, 1 the second.
    """
    cosine = torch.cosine_similarity(first.flatten(), second.flatten(), dim=0).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if torch.sin(angle) < 1e-6:  # one direction: the arc is a line
        return torch.lerp(first, second, share)
    return (torch.sin((1 - share) * angle) * first + torch.sin(share * angle) * second) / torch.sin(angle)


class PositionRandom:
    """Random numbers that depend on (seed, stream, position) only, by the counter of Philox (Salmon et al. 2011)."""

    def __init__(self, seed: int):
        self._philox = np.random.Philox(key=seed)
        self._state = self._philox.state
        self._generator = np.random.Generator(self._philox)

    def at(self, stream: int, position: int, part: int = 0) -> np.random.Generator:
        """The generator at the start of a position's numbers. It is one object: use it up before the next call.

        Args:
            position, part: Two numbers, where one does not say which it is.
        """
        # The lowest word counts the blocks of numbers drawn; the state is set since a new generator takes 6 times as long.
        self._state["state"]["counter"][:] = 0, position, part, stream
        self._philox.state = self._state
        return self._generator


def derived_seed(*parts: int) -> int:
    """A 32-bit seed that depends on every bit of the parts; of a longer one torch's CPU generator drops the rest."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def seed_generators(seed: int, device: torch.device) -> None:
    """Seeds the default generators: Python's, NumPy's, and torch's for the CPU and for one device.

    As accelerate's `set_seed`; but where there is no GPU, `torch.manual_seed` notes the seed and the stack for each kind
    of them that may appear later, which takes nearly all of its time.

    Args:
        seed: Of 32 bits.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
