"""Timesteps that keep a sampler without noise near a fine trajectory of its own, under the guidance that is the default."""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_ext.calibration.budget import Budget, number_that_fits
from diffusers_ext.calibration.examples import Examples
from diffusers_ext.calibration.subject import Subject
from diffusers_ext.diffusion.noising import NoiseLevel
from diffusers_ext.diffusion.timestep_search import cheapest_lists, trajectory_costs
from diffusers_ext.evaluation.generate import condition_of


# Steps of the fine trajectory, and images that have one.
NUM_FINE_STEPS, NUM_IMAGES = 64, 32
FEWEST_IMAGES = 4  # where time is short

# Arguments of a call that each image has its own of.
PER_IMAGE = ("latents", "class_labels", "prompt", "condition_image")

# Of the time for timesteps, what the fine trajectories may take; the rest is for the lists that are compared with them.
SHARE_OF_FINE = 0.5

# How much more each further step counts (`cheapest_lists`): an early error is partly undone by the later steps, or grows.
GROWTHS = (1.0, 1.15)

# Numbers of steps that lists are chosen for; for others the nearest list is stretched.
NUMBERS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 25, 32, 40, 50)


@dataclass(frozen=True)
class Teacher:
    """Fine trajectories from one noise, which lists of few timesteps are compared with.

    Attributes:
        call: Arguments of the pipeline's call that all of them share.
        ends: What the fine trajectories end in, shape `(images, channels, ...)`.
        costs: Of steps over `grid`, see `trajectory_costs`.
    """

    subject: Subject
    call: dict
    grid: Tensor
    ends: Tensor
    costs: object

    @classmethod
    def make(
        cls, subject: Subject, number: int, guidance: dict, seed: int, examples: Examples | None = None
    ) -> "Teacher":
        """The trajectories of so many images, of all labels in turn or like these examples, under a guidance of the call."""
        grid, schedule = subject.search_grid(NUM_FINE_STEPS), subject.schedule
        call = _call(subject, number, guidance, seed, examples)
        ends, x_t, x0_hat = _sample(subject, call, grid.tolist(), with_points=True)
        x = torch.cat([x_t, ends[None]])
        every = torch.cat([grid - schedule.first_label, torch.tensor([-1])])
        costs = trajectory_costs(x, x0_hat, NoiseLevel(schedule.alpha[every], schedule.sigma[every]))
        return cls(subject, call, grid, x[-1], costs)

    def distance(self, timesteps: Sequence[int]) -> float:
        """Root mean square of the difference between what these timesteps end in and the fine ones."""
        ends, *_ = _sample(self.subject, self.call, timesteps)
        return (ends - self.ends).square().mean().sqrt().item()


def _call(subject: Subject, number: int, guidance: dict, seed: int, examples: Examples | None) -> dict:
    """Arguments of the pipeline's call for so many images of the noise of a seed."""
    pipe = subject.pipe
    condition = condition_of(number, **subject.ask_in_turn(number, examples, seed))
    # Without any guidance said, the pipeline's defaults would guide.
    guidance = guidance or ({"guidance_scale": 1.0} if pipe.guider is None else {})
    noise = torch.randn(number, *pipe._sample_shape, generator=torch.Generator().manual_seed(seed))
    return condition | guidance | {"latents": noise, "output_type": "latent"}


def images_that_fit(subject: Subject, guidance: dict, budget: Budget, examples: Examples | None = None) -> int:
    """Of how many images the fine trajectories fit into the time, by what two steps of a few take; up to `NUM_IMAGES`."""
    grid = subject.search_grid(NUM_FINE_STEPS)
    few = grid[[0, len(grid) // 2]].tolist()  # the latter is guided, if any is
    call = _call(subject, FEWEST_IMAGES, guidance, 0, examples)
    start = time.perf_counter()
    _sample(subject, call, few)
    seconds = (time.perf_counter() - start) / len(few) / FEWEST_IMAGES * len(grid)
    return number_that_fits(SHARE_OF_FINE * budget.left, seconds, FEWEST_IMAGES, NUM_IMAGES)


def _sample(
    subject: Subject, call: dict, timesteps: Sequence[int], with_points: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a call of the pipeline by a sampler without noise ends in, on the CPU, in batches of the subject's size.

    Returns: the ends; and, with points, x_t and the predicted x_0 of each step, `(steps, images, ...)`.
    """
    pipe, scheduler = subject.pipe, subject.pipe.scheduler
    number, ends, x_t, x0_hat = len(call["latents"]), [], [], []
    try:
        pipe.scheduler = subject.without_noise
        for first in range(0, number, subject.batch_size):
            rows = slice(first, min(first + subject.batch_size, number))
            part = {name: value[rows] if name in PER_IMAGE else value for name, value in call.items()}
            part |= {"batch_size": rows.stop - rows.start} if "batch_size" in call else {}
            with warnings.catch_warnings():  # of lists so short that an interval of guidance has none of their steps
                warnings.filterwarnings("ignore", "guidance_interval holds none")
                steps = range(len(timesteps)) if with_points else None
                made = pipe(**part, timesteps=list(timesteps), trajectory_steps=steps)
            ends.append(made.images.cpu())
            if with_points:
                x_t.append(torch.stack([point.x_t.cpu() for point in made.trajectory]))
                x0_hat.append(torch.stack([point.x0_hat.cpu() for point in made.trajectory]))
    finally:
        pipe.scheduler = scheduler
    points = (torch.cat(x_t, 1), torch.cat(x0_hat, 1)) if with_points else (None, None)
    return torch.cat(ends), *points


def choose(teacher: Teacher, numbers: Sequence[int], budget: Budget) -> tuple[dict[int, list[int]], dict[int, dict]]:
    """For each number of steps the nearest list to the teacher, of those found and the scheduler's own.

    Args:
        numbers: In the order in which they are looked at, while there is time; the first in any case. The others have the
            lists of the kind that won most often.

    Returns: lists, descending, by their number; and by number the distances of the scheduler's own and of the chosen one, of
        the numbers that were looked at.
    """
    numbers = [number for number in dict.fromkeys(numbers) if number <= len(teacher.grid)]
    own = {number: teacher.subject.own_timesteps(number) for number in numbers}
    kinds = [own]
    for growth in GROWTHS:
        found = cheapest_lists(teacher.costs, numbers, growth=growth)
        kinds.append({number: teacher.grid[path].tolist() for number, path in found.items()})
    lists, distances, wins = {}, {}, [0] * len(kinds)
    for number in numbers:
        before = budget.used
        measured = {each: teacher.distance(each) for each in {tuple(kind[number]) for kind in kinds}}
        of_kinds = [measured[tuple(kind[number])] for kind in kinds]
        winner = min(range(len(kinds)), key=of_kinds.__getitem__)
        wins[winner] += 1
        lists[number] = kinds[winner][number]
        distances[number] = {"spacing": of_kinds[0], "chosen": of_kinds[winner]}
        if budget.left < 1.2 * (budget.used - before):
            break
    usual = kinds[max(range(len(kinds)), key=wins.__getitem__)]
    return {n: lists.get(n, usual[n]) for n in sorted(numbers)}, {n: distances[n] for n in sorted(distances)}
