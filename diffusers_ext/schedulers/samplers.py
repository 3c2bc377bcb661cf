"""Schedulers, of this package or of diffusers, as samplers of a model of ours: which can be, and with which timesteps.

All is read from what the scheduler does: its levels, its timesteps, what its step asks for. A list of names would not
know the next class of diffusers.
"""

import copy
import inspect
import warnings

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from diffusers_ext.diffusion.noising import PREDICTION_TYPES, training_target
from diffusers_ext.schedulers.gaussian import GaussianSchedulerMixin
from diffusers_ext.schedulers.levels import (
    PATH_TOLERANCE,
    is_linear,
    noise_level,
    path_difference,
    path_name,
    prediction_type_of,
)
from diffusers_ext.schedulers.sources import PATH_KEYS, defaults_of, has_betas, has_other_scale, kind_of_model


# How far a timestep may be, as a share of all, from the level of noise that its step is made at. Schedulers round, cut
# the list of sigmas at its ends and leave out the last level; those that ask the model another question are off by more.
LEVEL_TOLERANCE = 0.02

# How far PNDM's own step may be from the distance of its timesteps, as a share.
SPACING_TOLERANCE = 0.1

# What a step is called with, beside options that it takes by name.
STEP_ARGUMENTS = ("model_output", "timestep", "sample")


# What a network sees by the name of its path, and which schedulers sample it.
PATHS_IN_WORDS = {
    "vp": "a Gaussian path given by betas",
    "linear": "the linear path, x_t = (1 - t) x_0 + t eps",
    "ve": "the variance-exploding path",
    "subvp": "the sub-VP path",
}
SAMPLERS = {
    "vp": "ExtDDIMScheduler or another one with alphas_cumprod",
    "linear": "FlowScheduler, FlowMatchEulerDiscreteScheduler or, with use_flow_sigmas=True and "
    "prediction_type='flow_prediction', DPMSolverMultistepScheduler",
    "ve": "ScoreSDEScheduler with its path",
    "subvp": "ScoreSDEScheduler with its path",
}


def is_sampler(scheduler: SchedulerMixin, name: str) -> bool:
    """Whether a scheduler is of the class of diffusers with this name, which to import takes long and may need SciPy."""
    return any(cls.__name__ == name for cls in type(scheduler).__mro__)


def check_sampler(scheduler: SchedulerMixin, user: str, path: str | None = None) -> None:
    """Refuses a scheduler that does not sample, from noise to data, models of the path that its config says.

    Args:
        user: Who was to use it, for the error.
        path: That of its network as `path_name` has it, if it is known.

    Raises:
        ValueError: with both names and the kind of model that the scheduler is for.
    """
    if path not in (None, *PATHS_IN_WORDS):
        raise ValueError(f"noise_path must be one of {', '.join(PATHS_IN_WORDS)} or None, got {path!r}")
    name, config = type(scheduler).__name__, scheduler.config
    linear = is_linear(scheduler)
    has_table = isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor)
    if not (linear or has_table) or path not in (None, path_name(scheduler)):
        raise ValueError(_wrong_path(scheduler, user, path))
    if has_other_scale(config) and not isinstance(scheduler, GaussianSchedulerMixin):
        raise ValueError(
            f"scheduler must be ScoreSDEScheduler or AnnealedLangevinScheduler for {user}, whose model sees x_t of the path "
            f"{config['path']!r} as it is, got {name}, which is for models that see it at unit scale"
        )
    prediction_type = prediction_type_of(scheduler)
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"prediction_type must be one of {', '.join(PREDICTION_TYPES)} for {user}, got {prediction_type!r} of {name}"
        )
    if config.get("use_dynamic_shifting") or config.get("invert_sigmas"):
        key = "use_dynamic_shifting" if config.get("use_dynamic_shifting") else "invert_sigmas"
        raise ValueError(
            f"{key} must be False for {user}, got True of {name}: there is no resolution to shift by, and timestep 0 is the "
            f"data; make it by {name}.from_config(config, {key}=False)"
        )
    timesteps = getattr(scheduler, "timesteps", None)
    if isinstance(timesteps, Tensor) and len(timesteps) > 1 and timesteps[0] < timesteps[-1]:
        raise ValueError(
            f"scheduler must go from noise to data for {user}, got {name}, which goes from data to noise; for that there "
            "is the pipeline's invert"
        )
    more = _asked_for(scheduler)
    if more:
        raise ValueError(
            f"scheduler must be one whose step is called with the model's output alone for {user}, got {name}, whose asks "
            f"for {', '.join(more)} too; take {SAMPLERS[path_name(scheduler)]}"
        )
    if not linear:
        _check_levels(scheduler, user)
    elif not hasattr(scheduler, "level") and not _reaches_a_point(scheduler, prediction_type):
        raise ValueError(
            f"scheduler must lead the exact {prediction_type!r} of the linear path to the data for {user}, got {name}, with "
            f"whose config it does not: it is for {kind_of_model(name, config)} of another kind; take {SAMPLERS['linear']}"
        )
    if "LCMScheduler" in name or is_sampler(scheduler, "LCMScheduler"):
        warnings.warn(
            f"{name} is for models that were distilled to consistency: each step goes back to new noise from the predicted "
            "x_0, which of any other model has too little variance; if this model was not, take another scheduler",
            stacklevel=4,
        )


def _wrong_path(scheduler: SchedulerMixin, user: str, path: str | None) -> str:
    """The error for a scheduler of another path than the network's, or of none that is known."""
    name, cls = type(scheduler).__name__, type(scheduler)
    if has_betas(cls) and not is_linear(scheduler):
        kind = f"a model of {PATHS_IN_WORDS[path_name(scheduler)]}"
    else:
        kind = kind_of_model(name, scheduler.config if has_betas(cls) else {})
    path = "vp" if path is None else path
    return (
        f"scheduler must have {PATHS_IN_WORDS[path]}, as its network has, for {user}, got {name}, which is for {kind}; take "
        f"{SAMPLERS[path]}"
    )


def _reaches_a_point(scheduler: SchedulerMixin, prediction_type: str) -> bool:
    """Whether, from the exact outputs for data that are a single point, a scheduler ends at that point."""
    trial, point, x = copy.deepcopy(scheduler), 0.3, torch.ones(1, 1, 2, 2, device="cpu")
    options = {"generator": torch.Generator()} if "generator" in inspect.signature(trial.step).parameters else {}
    try:
        with torch.random.fork_rng(devices=[]):
            trial.set_timesteps(num_inference_steps=4)
            for t in trial.timesteps:
                if not 0 <= t <= trial.config.num_train_timesteps:
                    return False
                level = noise_level(trial, t, x)
                eps = (x - level.alpha * point) / level.sigma
                output = training_target(torch.full_like(x, point), eps, level, prediction_type)
                x = trial.step(output, t, x, **options).prev_sample
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False  # it asks for something else
    return bool((x - point).abs().max() < 0.05)


def set_timesteps(
    scheduler: SchedulerMixin,
    num_inference_steps: int | None,
    timesteps: list[int] | None,
    strength: float,
    device: torch.device,
) -> tuple[SchedulerMixin, Tensor]:
    """The scheduler that samples, set to a number of steps or to given timesteps, and the timesteps to visit.

    Args:
        scheduler: Of the pipeline. It is the one that samples, but for PNDM from an image.
        strength: Share of the steps to make, the last ones, in [0, 1].

    Raises:
        ValueError: if the scheduler cannot make these steps, or cannot begin in their middle.
    """
    if strength < 1 and is_sampler(scheduler, "PNDMScheduler"):
        # Its Runge-Kutta steps are for the start from noise; from the middle its multistep rule goes alone.
        scheduler = type(scheduler).from_config(scheduler.config, skip_prk_steps=True)
    num_steps = num_inference_steps if timesteps is None else len(timesteps)
    _set_all(scheduler, num_steps, timesteps, device)
    if strength == 1:
        return scheduler, scheduler.timesteps
    # The small number is for shares such as 0.29, of which 100 are 28.999... in floating point.
    first = num_steps - int(num_steps * strength + 1e-6)
    if is_sampler(scheduler, "PNDMScheduler"):
        # Its list has the second timestep twice: the first step is made again with the mean of both predictions.
        each = torch.cat([scheduler.timesteps[:1], scheduler.timesteps[2:]])[first:]
        scheduler.timesteps = torch.cat([each[:2], each[1:]])
        return scheduler, scheduler.timesteps
    order = scheduler.order
    # Solvers of a higher order visit some timesteps in pairs, all but the last or the first.
    if len(scheduler.timesteps) not in (num_steps * order, num_steps * order - order + 1):
        raise ValueError(
            f"strength must be 1 for {type(scheduler).__name__}, whose {len(scheduler.timesteps)} timesteps for {num_steps} "
            f"steps cannot be entered in the middle, got {strength}; take DPMSolverMultistepScheduler or ExtDDIMScheduler"
        )
    first *= order
    if is_sampler(scheduler, "LMSDiscreteScheduler"):
        # It counts the steps that it remembers from the start of its list, which so has to be the first visited one.
        scheduler.timesteps, scheduler.sigmas = scheduler.timesteps[first:], scheduler.sigmas[first:]
        return scheduler, scheduler.timesteps
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return scheduler, scheduler.timesteps[first:]


def _set_all(scheduler: SchedulerMixin, num_steps: int, timesteps: list[int] | None, device: torch.device) -> None:
    name = type(scheduler).__name__
    if timesteps is not None and "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError(f"{name} takes no timesteps; give num_inference_steps")
    options = {"num_inference_steps": num_steps} if timesteps is None else {"timesteps": timesteps}
    try:
        scheduler.set_timesteps(**options, device=device)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{name} cannot make {num_steps} steps; take another number or scheduler: {error}") from error
    _check_timesteps(scheduler, num_steps)


def _check_timesteps(scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    """Refuses timesteps, as set, at which the scheduler has no numbers or is at another level than that of the timestep that the model gets.

    Raises:
        ValueError: with what to do.
    """
    name = type(scheduler).__name__
    for key in ("timesteps", "sigmas"):
        value = getattr(scheduler, key, None)
        if isinstance(value, Tensor) and not value.isfinite().all():
            raise ValueError(
                f"{name} has {key} that are not finite with {num_inference_steps} steps: take another "
                "num_inference_steps, timestep_spacing or scheduler"
            )
    if is_sampler(scheduler, "PNDMScheduler"):
        _check_spacing(scheduler)
    sigmas, order = getattr(scheduler, "sigmas", None), getattr(scheduler, "order", 1)
    if not isinstance(sigmas, Tensor) or len(sigmas) < len(scheduler.timesteps):
        return
    asked = scheduler.timesteps[::order].cpu().double().numpy()  # between them are points of the solver's own
    levels = sigmas[::order][: len(asked)].cpu().double().numpy()
    distance = np.abs(_timesteps_of(scheduler, levels) - asked)
    worst = distance.argmax()
    if distance[worst] > max(4, LEVEL_TOLERANCE * scheduler.config.num_train_timesteps):
        raise ValueError(
            f"{name} would give the model the timestep {asked[worst]:.4g} where its own level of noise is that of another, "
            f"{asked[worst] + distance[worst]:.4g} or {asked[worst] - distance[worst]:.4g}: it is set for a model of another "
            "conditioning (interpolation_type or timestep_type of its config)"
        )


def _timesteps_of(scheduler: SchedulerMixin, sigmas: np.ndarray) -> np.ndarray:
    """The timesteps at which a model knows these sigmas of a scheduler of diffusers."""
    if is_linear(scheduler):
        return sigmas * scheduler.config.num_train_timesteps
    alpha_bar = scheduler.alphas_cumprod.cpu().double().numpy()
    with np.errstate(divide="ignore"):
        levels = np.log1p(-alpha_bar) - np.log(alpha_bar)
        return np.interp(2 * np.log(sigmas), levels, np.arange(len(levels)))


def _check_spacing(scheduler: SchedulerMixin) -> None:
    """Refuses timesteps that PNDM does not follow: it steps by T // n, whatever its list says."""
    length, number = scheduler.config.num_train_timesteps, scheduler.num_inference_steps
    step, listed = length // number, (length - 1) / max(number - 1, 1)
    if scheduler.config.timestep_spacing == "linspace" and abs(listed - step) > SPACING_TOLERANCE * step:
        raise ValueError(
            f"PNDMScheduler steps by {step} timesteps with {number} steps, and those of 'linspace' are {listed:.0f} apart: "
            "take more steps, another timestep_spacing or DPMSolverMultistepScheduler"
        )


def _asked_for(scheduler: SchedulerMixin) -> list[str]:
    """Arguments of `step` without which it cannot be made, or is made to a wrong level."""
    parameters = inspect.signature(scheduler.step).parameters.values()
    required = [
        each.name
        for each in parameters
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    # Without it the step is one of the training's, whatever the list of timesteps.
    spaced = ["prev_timestep"] if any(each.name == "prev_timestep" for each in parameters) else []
    return [name for name in (*required, *spaced) if name not in STEP_ARGUMENTS]


def _check_levels(scheduler: SchedulerMixin, user: str) -> None:
    """Refuses levels of noise that are not those of the path in the scheduler's own config."""
    if isinstance(scheduler, GaussianSchedulerMixin):
        return  # made of it
    name, config = type(scheduler).__name__, scheduler.config
    keys = (*PATH_KEYS, "trained_betas", "rescale_betas_zero_snr")
    path = {key: config[key] for key in keys if config.get(key) is not None}
    try:
        difference = path_difference(path, scheduler)
    except ValueError:  # a schedule of diffusers that has no name here
        return
    if difference > PATH_TOLERANCE:
        unread = [key for key in path if key not in defaults_of(type(scheduler))]
        reason = f"does not read {', '.join(unread)}" if unread else "changes the betas in a way of its own"
        raise ValueError(
            f"scheduler must have the levels of noise that its config says for {user}, got {name}, which {reason}: its "
            f"alpha_bar is off by up to {difference:.2g}; take ExtDDIMScheduler or another one that does not"
        )
