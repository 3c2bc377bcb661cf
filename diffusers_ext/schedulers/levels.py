"""The noising path behind a scheduler, of this package or of diffusers: its levels, and whether two are the same."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from diffusers_ext.diffusion.noising import NoiseLevel, NoiseSchedule, add_noise
from diffusers_ext.diffusion.paths import PATHS, Linear, PathSchedule
from diffusers_ext.schedulers.scheduling_ddpm import ExtDDPMScheduler
from diffusers_ext.schedulers.sources import (
    FLOW_MODEL,
    FLOW_PREDICTION,
    MEANT_BY_ABSENCE,
    PATH_KEYS,
    defaults_of,
    has_betas,
    has_other_scale,
    is_flow,
    kind_of_model,
)


# Of alpha_bar; what float32 tables and clamps at zero signal leave of equal paths.
PATH_TOLERANCE = 1e-3


def noise_level(scheduler: SchedulerMixin, timestep: Tensor | float, like: Tensor) -> NoiseLevel:
    """The level of what a network sees at `timestep`, on the path that it was trained on, at its scale.

    Between the trained timesteps, where some samplers of diffusers go, sigma / alpha is interpolated as they do.

    Args:
        timestep: One for all samples.
        like: Gives the device, the number of dimensions and, if it is wider than float32, the dtype.

    Raises:
        ValueError: if the scheduler has no such path.
    """
    if hasattr(scheduler, "level"):
        level = scheduler.level(timestep, like)
        return (
            NoiseLevel(level.alpha / level.scale, level.sigma / level.scale) if _divides_by_scale(scheduler) else level
        )
    if is_linear(scheduler):
        return Linear().level(_flow_sigma(scheduler, timestep, like))
    alpha_bar = getattr(scheduler, "alphas_cumprod", None)
    if alpha_bar is None:
        raise ValueError(
            f"the noise level at a timestep must be known, and {type(scheduler).__name__} has no alphas_cumprod; take a "
            "scheduler of a Gaussian path, such as ExtDDIMScheduler or FlowScheduler"
        )
    alpha_bar = alpha_bar.cpu().double().numpy()
    with np.errstate(divide="ignore"):  # infinite at a level without signal
        ratio = np.interp(float(timestep), np.arange(len(alpha_bar)), np.sqrt((1 - alpha_bar) / alpha_bar))
    alpha = (1 + ratio**2) ** -0.5
    pair = torch.tensor(
        [alpha, (1 - alpha**2) ** 0.5], dtype=torch.promote_types(like.dtype, torch.float32), device="cpu"
    )
    return NoiseLevel(*pair.to(like.device).view(2, -1, *[1] * (like.ndim - 1)))


def _flow_sigma(scheduler: SchedulerMixin, timestep: Tensor | float, like: Tensor) -> Tensor:
    """Sigma at a timestep of a solver of diffusers on the linear path: that of its list, or timestep / T."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    timestep = torch.as_tensor(timestep, device=like.device, dtype=dtype).reshape(-1, *[1] * (like.ndim - 1))
    listed, sigmas = scheduler.timesteps.to(like.device, dtype), scheduler.sigmas.to(like.device, dtype)
    sigma = timestep / scheduler.config.num_train_timesteps
    if len(sigmas) >= len(listed):  # some round their timesteps
        distance, index = (listed - timestep.view(-1, 1)).abs().min(dim=1)
        sigma = torch.where((distance == 0).view_as(timestep), sigmas[index].view_as(timestep), sigma)
    return sigma


def add_noise_at(scheduler: SchedulerMixin, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """x_t for the standard normal draw `noise`, as the scheduler has it.

    Args:
        timesteps: One for all samples, shape `(1,)`.
    """
    if is_linear(scheduler):  # of which some have no `add_noise`, and others one that goes by a counter of steps
        return add_noise(x0, noise, noise_level(scheduler, timesteps, x0)).to(x0.dtype)
    return scheduler.add_noise(x0, noise, timesteps)


def model_input(scheduler: SchedulerMixin, x_t: Tensor, timestep: Tensor) -> Tensor:
    """What the network sees of x_t."""
    scale = getattr(scheduler, "scale_model_input", None)  # that some solvers of the linear path do not have
    return x_t if scale is None else scale(x_t, timestep)


def start_scale(scheduler: SchedulerMixin) -> float | Tensor:
    """The standard deviation of the noise that sampling starts from."""
    return getattr(scheduler, "init_noise_sigma", 1.0)


def path_name(scheduler: SchedulerMixin) -> str:
    """The path of what a scheduler's networks see, one of `PATHS`: "vp" for all levels at unit scale."""
    if is_linear(scheduler):
        return "linear"
    return scheduler.config["path"] if has_other_scale(scheduler.config) else "vp"


def prediction_type_of(scheduler: SchedulerMixin) -> str:
    """What the networks of a scheduler output, one of `PREDICTION_TYPES` for those that we know."""
    absent = "flow" if is_linear(scheduler) else MEANT_BY_ABSENCE["prediction_type"]
    named = scheduler.config.get("prediction_type", absent)
    return "flow" if named == FLOW_PREDICTION else named


def model_schedule(scheduler: SchedulerMixin) -> NoiseSchedule:
    """The path that a scheduler's network was trained on, at the scale at which it sees x_t, and with its timesteps as labels.

    Raises:
        ValueError: if the scheduler has no Gaussian path that is known here.
    """
    if is_linear(scheduler):
        return PathSchedule(Linear(), scheduler.config.num_train_timesteps, first_label=1)
    schedule = getattr(scheduler, "schedule", None)
    if isinstance(schedule, NoiseSchedule):
        # A sampler may end at another level than the data, and be at another scale than its network.
        is_seen = schedule.sigma[-1] == 0 and not _divides_by_scale(scheduler)
        return schedule if is_seen else NoiseSchedule(schedule.betas)
    name, config = type(scheduler).__name__, scheduler.config
    if not has_betas(type(scheduler)) or is_flow(config):
        raise ValueError(
            f"a Gaussian noising path must be known, and that of {name}, for {kind_of_model(name, config)}, is not; take the "
            "scheduler of this package that the model was trained with, or ExtDDIMScheduler for a path given by betas"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ExtDDPMScheduler.from_config(config).schedule


def describe_path(scheduler: SchedulerMixin) -> dict[str, Any]:
    """The path of `model_schedule`, as options from which `schedule_of` makes it again."""
    schedule = model_schedule(scheduler)
    if isinstance(schedule, PathSchedule):
        name = next(name for name, cls in PATHS.items() if type(schedule.path) is cls)
        return {"path": name, "num_train_timesteps": len(schedule)} | dataclasses.asdict(schedule.path)
    keys = (*PATH_KEYS, "rescale_betas_zero_snr", "beta_reference_timesteps", "trained_betas")
    path = {key: scheduler.config[key] for key in keys if scheduler.config.get(key) is not None}
    named = {key: value for key, value in path.items() if key != "trained_betas"}
    try:
        same = path_difference(named, scheduler) < PATH_TOLERANCE
    except ValueError:  # a schedule of diffusers that has no name here
        same = False
    return named if same else path


def schedule_of(path: Mapping[str, Any]) -> NoiseSchedule:
    """The noise levels of a path as `describe_path` has it.

    Raises:
        ValueError: if it is no such path.
    """
    if path.get("path") is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sampling from it
            return ExtDDPMScheduler(**path, prediction_type="sample").schedule  # the type that any path allows
    numbers = {name: value for name, value in path.items() if name not in ("path", "num_train_timesteps")}
    kind = PATHS[path["path"]](**numbers)
    return PathSchedule(kind, path["num_train_timesteps"], first_label=int(isinstance(kind, Linear)))


def path_difference(path: Mapping[str, Any], scheduler: SchedulerMixin) -> float:
    """The largest difference of alpha_bar between a path of `describe_path` and the levels that a scheduler has.

    Infinite if they have different numbers of timesteps, or networks see x_t at different scales.

    Raises:
        ValueError: if either is no path that is known here.
    """
    mine, table = schedule_of(path), getattr(scheduler, "alphas_cumprod", None)
    if isinstance(table, Tensor) and not hasattr(scheduler, "level") and not is_linear(scheduler):
        alpha_bar = table.cpu().double()  # which need not be that of the scheduler's config
        scale = torch.ones_like(alpha_bar)
    else:
        theirs = model_schedule(scheduler)
        alpha_bar, scale = theirs.alpha_bar[:-1], theirs.scale[:-1]
    if len(alpha_bar) != len(mine) or not torch.allclose(scale, mine.scale[:-1], rtol=PATH_TOLERANCE):
        return float("inf")
    return (mine.alpha_bar[:-1] - alpha_bar).abs().max().item()


def learned_timesteps(scheduler: SchedulerMixin, num_inference_steps: int) -> list[int]:
    """The timesteps at the times 1, 1 - 1/n, ..., 1/n of the schedule that a model of path "learned" was trained with.

    They are for `timesteps` of a pipeline's call. Where the loss has much variance the schedule goes slowly, and so do they.

    Raises:
        ValueError: if the scheduler's model has no such schedule, or the number does not fit.
    """
    table, length = scheduler.config.get("_learned_timesteps"), scheduler.config.num_train_timesteps
    if table is None:
        raise ValueError("the scheduler must be that of a model whose schedule was learned (--path learned)")
    if not 1 <= num_inference_steps <= length:
        raise ValueError(f"num_inference_steps must be in [1, {length}], got {num_inference_steps}")
    times = np.arange(num_inference_steps, 0, -1) / num_inference_steps
    visited = np.interp(times, np.linspace(0, 1, len(table)), table).round().astype(int)
    # No two the same: those that would be are moved down, and at the end up.
    for index in range(1, len(visited)):
        visited[index] = min(visited[index], visited[index - 1] - 1)
    return np.maximum(visited, np.arange(num_inference_steps - 1, -1, -1)).tolist()


def path_in_words(path: Mapping[str, Any]) -> str:
    """A path of `describe_path`, for errors."""
    name = path.get("path") or path["beta_schedule"]
    return f"{name!r} of {path['num_train_timesteps']} timesteps"


def is_linear(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler is one of rectified flow, whose timesteps are T t."""
    cls, config = type(scheduler), scheduler.config
    if has_betas(cls):
        return "use_flow_sigmas" in defaults_of(cls) and is_flow(config)
    # By its class alone: a config keeps keys that the class does not read.
    return not hasattr(scheduler, "alphas_cumprod") and kind_of_model(cls.__name__, {}) == FLOW_MODEL


def _divides_by_scale(scheduler: SchedulerMixin) -> bool:
    """Whether the network of a scheduler of ours sees x_t / sqrt(alpha^2 + sigma^2)."""
    return scheduler.config.get("unit_scale_input", False)
