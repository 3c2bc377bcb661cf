"""Lists of timesteps: the search against trying all, the costs against the bound and the sampler themselves."""

import itertools

import numpy as np
import pytest
import torch

from diffusers_ext.diffusion.analytic_variance import X0Variances, measure_prediction
from diffusers_ext.diffusion.betas import make_betas
from diffusers_ext.diffusion.noising import NoiseLevel, NoiseSchedule
from diffusers_ext.diffusion.reverse_chain import ReverseChain
from diffusers_ext.diffusion.timestep_search import (
    ChosenTimesteps,
    bound_costs,
    cheapest_lists,
    search_grid,
    spread_like,
    trajectory_costs,
)
from diffusers_ext.diffusion.timesteps import make_timesteps
from diffusers_ext.diffusion.variational_bound import bits_per_dim, chain_variances, variational_bound
from diffusers_ext.schedulers import ExtDDIMScheduler
from gaussian_oracle import EPS, VARIANCE, X0, model_output
from mixture_oracle import MEANS, STDS, WEIGHTS, MixtureDenoiser


LIKE = torch.zeros(1, dtype=torch.float64)


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule(make_betas("linear", 1000))


@pytest.mark.parametrize("growth", [1.0, 1.3])
@pytest.mark.parametrize("with_start", [False, True])
def test_the_search_finds_what_trying_all_finds(growth, with_start):
    generator = np.random.default_rng(0)
    costs, start = generator.random((7, 8)), generator.random(7) if with_start else None

    def total(path):
        steps = [costs[i, j] for i, j in zip(path, [*path[1:], 7], strict=True)]
        return (start[path[0]] if with_start else 0) + sum(growth**k * cost for k, cost in enumerate(steps))

    found = cheapest_lists(costs, range(1, 8), start, growth)
    for number, path in found.items():
        paths = [p for p in itertools.combinations(range(7), number) if with_start or p[0] == 0]
        assert total(path) == pytest.approx(min(map(total, paths)))


def test_numbers_that_the_grid_has_not_are_refused():
    with pytest.raises(ValueError, match=r"numbers must be in \[1, 3\], the points of the grid, got \[2, 4\]"):
        cheapest_lists(np.ones((3, 4)), [2, 4])


def test_costs_of_the_steps_add_up_to_the_bound(schedule):
    level = schedule.level(torch.arange(1000), LIKE)
    x0_variance = VARIANCE * level.sigma**2 / (VARIANCE * level.alpha**2 + level.sigma**2)
    x0_variance = x0_variance * 1.3  # of a network that is not the best
    grid = torch.tensor([999, 700, 400, 100, 20, 3])
    costs, start = bound_costs(schedule, grid, x0_variance[grid], VARIANCE)

    def mean_of_error(x_t, t):
        """A network whose squared error of x_0 is 1.3 times the least: it adds a part of the noise to the best one."""
        at = schedule.level(t, x_t)
        extra = (0.3 * x0_variance[int(t[0])] / 1.3) ** 0.5
        best = model_output(schedule, "sample", x_t, t)
        scale = (VARIANCE * at.alpha**2 + at.sigma**2) ** 0.5
        return best + extra * x_t / scale

    path = [0, 2, 3, 5]
    chain = ReverseChain(schedule, grid[path].tolist())
    chain = ReverseChain(schedule, grid[path].tolist(), chain_variances(chain, x0_variance[chain.timesteps]))
    terms = variational_bound(mean_of_error, X0, chain, "sample", "optimal", num_bins=None, noise=lambda i: EPS)
    total = start[path[0]] + sum(costs[i, j] for i, j in zip(path, [*path[1:], 6], strict=True))
    assert total == pytest.approx(terms.total.mean().item(), rel=1e-9)


def test_ten_steps_cost_a_mixture_few_bits_by_the_analytic_variance_and_fewer_at_chosen_timesteps():
    """Two Gaussians in the plane under their exact network, in bits of points beside those of many steps."""
    scheduler = ExtDDIMScheduler(clip_sample=False)
    schedule, model = scheduler.schedule, MixtureDenoiser.make(scheduler)
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(torch.tensor(WEIGHTS), 256, replacement=True, generator=generator)
    noise = torch.randn(256, 2, 1, dtype=torch.float64, generator=generator)
    means, stds = (torch.tensor(each, dtype=torch.float64)[labels] for each in (MEANS, STDS))
    x0 = means[..., None] + stds[:, None, None] * noise

    def denoise(x_t, t):
        return model(x_t, t[:1], torch.full((len(x_t),), 2))[0]

    grid = search_grid(schedule, 60)
    measured = measure_prediction(denoise, [x0], schedule, grid, "epsilon", generator=generator)
    costs, start = bound_costs(schedule, grid, measured.x0_variance, measured.x0_square / measured.count)
    chosen = grid[cheapest_lists(costs, [10], start)[10]].tolist()
    table = {"timesteps": grid.flip(0).tolist(), "x0_variance": measured.x0_variance.flip(0).tolist()}
    x0_variance = X0Variances(table, schedule).values

    def bits(timesteps, variance="optimal"):
        chain = ReverseChain(schedule, timesteps)
        chain = ReverseChain(schedule, timesteps, chain_variances(chain, x0_variance[chain.timesteps]))
        generator = torch.Generator().manual_seed(2)
        terms = variational_bound(denoise, x0, chain, "epsilon", variance, num_bins=None, generator=generator)
        return bits_per_dim(terms.total, 2).mean().item()

    even = make_timesteps("trailing", 10, 1000).tolist()
    many = bits(make_timesteps("trailing", 250, 1000).tolist())
    of_list, of_even, of_beta_tilde = (value - many for value in (bits(chosen), bits(even), bits(even, "fixed_small")))
    assert 0 < of_list < 0.75 * of_even
    assert 2 * of_even < of_beta_tilde


def test_cost_of_a_step_is_its_distance_from_the_trajectory():
    scheduler = ExtDDIMScheduler(clip_sample=False)
    model = MixtureDenoiser.make(scheduler)
    grid = [999, 800, 600, 300, 50]

    def run(timesteps, x):
        scheduler.set_timesteps(timesteps=timesteps)
        points, predicted = [x], []
        for t in scheduler.timesteps:
            step = scheduler.step(model(points[-1], t, torch.full((len(x),), 2))[0], t, points[-1])
            points.append(step.prev_sample)
            predicted.append(step.pred_original_sample)
        return torch.stack(points), torch.stack(predicted)

    x = torch.randn(8, 2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points, predicted = run(grid, x)
    levels = NoiseLevel(
        *(table[torch.tensor([*grid, -1])] for table in (scheduler.schedule.alpha, scheduler.schedule.sigma))
    )
    costs = trajectory_costs(points, predicted, levels)
    direct, _ = run([800, 50], points[1])
    assert costs[1, 4] == pytest.approx((direct[1] - points[4]).square().mean().sqrt().item(), rel=1e-9)
    direct, _ = run([999], x)
    assert costs[0, 5] == pytest.approx((direct[1] - points[5]).square().mean().sqrt().item(), rel=1e-9)
    assert np.abs([costs[i, i + 1] for i in range(5)]).max() < 1e-12


@pytest.mark.parametrize("schedule_name", ["linear", "cosine"])
@pytest.mark.parametrize("number", [5, 64, 2000])
def test_grid_has_both_ends_and_no_timestep_twice(schedule_name, number):
    schedule = NoiseSchedule(make_betas(schedule_name, 1000))
    grid = search_grid(schedule, number)
    assert grid[0] == 999 and grid[-1] == 0 and (grid.diff() < 0).all() and len(grid) <= min(number, 1000)


@pytest.mark.parametrize("number", [1, 2, 5, 8, 40, 50])
def test_another_number_of_timesteps_has_the_density_of_the_list(number):
    values = spread_like([49, 30, 9, 3, 0], number, 50)
    assert len(values) == number and (np.diff(values) < 0).all() and values[0] == 49 and values.min() >= 0
    assert number != 5 or values.tolist() == [49, 30, 9, 3, 0]
    assert number == 1 or values[-1] == 0


CHOSEN = {"spacing": "trailing", "trajectory": {"2": [40, 3]}, "bound": {3: [49, 20, 1]}}


def test_lists_are_found_by_number_and_objective():
    chosen = ChosenTimesteps(CHOSEN, 50)
    assert chosen.make(2, "trajectory").tolist() == [40, 3]
    assert chosen.make(3, "bound").tolist() == [49, 20, 1]
    assert chosen.make(4, "trajectory").tolist() == [40, 28, 15, 3]
    only = ChosenTimesteps({"spacing": "trailing", "bound": CHOSEN["bound"]}, 50)
    assert only.make(3, "trajectory").tolist() == [49, 20, 1]
    with pytest.raises(ValueError, match=r"num_inference_steps must be an integer in \[1, 50\]"):
        chosen.make(51, "bound")


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"bound": {1: [3]}}, "must have 'spacing' and one or both of trajectory, bound, got 'bound'"),
        ({"spacing": "trailing", "other": {}}, "must have 'spacing' and one or both of trajectory, bound"),
        (
            {"spacing": "trailing", "bound": {"2": [3]}},
            "the list for 2 steps of optimal_timesteps must have that number, got 1",
        ),
        ({"spacing": "trailing", "bound": {"1": [50]}}, r"timesteps must be in \[0, 49\], got 50"),
        ({"spacing": "trailing", "bound": {}}, "must have at least one list for bound, got none"),
    ],
)
def test_what_are_no_lists_is_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        ChosenTimesteps(chosen, 50)
