"""The analytic variance of a model: one pass of its network over training images, at timesteps spread over the path."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from diffusers_ext.calibration.budget import Budget
from diffusers_ext.calibration.examples import Examples
from diffusers_ext.calibration.subject import Subject
from diffusers_ext.diffusion.analytic_variance import (
    PredictionMoments,
    X0Variances,
    measure_prediction,
    within_bounds,
)
from diffusers_ext.diffusion.data_units import DataUnits
from diffusers_ext.diffusion.noising import NoiseSchedule, Normal
from diffusers_ext.diffusion.precision import to_float64
from diffusers_ext.diffusion.timestep_search import bound_costs, cheapest_lists, search_grid
from diffusers_ext.diffusion.variational_bound import decoder_nats


# Timesteps that it is measured at; between them it is interpolated.
NUM_POINTS = 64

# Images at a time, and at most.
BATCH, MOST_IMAGES = 16, 512

NUM_DIGITS = 4


@dataclass(frozen=True)
class Prediction:
    """How well a network predicts x_0.

    Attributes:
        grid: Timesteps, descending.
        x0_variance: Mean squared error of a coordinate there, float64, within what it can be.
        x0_square: Mean square of a coordinate of x_0.
        num_images: That it was measured on.
        last_nats: Cost of a coordinate of an image in 8 bits if the step from there is the last; None for others.
    """

    grid: Tensor
    x0_variance: Tensor
    x0_square: float
    num_images: int
    last_nats: Tensor | None

    def table(self, last_noise: float | None) -> dict:
        """As a scheduler's config has it.

        Args:
            last_noise: What the noise of the last step is kept below, see `X0Variances`; None for no limit.
        """
        values = [float(f"{value:.{NUM_DIGITS}g}") for value in self.x0_variance.flip(0).tolist()]
        table = {"timesteps": self.grid.flip(0).tolist(), "x0_variance": values}
        return table | ({} if last_noise is None else {"last_noise": round(last_noise, 5)})


def measure(subject: Subject, train: Examples, budget: Budget, seed: int) -> Prediction:
    """Measures on images that the network was trained on, in batches until the time is over, at least one."""
    schedule, config = subject.pipe.scheduler.schedule, subject.pipe.scheduler.config
    grid = search_grid(schedule, NUM_POINTS)
    examples, generator = train.at_most(MOST_IMAGES, seed), torch.Generator().manual_seed(seed)
    total: PredictionMoments | None = None
    for rows in torch.arange(len(examples)).split(BATCH):
        before = budget.used
        x0, condition = subject.clean_samples(examples.take(rows))
        moments = measure_prediction(
            *(subject.network(condition, len(x0)), [x0], schedule, grid, config.prediction_type),
            clip=subject.clip,
            generator=generator,
            decoder=partial(_decoder, units=subject.units(condition, x0)) if subject.has_bins else None,
        )
        total = moments if total is None else total + moments
        if budget.left < budget.used - before:
            break
    level = schedule.level(grid, torch.zeros(1, dtype=torch.float64))
    largest = config.clip_sample_range if config.clip_sample and not config.thresholding else None
    x0_variance = within_bounds(total.x0_variance, level, largest)
    last = total.last_nats / total.count if subject.has_bins else None
    return Prediction(grid, x0_variance, total.x0_square / total.count, total.count // x0[0].numel(), last)


def _decoder(x0: Tensor, x0_hat: Tensor, std: Tensor, units: DataUnits | None) -> Tensor:
    """-log p(x_0 | x_t) of each coordinate of images in 8 bits."""
    x0, x0_hat, std = (to_float64(each) for each in (x0, x0_hat, std))
    return decoder_nats(x0, Normal(x0_hat, std), units=units)


def lists_by_bound(subject: Subject, prediction: Prediction, numbers: list[int]) -> tuple[dict, dict]:
    """Timesteps by the bound for each number of steps, and what they and the scheduler's own cost in bits/dim.

    Returns: lists, descending, by their number; and by number the pair of figures, as the prediction says them.
    """
    schedule, grid = subject.pipe.scheduler.schedule, prediction.grid
    costs, start = bound_costs(schedule, grid, prediction.x0_variance, prediction.x0_square, prediction.last_nats)
    numbers = [number for number in numbers if number <= len(grid)]
    found = cheapest_lists(costs, numbers, start)
    lists, bits = {}, {}
    for number, path in found.items():
        lists[number] = grid[path].tolist()
        bits[number] = {
            "spacing": _bits(schedule, prediction, subject.own_timesteps(number)),
            "chosen": _bits(schedule, prediction, lists[number]),
        }
    return lists, bits


def _bits(schedule: NoiseSchedule, prediction: Prediction, timesteps: list[int]) -> float:
    """Bits/dim that the bound of these timesteps has by the measured errors of x_0."""
    at = torch.tensor(timesteps)
    every = X0Variances(prediction.table(None), schedule).values
    last = prediction.last_nats
    if last is not None:
        last = torch.from_numpy(np.interp(timesteps, prediction.grid.flip(0).numpy(), last.flip(0).numpy()))
    costs, start = bound_costs(schedule, at, every[at], prediction.x0_square, last)
    steps = range(len(at))
    nats = start[0] + sum(costs[i, i + 1] for i in steps)
    return float(nats / torch.log(torch.tensor(2.0, dtype=torch.float64)))
