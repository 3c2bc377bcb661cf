"""How much of the data the noisiest level keeps, by the length of the chain and by what was subtracted and divided by.

The chain of length T is the first T levels of a path with fixed betas, so that one network is that of every length. Sampling starts
from N(0, 1) at timestep T - 1, as if nothing were left of the data there. What is left is

    L_T = KL(q(x_T | x_0) || N(0, 1)), in the mean over x_0,

and in the distribution of x_T itself, the mixture of q(x_T | x_0) over the data, the distance of its distribution function
from that of N(0, 1) along the principal components of the data.
"""

import math

import torch
from torch import Tensor

from diffusers_ext.diffusion.noising import NoiseSchedule
from diffusers_ext.diffusion.variational_bound import bits_per_dim, prior_nats


# Components that are looked along, and the points at which distribution functions are compared.
NUM_COMPONENTS, NUM_POINTS = 8, 161

# Of two distribution functions, below which x_T is called Gaussian.
SMALL_DISTANCE = 0.01


def prior_bits(x0: Tensor, schedule: NoiseSchedule, timestep: int) -> float:
    """L_T in bits/dim, the mean over samples `(number, ...)`, for a chain that ends at this timestep."""
    x0 = x0.double()
    nats = prior_nats(x0, schedule.level(timestep, x0))
    return bits_per_dim(nats.flatten(1).sum(1).mean().item(), x0[0].numel())


def principal_projections(x0: Tensor, number: int = NUM_COMPONENTS) -> Tensor:
    """The samples along their largest principal components, not centred, float64, shape `(samples, components)`."""
    flat = x0.flatten(1).double()
    centred = flat - flat.mean(0)
    if len(flat) == 1 or centred.abs().max() < 1e-9:  # a single point, along the line to it
        norm = flat[:1].norm(dim=1, keepdim=True)
        return flat @ (flat[:1] / norm.clamp(min=1e-300)).T
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return flat @ vectors[:, -number:].flip(1)


def distance_from_gaussian(projections: Tensor, schedule: NoiseSchedule, timestep: int) -> float:
    """The largest difference of the distribution functions of x_T and N(0, 1) along any of the components.

    That of x_T is the mean of those of N(alpha x_0, sigma^2), so that no noise is drawn.
    """
    level = schedule.level(timestep, torch.zeros(1, dtype=torch.float64))
    alpha, sigma = level.alpha.item(), max(level.sigma.item(), 1e-12)
    points = torch.linspace(-4, 4, NUM_POINTS, dtype=torch.float64)
    normal, largest = torch.special.ndtr(points), 0.0
    for component in projections.T:
        mixture = torch.special.ndtr((points - alpha * component[:, None]) / sigma).mean(0)
        largest = max(largest, (mixture - normal).abs().max().item())
    return largest


def gaussian_from(projections: Tensor, schedule: NoiseSchedule) -> int | None:
    """The first timestep from which on x_t is Gaussian (`SMALL_DISTANCE`); None if it never is. The distance falls with t."""
    low, high = 0, len(schedule) - 1
    if distance_from_gaussian(projections, schedule, high) > SMALL_DISTANCE:
        return None
    while low < high:
        middle = (low + high) // 2
        if distance_from_gaussian(projections, schedule, middle) > SMALL_DISTANCE:
            low = middle + 1
        else:
            high = middle
    return low


def draw_curves(curves: dict[str, dict[str, list[float]]], lengths: list[int]):
    """A panel for each measure, with a line for each kind of data; NaN where there is none.

    Args:
        curves: From measures to the values of each kind of data.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(curves), 4), layout="constrained")
    for axes, (measure, kinds) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for kind, values in kinds.items():
            if not all(map(math.isnan, values)):
                axes.plot(lengths, values, marker=".", label=kind)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("T, levels of the chain")
        axes.set_ylabel(measure)
        axes.legend(frameon=False, fontsize="small")
    return figure
