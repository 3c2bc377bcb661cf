"""Data whose best denoiser is known in closed form: x_0 ~ N(0, VARIANCE) in every coordinate.

Every sampler is then linear in x and noise, so its output's variance follows from two evaluations of `step` a step.
"""

import math

import torch

from diffusers_ext.diffusion.noising import NoiseSchedule, posterior, predict_eps, training_target


VARIANCE = 0.25

# Every pair of a root of the data's second moment and one of the noise's, so that means of quadratic forms are exact.
X0 = VARIANCE**0.5 * torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).view(4, 1, 1, 1)
EPS = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).view(4, 1, 1, 1)


def denoise(x_t, level):
    """E[x_0 | x_t]."""
    return VARIANCE * level.alpha * x_t / (VARIANCE * level.alpha**2 + level.sigma**2)


def model_output(schedule: NoiseSchedule, prediction_type: str, x_t, timestep):
    """What a perfectly trained network outputs."""
    level = schedule.level(timestep, x_t)
    x0 = denoise(x_t, level)
    return training_target(x0, predict_eps(x0, x_t, level), level, prediction_type)


def optimal_variance(schedule: NoiseSchedule, timestep, next_timestep) -> float:
    """Variance of x_s given x_t: that of the posterior, plus that of the x_0 that its mean depends on."""
    one = torch.ones(1, dtype=torch.float64)
    t, s = schedule.level(timestep, one), schedule.level(next_timestep, one)
    x0_variance = VARIANCE * t.sigma**2 / (VARIANCE * t.alpha**2 + t.sigma**2)
    step = posterior(one, 0 * one, t, s)
    return (step.std**2 + step.mean**2 * x0_variance).item()


def output_std_ratio(step, timesteps, start_std: float = 1.0) -> float:
    """std(x_0) / sqrt(VARIANCE) after sampling from N(0, start_std ** 2).

    Args:
        step: `step(x_t, timestep, noise) -> x_s`, linear in x_t and the noise.
    """
    unit = torch.tensor([1.0, 0.0], dtype=torch.float64).view(2, 1)
    variance = start_std**2
    for timestep in timesteps:
        gain, noise_gain = step(unit, timestep, 1 - unit).flatten().tolist()
        variance = gain**2 * variance + noise_gain**2
    return math.sqrt(variance / VARIANCE)
