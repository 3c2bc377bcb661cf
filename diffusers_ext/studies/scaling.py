"""Is a network's eps homogeneous in x, eps(c x, t) = c eps(x, t)?

The best eps is for Gaussian data without a mean: it is linear in x. For data that are one point p it is (x - alpha p) / sigma,
which differs from that by (c - 1) alpha p / sigma.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffusers_ext.diffusion.noising import NoiseSchedule, add_noise, output_eps


def relative_errors(
    network: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    schedule: NoiseSchedule,
    prediction_type: str,
    timesteps: Sequence[int],
    factors: Sequence[float],
    generator: torch.Generator | None = None,
) -> Tensor:
    """|eps(c x_t, t) - c eps(x_t, t)| / |c eps(x_t, t)|, root mean squares over samples and pixels.

    Args:
        network: From x_t and timesteps of shape `(batch,)` to its output.
        x0: Clean samples of the network.
        generator: Of the noise, on the CPU.

    Returns: float64, shape `(timesteps, factors)`.
    """
    errors = torch.zeros(len(timesteps), len(factors), dtype=torch.float64)
    for i, timestep in enumerate(timesteps):
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        level = schedule.level(timestep, x0)
        x_t, at = add_noise(x0, noise, level), torch.full((len(x0),), timestep, device=x0.device)

        def eps(x: Tensor, level=level, at=at) -> Tensor:
            return output_eps(network(x, at), x, level, prediction_type).double()

        once = eps(x_t)
        for j, factor in enumerate(factors):
            scaled = factor * once
            errors[i, j] = ((eps(factor * x_t) - scaled).square().sum() / scaled.square().sum()).sqrt().cpu()
    return errors


def draw_errors(errors: Tensor, timesteps: Sequence[int], factors: Sequence[float]):
    """The errors over the timesteps, a line for each factor."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for factor, column in zip(factors, errors.T.tolist(), strict=True):
        axes.plot(timesteps, column, marker=".", label=f"c = {factor:g}")
    axes.set_yscale("log")
    axes.set_xlabel("timestep")
    axes.set_ylabel("relative error of eps(c x, t) = c eps(x, t)")
    axes.legend(frameon=False, fontsize="small")
    return figure
