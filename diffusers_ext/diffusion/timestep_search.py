"""Timesteps chosen for a model: lists of n of them whose steps cost least in sum, for all n at once.

A step from one timestep to a cleaner one, whatever comes before and after it, has a cost, and a list the sum of those of its
steps. Dynamic programming then finds the best list of each length. There are two costs:

- "bound": what the step adds to the variational bound, in nats of a coordinate (Watson et al. 2021). It is for the likelihood;
  images may be worse by it, which is no concern of the bound. All but the last term follow from the mean squared error of the
  predicted x_0 at each timestep.
- "trajectory": how far the step, from a point of a fine deterministic trajectory, ends from that trajectory (Chen et al. 2024,
  GITS). It is for sampling. No call of the network is needed beside those of the trajectory.

Grids are from the noisiest timestep to the cleanest; the clean end comes after them.

References:
    Watson et al. 2021, Learning to Efficiently Sample from Diffusion Probabilistic Models, arXiv 2106.03802.
    Chen et al. 2024, On the Trajectory Regularity of ODE-based Diffusion Sampling, arXiv 2405.11326.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from diffusers_ext.diffusion.analytic_variance import analytic_variance, log_snr
from diffusers_ext.diffusion.noising import (
    NoiseLevel,
    NoiseSchedule,
    add_noise,
    posterior_std,
)
from diffusers_ext.diffusion.precision import to_float64
from diffusers_ext.diffusion.timesteps import check_number_of_steps, check_timesteps


# What a list can be best in.
TIMESTEP_OBJECTIVES = ("trajectory", "bound")

# Of x_0, next to none, whose log is finite.
SMALLEST_ERROR = 1e-30


def cheapest_lists(
    costs: np.ndarray, numbers: Iterable[int], start_costs: np.ndarray | None = None, growth: float = 1.0
) -> dict[int, list[int]]:
    """For each number n, the n points of a grid whose steps, from the first to the next and so on to the end, cost least.

    Args:
        costs: Of the step from point i to point j > i, or to the end, j = M; shape `(M, M + 1)`. The others are not read.
        numbers: Numbers of steps, each in [1, M].
        start_costs: Of beginning at point i, shape `(M,)`; by default only the first is a beginning.
        growth: Factor on the costs of all that follows a step, so that above 1 later steps count more.

    Returns: indices of the grid, ascending.

    Raises:
        ValueError: If a number is out of range.
    """
    size, numbers = len(costs), sorted(set(numbers))
    if numbers and not 1 <= numbers[0] <= numbers[-1] <= size:
        raise ValueError(f"numbers must be in [1, {size}], the points of the grid, got {numbers}")
    start = np.full(size, np.inf) if start_costs is None else np.asarray(start_costs, dtype=np.float64)
    if start_costs is None:
        start[0] = 0
    forward = np.where(np.triu(np.ones((size, size), dtype=bool), 1), costs[:, :-1], np.inf)
    to_go, choices, lists = costs[:, -1].astype(np.float64), [], {}
    for number in range(1, max(numbers, default=0) + 1):
        if number > 1:
            through = forward + growth * to_go  # inf where too few points are left
            choices.append(through.argmin(1))
            to_go = through.min(1)
        if number in numbers:
            path = [int((start + to_go).argmin())]
            for choice in reversed(choices):
                path.append(int(choice[path[-1]]))
            lists[number] = path
    return lists


def bound_costs(
    schedule: NoiseSchedule, grid: Tensor, x0_variance: Tensor, x0_square: float, last_nats: Tensor | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Costs of steps and of beginnings, whose sum is the bound of a sampler with the analytic variances.

    Args:
        grid: Timesteps, descending, shape `(M,)`.
        x0_variance: Mean squared error of a coordinate of the predicted x_0, shape `(M,)`.
        x0_square: Mean square of a coordinate of x_0.
        last_nats: Cost of a coordinate if the step from there is the last, shape `(M,)`, which is not that of a normal error
            where the data have bins or ends; by default it is, for a density.

    Returns: In nats of a coordinate, shapes `(M, M + 1)` and `(M,)`.
    """
    level = schedule.level(grid, torch.zeros(1, dtype=torch.float64, device="cpu"))
    t, s = (NoiseLevel(*(part.view(shape) for part in level)) for shape in ((-1, 1), (1, -1)))
    error = torch.as_tensor(x0_variance, dtype=torch.float64, device="cpu").view(-1, 1).clamp(min=SMALLEST_ERROR)
    # A step up has no cost that is read; a level of its own keeps the formulas finite.
    later = torch.ones(len(grid), len(grid), dtype=torch.bool, device="cpu").triu(1)
    s = NoiseLevel(torch.where(later, s.alpha, 1.0), torch.where(later, s.sigma, 0.5 * t.sigma))
    # The means of p and of the posterior are apart by as much as the variance of p has more, in the mean over the data: what
    # is left of their KL is the log.
    kl = 0.5 * (analytic_variance(t, s, error) / posterior_std(t, s) ** 2).log()
    prior = 0.5 * (t.alpha.square() * x0_square + t.sigma.square() - 1 - t.sigma.square().log())
    last = 0.5 * (2 * math.pi * math.e * error).log() if last_nats is None else last_nats.double().view(-1, 1)
    return torch.cat([kl, last], 1).numpy(), prior.flatten().numpy()


def trajectory_costs(points: Tensor, x0_hat: Tensor, levels: NoiseLevel) -> np.ndarray:
    """How far each step without noise from a point of a trajectory ends from its later points and from its end.

    The noise that a step keeps is the one that the trajectory's own step kept.

    Args:
        points: x_t at each level and the end, shape `(M + 1, batch, ...)`.
        x0_hat: Predicted x_0 at each, shape `(M, batch, ...)`.
        levels: Of the points, with the clean end last, shape `(M + 1,)`.

    Returns: Root mean square over images and coordinates, shape `(M, M + 1)`; 0 where a step would not go on.
    """
    size = len(x0_hat)
    points, x0_hat = to_float64(points).flatten(1), to_float64(x0_hat).flatten(1)
    alpha, sigma = (part.cpu().double().to(points.device).view(-1, 1) for part in levels)
    costs = np.zeros((size, size + 1))
    for i in range(size):
        follows = sigma[i + 1] > 0
        eps = (points[i + 1] - alpha[i + 1] * x0_hat[i]) / sigma[i + 1] if follows else torch.zeros_like(points[i])
        later = slice(i + 1, size + 1)
        ends = add_noise(x0_hat[i : i + 1], eps[None], NoiseLevel(alpha[later], sigma[later]))
        costs[i, later] = (ends - points[later]).square().mean(1).sqrt().cpu().numpy()
    return costs


def search_grid(schedule: NoiseSchedule, number: int) -> Tensor:
    """At most `number` timesteps, descending, both ends among them: half evenly spaced, half evenly in log SNR."""
    length = len(schedule)
    if number >= length:
        return torch.arange(length - 1, -1, -1, device="cpu")
    even = np.linspace(0, length - 1, number - number // 2).round()
    levels = -np.maximum(log_snr(schedule), -30.0)  # rising
    inner = np.linspace(levels[0], levels[-1], number // 2 + 2)[1:-1]
    by_level = np.interp(inner, levels, np.arange(length)).round()
    return torch.from_numpy(np.unique(np.concatenate([even, by_level])).astype(np.int64)[::-1].copy())


class ChosenTimesteps:
    """Lists of timesteps by their numbers, as a scheduler's config has them.

    Args:
        chosen: "spacing", which it was that the lists take the place of, and at least one of `TIMESTEP_OBJECTIVES`, each with
            lists by the number of their timesteps, which may be a text as in JSON.
        num_train_timesteps: Of the path.
        first: The timestep of its cleanest level: 0, or 1 where a network is given T t.

    Raises:
        ValueError: If it is not that.
    """

    def __init__(self, chosen: Mapping, num_train_timesteps: int, first: int = 0):
        objectives = [name for name in TIMESTEP_OBJECTIVES if name in chosen]
        unknown = set(chosen) - {"spacing", *TIMESTEP_OBJECTIVES}
        if unknown or not objectives or not isinstance(chosen.get("spacing"), str):
            raise ValueError(
                f"optimal_timesteps must have 'spacing' and one or both of {', '.join(TIMESTEP_OBJECTIVES)}, got "
                f"{', '.join(map(repr, chosen)) or 'nothing'}"
            )
        self.spacing, self._length, self._first, self._lists = chosen["spacing"], num_train_timesteps, first, {}
        for objective in objectives:
            lists = {int(number): timesteps for number, timesteps in chosen[objective].items()}
            for number, timesteps in lists.items():
                if len(timesteps) != number:
                    raise ValueError(
                        f"the list for {number} steps of optimal_timesteps must have that number, got {len(timesteps)}"
                    )
                check_timesteps(timesteps, num_train_timesteps, first)
            if not lists:
                raise ValueError(f"optimal_timesteps must have at least one list for {objective}, got none")
            self._lists[objective] = lists

    def make(self, num_inference_steps: int, objective: str) -> np.ndarray:
        """The list for a number of steps, int64, descending.

        Args:
            objective: Of `TIMESTEP_OBJECTIVES`; the other one's lists serve where there are none.
        """
        check_number_of_steps(num_inference_steps, self._length)
        lists = self._lists.get(objective) or next(iter(self._lists.values()))
        if num_inference_steps in lists:
            return np.asarray(lists[num_inference_steps], dtype=np.int64)
        nearest = min(lists, key=lambda number: (abs(np.log(number / num_inference_steps)), -number))
        rows = [timestep - self._first for timestep in lists[nearest]]
        return spread_like(rows, num_inference_steps, self._length) + self._first


def spread_like(timesteps: Sequence[int], number: int, num_train_timesteps: int) -> np.ndarray:
    """Another number of timesteps with the density of a list, its ends among them; int64, descending."""
    ascending = np.asarray(timesteps[::-1], dtype=np.float64)
    if len(ascending) == 1:
        ascending = np.array([0.0, ascending[0]])
    at = np.linspace(0, len(ascending) - 1, number) if number > 1 else np.array([len(ascending) - 1.0])
    values = np.interp(at, np.arange(len(ascending)), ascending).round().astype(np.int64)
    # Strictly ascending and within the path, by as little as it takes.
    index = np.arange(number)
    values = np.maximum.accumulate(values - index) + index
    values = np.minimum(values, num_train_timesteps - number + index)
    return values[::-1].copy()
