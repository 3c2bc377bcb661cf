"""Which timesteps a sampler visits, noisiest first.

"leading", "trailing" and "linspace" are those of Lin et al. 2023 (Common Diffusion Noise Schedules and Sample Steps
are Flawed, arXiv 2305.08891, Table 2) with the rounding of diffusers, so that seeds keep their images; "quadratic" is
the choice of DDIM (arXiv 2010.02502, Appendix D.2) for CIFAR-10.
"""

from collections.abc import Sequence

import numpy as np


TIMESTEP_SPACINGS = ("leading", "trailing", "linspace", "quadratic")


def make_timesteps(
    spacing: str, num_inference_steps: int, num_train_timesteps: int, steps_offset: int = 0
) -> np.ndarray:
    """A list of `num_inference_steps` timesteps, strictly descending, each in [0, num_train_timesteps).

    Args:
        spacing: One of `TIMESTEP_SPACINGS`.
            "leading" counts up from `steps_offset` in steps of `num_train_timesteps // num_inference_steps`, and so
            starts far from the end of the path where the division leaves much over.
            "trailing" counts down from the last timestep in even steps.
            "linspace" takes both ends (of one step, the clean one).
            "quadratic" takes both ends with steps that grow with the noise, no two timesteps the same.
        steps_offset: Added to "leading" timesteps as far as they stay below `num_train_timesteps`; the others have
            no use for it.

    Returns: int64, shape `(num_inference_steps,)`.

    Raises:
        ValueError: If `num_inference_steps` is out of range or `spacing` unknown.
    """
    n, T = num_inference_steps, num_train_timesteps
    check_number_of_steps(n, T)
    match spacing:
        case "leading":
            steps = np.arange(n) * (T // n)
            ascending = steps + min(steps_offset, T - 1 - steps[-1])
        case "trailing":
            # The sums of floats that `arange` makes may reach one element too far: cut it.
            ascending = np.round(np.arange(T, 0, -T / n)[:n])[::-1] - 1
        case "linspace":
            ascending = np.linspace(0, T - 1, n).round()
        case "quadratic":
            index = np.arange(n)
            ascending = np.maximum(((T - 1) * (index / max(n - 1, 1)) ** 2).round(), index) if n > 1 else index + T - 1
        case _:
            raise ValueError(f"timestep_spacing must be one of {', '.join(TIMESTEP_SPACINGS)}, got {spacing!r}")
    return np.ascontiguousarray(ascending[::-1].astype(np.int64))


def check_number_of_steps(num_inference_steps: int, num_train_timesteps: int) -> None:
    """Refuses a number of steps that a path does not have.

    Raises:
        ValueError: If it is not an integer in [1, num_train_timesteps].
    """
    n, T = num_inference_steps, num_train_timesteps
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or not 1 <= n <= T:
        raise ValueError(f"num_inference_steps must be an integer in [1, {T}] (num_train_timesteps), got {n!r}")


def check_timesteps(timesteps: Sequence[int], num_train_timesteps: int, first: int = 0) -> np.ndarray:
    """`timesteps` as an int64 array, if they are a list that a sampler can visit.

    Args:
        first: The least there is.

    Raises:
        ValueError: If they are empty, not integers, not strictly descending or outside [first, first + num_train_timesteps).
    """
    values = np.asarray(timesteps)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"timesteps must be a list of at least one integer, got {timesteps!r}")
    if values.dtype.kind not in "iuf" or (values != np.floor(values)).any():
        raise ValueError(f"timesteps must be integers, got {timesteps!r}")
    values = values.astype(np.int64)
    last = first + num_train_timesteps - 1
    if values.min() < first or values.max() > last:
        worst = values.min() if values.min() < first else values.max()
        raise ValueError(f"timesteps must be in [{first}, {last}], got {worst}")
    rising = np.flatnonzero(np.diff(values) >= 0)
    if len(rising):
        first, second = values[rising[0]], values[rising[0] + 1]
        raise ValueError(f"timesteps must be in descending order, got {first} before {second}")
    return values
