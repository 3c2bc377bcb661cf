"""The noise level that a sampler is at, for the schedulers of this package and for those of diffusers."""

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from diffusers_ext.noising import NoiseLevel, NoiseSchedule


def noise_level(scheduler: SchedulerMixin, timestep: Tensor | float, like: Tensor) -> NoiseLevel:
    """The level of what a network sees at `timestep`, on the variance-preserving path that it was trained on.

    Between the trained timesteps, where some samplers of diffusers go, sigma / alpha is interpolated as they do.

    Args:
        timestep: One for all samples.
        like: Gives the device, the number of dimensions and, if it is wider than float32, the dtype.

    Raises:
        ValueError: if the scheduler has no such path.
    """
    schedule = getattr(scheduler, "schedule", None)
    if isinstance(schedule, NoiseSchedule):
        return schedule.level(timestep, like)
    alpha_bar = getattr(scheduler, "alphas_cumprod", None)
    if alpha_bar is None:
        raise ValueError(
            f"the noise level at a timestep must be known, and {type(scheduler).__name__} has no alphas_cumprod; take a "
            "scheduler of a variance-preserving path, such as ExtDDIMScheduler"
        )
    alpha_bar = alpha_bar.double().cpu().numpy()
    ratio = np.interp(float(timestep), np.arange(len(alpha_bar)), np.sqrt((1 - alpha_bar) / alpha_bar))
    dtype = torch.promote_types(like.dtype, torch.float32)
    alpha = torch.tensor((1 + ratio**2) ** -0.5, dtype=dtype, device=like.device).view(-1, *[1] * (like.ndim - 1))
    return NoiseLevel(alpha, ratio * alpha)
