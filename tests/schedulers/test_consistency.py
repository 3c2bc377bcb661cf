"""Sampling of consistency models: on Gaussian data, whose consistency function is known, and beside diffusers' LCM."""

import pytest
import torch
from diffusers import LCMScheduler

from diffusers_ext import ConsistencyScheduler, ExtDDIMScheduler
from diffusers_ext.diffusion.distillation import angle_timesteps
from diffusers_ext.diffusion.noising import predict_eps, training_target
from gaussian_oracle import VARIANCE, output_std_ratio


def exact_v(schedule, x_t, timestep):
    """The output of the exact consistency function: where the probability flow from x_t ends."""
    level = schedule.level(timestep, x_t)
    x0 = x_t * (VARIANCE / (VARIANCE * level.alpha**2 + level.sigma**2)) ** 0.5
    return training_target(x0, predict_eps(x0, x_t, level), level, "v_prediction")


@pytest.mark.parametrize("num_steps", [1, 2, 4, 16])
def test_the_exact_model_of_a_gaussian_samples_it_in_any_number_of_steps(num_steps):
    scheduler = ConsistencyScheduler(clip_sample=False, rescale_betas_zero_snr=True)
    scheduler.set_timesteps(num_steps)

    def step(x_t, timestep, noise):
        output = exact_v(scheduler.schedule, x_t, timestep)
        return scheduler.step(output, timestep, x_t, variance_noise=noise, return_dict=False)[0]

    assert output_std_ratio(step, scheduler.timesteps) == pytest.approx(1, rel=1e-12)


def test_it_is_lcm_where_that_visits_the_same_timesteps():
    ours = ConsistencyScheduler(clip_sample=True)
    stock = LCMScheduler.from_config(ours.config, original_inference_steps=4)
    assert stock.config.prediction_type == "v_prediction"
    stock.set_timesteps(4)
    ours.set_timesteps(timesteps=stock.timesteps.tolist())
    x = y = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    for t in ours.timesteps:
        x = ours.step(x.sin(), t, x, generator=generators[0]).prev_sample
        y = stock.step(y.sin(), t, y, generator=generators[1]).prev_sample
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_it_visits_the_timesteps_that_were_chosen_and_takes_the_path_of_another_scheduler():
    source = ExtDDIMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2", clip_sample=False)
    lists = {str(number): angle_timesteps(source.schedule, number) for number in (1, 2)}
    chosen = {"spacing": "trailing", "trajectory": lists}
    ours = ConsistencyScheduler.from_config(source.config, optimal_timesteps=chosen, timestep_spacing="optimal")
    assert torch.equal(ours.schedule.alpha, source.schedule.alpha) and not ours.config.clip_sample
    for number in (1, 2):
        ours.set_timesteps(number)
        assert ours.timesteps.tolist() == lists[str(number)]
