"""The best reverse variance on data whose best denoiser is known, and what a table of it may be."""

import pytest
import torch

from diffusers_ext.diffusion.analytic_variance import (
    X0Variances,
    analytic_variance,
    measure_prediction,
    within_bounds,
)
from diffusers_ext.diffusion.betas import make_betas
from diffusers_ext.diffusion.noising import PREDICTION_TYPES, NoiseSchedule, add_noise, output_eps, posterior_std
from diffusers_ext.diffusion.timestep_search import search_grid
from gaussian_oracle import EPS, VARIANCE, X0, model_output, optimal_variance


LIKE = torch.zeros(1, dtype=torch.float64)


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule(make_betas("linear", 1000))


def moments(schedule, timesteps, prediction_type="epsilon", error=0.0):
    def answer(x_t, t):
        return model_output(schedule, prediction_type, x_t, t) * (1 + error)

    return measure_prediction(answer, [X0, -X0], schedule, timesteps, prediction_type, noise=lambda i: EPS)


def eps_hat_square(schedule, timestep, prediction_type):
    """E|eps_hat|^2 of a coordinate."""
    level = schedule.level(timestep, X0)
    x_t = add_noise(torch.cat([X0, -X0]), torch.cat([EPS, EPS]), level)
    return (
        output_eps(model_output(schedule, prediction_type, x_t, timestep), x_t, level, prediction_type).square().mean()
    )


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_both_estimates_are_the_variance_of_x0_given_x_t(schedule, prediction_type):
    timesteps = torch.tensor([0, 10, 500, 999])
    level = schedule.level(timesteps, LIKE)
    expected = VARIANCE * level.sigma**2 / (VARIANCE * level.alpha**2 + level.sigma**2)
    measured = moments(schedule, timesteps, prediction_type)
    torch.testing.assert_close(measured.x0_variance, expected, rtol=1e-9, atol=0)
    # The paper's estimate, which asks for no x_0 beside x_t.
    eps_square = [eps_hat_square(schedule, t, prediction_type) for t in timesteps]
    by_eps = (level.sigma / level.alpha).square() * (1 - torch.stack(eps_square))
    torch.testing.assert_close(by_eps, expected, rtol=1e-6, atol=0)
    assert measured.x0_square / measured.count == pytest.approx(VARIANCE)


@pytest.mark.parametrize(("t", "s"), [(999, 500), (500, 0), (20, 3)])
def test_variance_is_that_of_x_s_given_x_t_at_every_eta(schedule, t, s):
    x0_variance = moments(schedule, torch.tensor([t])).x0_variance
    ends = schedule.level(t, LIKE), schedule.level(s, LIKE)
    assert analytic_variance(*ends, x0_variance).item() == pytest.approx(optimal_variance(schedule, t, s), rel=1e-9)
    for eta in (0.0, 0.5):
        # By another road: the variance of x_s is that of its mean, linear in x_t, and this one.
        level_t, level_s = ends
        gain = VARIANCE * level_t.alpha / (VARIANCE * level_t.alpha**2 + level_t.sigma**2)
        direction = (level_s.sigma**2 - posterior_std(*ends, eta) ** 2) ** 0.5
        of_x_t = level_s.alpha * gain + direction * (1 - level_t.alpha * gain) / level_t.sigma
        total = of_x_t**2 * (VARIANCE * level_t.alpha**2 + level_t.sigma**2) + analytic_variance(
            *ends, x0_variance, eta
        )
        assert total.item() == pytest.approx((VARIANCE * level_s.alpha**2 + level_s.sigma**2).item(), rel=1e-9)


def test_estimates_are_clipped_to_the_bounds_of_the_theorem(schedule):
    level = schedule.level(torch.tensor([0, 500, 999]), LIKE)
    huge, none = torch.full((3,), 1e9, dtype=torch.float64), torch.full((3,), -1.0, dtype=torch.float64)
    torch.testing.assert_close(within_bounds(huge, level), (level.sigma / level.alpha) ** 2)
    assert within_bounds(huge, level, 1.0).tolist() == [pytest.approx(1e-4, rel=1e-3), 1.0, 1.0]
    assert within_bounds(none, level).tolist() == [0, 0, 0]
    # At the bound the transition is that of pure noise: the variance of x_s under the noising from x_0 = const.
    t, s = schedule.level(500, LIKE), schedule.level(300, LIKE)
    variance = analytic_variance(t, s, within_bounds(huge[:1], t))
    expected = ((t.sigma * s.alpha / t.alpha) - (s.sigma**2 - posterior_std(t, s) ** 2) ** 0.5) ** 2 + posterior_std(
        t, s
    ) ** 2
    torch.testing.assert_close(variance, expected)  # Eq. 11


@pytest.mark.parametrize("number", [40, 1000])
def test_a_table_of_some_timesteps_stands_for_all(schedule, number):
    timesteps = search_grid(schedule, number).flip(0)
    table = {"timesteps": timesteps.tolist(), "x0_variance": moments(schedule, timesteps).x0_variance.tolist()}
    expected = moments(schedule, torch.arange(1000)).x0_variance
    torch.testing.assert_close(
        X0Variances(table, schedule).values, expected, rtol=1e-9 if number == 1000 else 2e-2, atol=0
    )


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"timesteps": [0]}, "must have 'timesteps' and 'x0_variance', and perhaps 'last_noise', got 'timesteps'"),
        ({"timesteps": [5, 1], "x0_variance": [0.1, 0.2]}, r"integers in \[0, 999\], ascending, got"),
        ({"timesteps": [0, 1000], "x0_variance": [0.1, 0.2]}, r"integers in \[0, 999\], ascending, got"),
        ({"timesteps": [0, 1], "x0_variance": [0.1]}, "must have 2 numbers of at least 0"),
        ({"timesteps": [0, 1], "x0_variance": [0.1, float("nan")]}, "must have 2 numbers of at least 0"),
        ({"timesteps": [0], "x0_variance": [0.1], "last_noise": 0}, "last_noise of analytic_variance must be above 0"),
    ],
)
def test_what_is_no_table_is_refused(schedule, table, message):
    with pytest.raises(ValueError, match=message):
        X0Variances(table, schedule)


def test_no_images_are_refused(schedule):
    with pytest.raises(ValueError, match="batches must hold at least one image, got none"):
        measure_prediction(lambda x, t: x, [], schedule, torch.tensor([0]), "epsilon")
