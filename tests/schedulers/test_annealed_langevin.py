"""Langevin dynamics over the levels of a path: the algorithm box, its end, and what it makes of Gaussian data."""

import math

import pytest
import torch

from diffusers_ext import AnnealedLangevinScheduler
from diffusers_ext.schedulers.sources import SCHEDULER_PATHS
from gaussian_oracle import VARIANCE, model_output


def make(path="ve", prediction_type="v_prediction", **options):
    return AnnealedLangevinScheduler(path=path, prediction_type=prediction_type, **options)


def test_steps_are_the_papers():
    """Algorithm 1 in numbers of Python, over three levels of two steps."""
    scheduler = make(prediction_type="score", num_langevin_steps=2, step_size=3e-5, final_denoising=False)
    scheduler.set_timesteps(timesteps=[900, 400, 0])
    assert scheduler.timesteps.tolist() == [900, 900, 400, 400, 0, 0] and scheduler.order == 2
    x, z = torch.randn(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = expected = x
    for t in scheduler.timesteps:
        sigma, last = (0.01 * 5000 ** ((i + 1) / 1000) for i in (int(t), 0))
        step = 3e-5 * sigma**2 / last**2
        score = (0.3 - expected) / sigma**2
        expected = expected + step / 2 * score + math.sqrt(step) * z
        result = scheduler.step(score, t, result, variance_noise=z).prev_sample
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("path", SCHEDULER_PATHS)
def test_the_last_call_denoises_without_noise(path):
    scheduler = make(path, "sample", num_langevin_steps=3)
    scheduler.set_timesteps(4)
    x, x0 = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    for t in scheduler.timesteps:
        state = generator.get_state()
        x = scheduler.step(x0, t, x, generator=generator).prev_sample
    torch.testing.assert_close(x, x0)
    assert torch.equal(generator.get_state(), state)


def test_what_a_last_call_returns_shares_no_memory():
    scheduler = make(prediction_type="sample", num_langevin_steps=1)
    scheduler.set_timesteps(2)
    x, x0 = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    before = x0.clone()
    result = scheduler.step(x0, scheduler.timesteps[-1], x)
    result.prev_sample.add_(1)
    assert torch.equal(x0, before) and torch.equal(result.pred_original_sample, before)


def test_samples_that_are_through_are_denoised_while_others_go_on():
    scheduler = make(prediction_type="sample", num_langevin_steps=1)
    scheduler.set_timesteps(3)
    x, x0 = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    result = scheduler.step(x0, torch.tensor([999, 0]), x).prev_sample
    torch.testing.assert_close(result[1], x0[1])
    assert (result[0] - x0[0]).abs().min() > 1e-3


@pytest.mark.parametrize("path", SCHEDULER_PATHS)
def test_gaussian_data_come_out_with_their_variance(path):
    """Of a chain that is long enough; steps of a tenth of sigma^2 leave a few percent."""
    scheduler = make(path, num_langevin_steps=20)
    scheduler.set_timesteps(50)
    variance, units = scheduler.init_noise_sigma**2, torch.eye(2, dtype=torch.float64)[..., None]
    for t in scheduler.timesteps:
        output = model_output(scheduler.schedule, "v_prediction", units[0], t)
        # x and noise as two samples: the step is linear in both.
        x, noise = units[0], units[1]
        gains = scheduler.step(output, t, x, variance_noise=noise).prev_sample.flatten()
        variance = gains[0].item() ** 2 * variance + gains[1].item() ** 2
    assert math.sqrt(variance / VARIANCE) == pytest.approx(1.0, abs=0.09)


def test_step_sizes_that_diverge_are_refused():
    with pytest.raises(
        ValueError, match=r"step_size must be above 0 and below 2 sigma\^2 of timestep 0, 0.0002.*got 1"
    ):
        make(step_size=1.0)
    with pytest.raises(ValueError, match="num_langevin_steps must be an integer of at least 1, got 0"):
        make(num_langevin_steps=0)


def test_a_level_without_noise_is_refused():
    with pytest.raises(
        ValueError, match="each level must have noise, .*, got sigma 0 at timestep 0: raise beta_start"
    ):
        AnnealedLangevinScheduler(num_train_timesteps=50, beta_start=0.0)
