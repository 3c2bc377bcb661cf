"""The exact answer of every sampler on Gaussian data, in float64."""

import math

import pytest
import torch

from diffusers_ext.diffusion.noising import PREDICTION_TYPES
from diffusers_ext.diffusion.timestep_search import search_grid
from diffusers_ext.schedulers import ExtDDIMScheduler, ExtDDPMScheduler, VPredictionScheduler
from gaussian_oracle import VARIANCE, model_output, optimal_variance, output_std_ratio


NUM_STEPS = (10, 20, 50, 100, 250, 1000)
DDIM_TABLE = {
    "leading": (0.7483, 0.8675, 0.9449, 0.9720, 0.9886, 0.9970),
    "trailing": (0.7399, 0.8627, 0.9428, 0.9709, 0.9882, 0.9970),
    "linspace": (0.7232, 0.8609, 0.9438, 0.9717, 0.9885, 0.9970),
}
DDPM_TABLE = {
    "fixed_small": {10: 0.6665, 50: 0.8882, 100: 0.9365, 1000: 0.9922},
    "fixed_large": {10: 1.1781, 50: 1.0345, 100: 1.0170, 1000: 1.0015},
}


def sampled_std_ratio(scheduler, num_steps, **step_kwargs):
    scheduler.set_timesteps(num_steps)

    def step(x_t, timestep, noise):
        output = model_output(scheduler.schedule, scheduler.config.prediction_type, x_t, timestep)
        return scheduler.step(output, timestep, x_t, variance_noise=noise, return_dict=False, **step_kwargs)[0]

    return output_std_ratio(step, scheduler.timesteps)


@pytest.mark.product
@pytest.mark.parametrize("spacing", DDIM_TABLE)
@pytest.mark.parametrize(("column", "num_steps"), list(enumerate(NUM_STEPS)))
def test_ddim_has_the_exact_standard_deviation(spacing, column, num_steps):
    scheduler = ExtDDIMScheduler(clip_sample=False, timestep_spacing=spacing)
    assert sampled_std_ratio(scheduler, num_steps) == pytest.approx(DDIM_TABLE[spacing][column], abs=6e-5)


@pytest.mark.product
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"])
@pytest.mark.parametrize("num_steps", [10, 50, 100, 1000])
def test_ddpm_has_the_exact_standard_deviation(variance_type, num_steps):
    scheduler = ExtDDPMScheduler(clip_sample=False, variance_type=variance_type)
    expected = DDPM_TABLE[variance_type.removesuffix("_log")][num_steps]
    assert sampled_std_ratio(scheduler, num_steps) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_every_prediction_type_samples_the_same(prediction_type):
    scheduler = ExtDDIMScheduler(clip_sample=False, prediction_type=prediction_type)
    assert sampled_std_ratio(scheduler, 20) == pytest.approx(0.8675, abs=6e-5)
    scheduler = ExtDDPMScheduler(clip_sample=False, prediction_type=prediction_type)
    assert sampled_std_ratio(scheduler, 50) == pytest.approx(0.8882, abs=6e-5)


@pytest.mark.parametrize("num_steps", [10, 50, 1000])
def test_ddim_at_eta_one_is_ddpm(num_steps):
    ddim = sampled_std_ratio(ExtDDIMScheduler(clip_sample=False), num_steps, eta=1.0)
    assert ddim == pytest.approx(sampled_std_ratio(ExtDDPMScheduler(clip_sample=False), num_steps), rel=1e-9)


@pytest.mark.product
@pytest.mark.parametrize("num_steps", NUM_STEPS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "quadratic"])
@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_ddpm_with_the_optimal_variance_is_exact(num_steps, spacing, variance_type):
    """Analytic-DPM's claim: 1.0000 at every n. The last step draws nothing, so its variance is added here."""
    scheduler = ExtDDPMScheduler(clip_sample=False, timestep_spacing=spacing, variance_type=variance_type)
    scheduler.set_timesteps(num_steps)
    schedule = scheduler.schedule

    def step(x_t, timestep, noise):
        variance = optimal_variance(schedule, timestep, scheduler.previous_timestep(timestep))
        variance_output = math.log(variance)
        if variance_type == "learned_range":
            bounds = [scheduler._get_variance(timestep, variance_type=f"fixed_{size}") for size in ("small", "large")]
            small, large = (math.log(max(bound.item(), 1e-20)) for bound in bounds)
            variance_output = 2 * (variance_output - small) / (large - small) - 1
        output = model_output(schedule, "epsilon", x_t, timestep)
        output = torch.cat([output, torch.full_like(output, variance_output)], dim=1)
        return scheduler.step(output, timestep, x_t, variance_noise=noise, return_dict=False)[0]

    ratio = output_std_ratio(step, scheduler.timesteps)
    last = optimal_variance(schedule, scheduler.timesteps[-1], -1)
    # float32 levels in `_get_variance` limit "learned_range" to six digits.
    assert math.sqrt(ratio**2 + last / VARIANCE) == pytest.approx(1.0, abs=5e-5)


def test_quadratic_spacing_beats_the_even_ones_here():
    results = [
        sampled_std_ratio(ExtDDIMScheduler(clip_sample=False, timestep_spacing=spacing), 20)
        for spacing in ("quadratic", "leading", "trailing", "linspace")
    ]
    assert abs(1 - results[0]) < 0.7 * min(abs(1 - result) for result in results[1:])


@pytest.mark.parametrize("num_steps", [10, 50, 250])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_v_prediction_from_pure_noise_converges(num_steps, eta):
    """At zero terminal SNR N(0, 1) is the exact start, and what is left is the error of the steps, of first order."""
    error, finer = (
        1 - sampled_std_ratio(VPredictionScheduler(clip_sample=False), n, eta=eta) for n in (num_steps, 2 * num_steps)
    )
    assert 0 < finer < 0.68 * error
    assert error < 8 / num_steps


def analytic(timesteps=1000, **config):
    """The table of v_t for this data, of all timesteps or of some spread over them."""
    schedule = ExtDDPMScheduler().schedule
    grid = search_grid(schedule, timesteps).flip(0)
    level = schedule.level(grid, torch.zeros(1, dtype=torch.float64))
    x0_variance = VARIANCE * level.sigma**2 / (VARIANCE * level.alpha**2 + level.sigma**2)
    table = {"timesteps": grid.tolist(), "x0_variance": x0_variance.tolist()}
    return {"clip_sample": False, "variance_type": "analytic", "analytic_variance": table} | config


def with_last_variance(ratio, scheduler):
    """The last step draws nothing, so its variance is added here."""
    last = optimal_variance(scheduler.schedule, scheduler.timesteps[-1], -1)
    return math.sqrt(ratio**2 + last / VARIANCE)


@pytest.mark.parametrize("num_steps", [1, 2, 5, *NUM_STEPS])
def test_the_analytic_variance_is_exact_at_every_number_of_steps(num_steps):
    """Of N(0, 1), where the path nearly ends, 1e-5 is left."""
    ddpm = ExtDDPMScheduler(**analytic(timestep_spacing="trailing"))
    assert with_last_variance(sampled_std_ratio(ddpm, num_steps), ddpm) == pytest.approx(1.0, abs=5e-5)
    for eta in (1.0, 0.3, 1e-6):
        ddim = ExtDDIMScheduler(**analytic(timestep_spacing="trailing"))
        ratio = sampled_std_ratio(ddim, num_steps, eta=eta)
        assert with_last_variance(ratio, ddim) == pytest.approx(1.0, abs=5e-5)


@pytest.mark.parametrize("num_steps", [5, 50])
def test_a_small_table_is_nearly_exact(num_steps):
    ddpm = ExtDDPMScheduler(**analytic(timesteps=50, timestep_spacing="trailing"))
    assert with_last_variance(sampled_std_ratio(ddpm, num_steps), ddpm) == pytest.approx(1.0, abs=2e-3)


def test_without_noise_ddim_has_no_use_for_the_analytic_variance():
    ddim = ExtDDIMScheduler(**analytic())
    assert sampled_std_ratio(ddim, 20) == pytest.approx(DDIM_TABLE["leading"][1], abs=6e-5)


def test_the_last_noise_stays_below_its_limit():
    config = analytic(timestep_spacing="trailing")
    config["analytic_variance"] |= {"last_noise": 0.01}
    ddpm, free = ExtDDPMScheduler(**config), ExtDDPMScheduler(**analytic(timestep_spacing="trailing"))
    for scheduler in (ddpm, free):
        scheduler.set_timesteps(10)
    limited = [ddpm._get_variance(t).item() for t in ddpm.timesteps]
    others = [free._get_variance(t).item() for t in free.timesteps]
    assert math.sqrt(limited[-2] * 2 / math.pi) == pytest.approx(0.01)
    assert limited[:-2] == others[:-2] and limited[-2] < others[-2]


@pytest.mark.parametrize("cls", [ExtDDPMScheduler, ExtDDIMScheduler])
def test_a_batch_of_timesteps_has_the_variance_of_each(cls):
    scheduler = cls(**analytic(timestep_spacing="trailing"))
    scheduler.set_timesteps(10)
    x, noise = (
        torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        torch.ones(3, 2).double(),
    )
    more = {"eta": 1.0} if cls is ExtDDIMScheduler else {}
    each = [
        scheduler.step(x[i : i + 1], t, x[i : i + 1], variance_noise=noise[:1], return_dict=False, **more)[0]
        for i, t in enumerate(scheduler.timesteps[[0, 5, 9]])
    ]
    together = scheduler.step(x, scheduler.timesteps[[0, 5, 9]], x, variance_noise=noise, return_dict=False, **more)[0]
    torch.testing.assert_close(together, torch.cat(each))
