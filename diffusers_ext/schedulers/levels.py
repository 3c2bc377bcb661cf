"""The noising path behind a scheduler, of this package or of diffusers: its levels, and whether two are the same."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from diffusers_ext.diffusion.noising import NoiseLevel, NoiseSchedule
from diffusers_ext.schedulers.scheduling_ddpm import ExtDDPMScheduler
from diffusers_ext.schedulers.sources import PATH_KEYS


# Of alpha_bar; what float32 tables and clamps at zero signal leave of equal paths.
PATH_TOLERANCE = 1e-3


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
    alpha_bar = alpha_bar.cpu().double().numpy()
    with np.errstate(divide="ignore"):  # infinite at a level without signal
        ratio = np.interp(float(timestep), np.arange(len(alpha_bar)), np.sqrt((1 - alpha_bar) / alpha_bar))
    alpha = (1 + ratio**2) ** -0.5
    pair = torch.tensor([alpha, (1 - alpha**2) ** 0.5], dtype=torch.promote_types(like.dtype, torch.float32))
    return NoiseLevel(*pair.to(like.device).view(2, -1, *[1] * (like.ndim - 1)))


def describe_path(scheduler: SchedulerMixin) -> dict[str, Any]:
    """The noising path of a scheduler, as config keys from which it can be made again."""
    keys = (*PATH_KEYS, "rescale_betas_zero_snr", "beta_reference_timesteps", "trained_betas")
    path = {key: scheduler.config[key] for key in keys if scheduler.config.get(key) is not None}
    named = {key: value for key, value in path.items() if key != "trained_betas"}
    try:
        same = path_difference(named, scheduler) < PATH_TOLERANCE
    except ValueError:  # a schedule of diffusers that has no name here
        same = False
    return named if same else path


def path_difference(path: Mapping[str, Any], scheduler: SchedulerMixin) -> float:
    """The largest difference of alpha_bar between a path of `describe_path` and that of a scheduler.

    Infinite if they have different numbers of timesteps.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sampling from it
        mine = ExtDDPMScheduler(**path, prediction_type="sample").alphas_cumprod
    theirs = scheduler.alphas_cumprod.to(mine)
    return (mine - theirs).abs().max().item() if mine.shape == theirs.shape else float("inf")
