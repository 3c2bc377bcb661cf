"""Which guider acts in a call, and in which of its steps."""

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from diffusers.guiders import BaseGuidance, ClassifierFreeGuidance, ClassifierFreeZeroStarGuidance
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from diffusers_ext.guidance.guided_denoiser import check_guidance_rescale, check_guidance_scale, prepare_inputs
from diffusers_ext.guidance.guiders import ClassifierGuidance, ComposedGuidance, InternalGuidance
from diffusers_ext.schedulers.levels import noise_level


# Units of an interval.
INTERVAL_UNITS = ("steps", "sigma", "timestep")

Interval = tuple[float, float] | Mapping[str, tuple[float, float]]


@contextmanager
def without_notice(logger: str = "diffusers.guiders.guider_utils") -> Iterator[None]:
    """Keeps a logger silent; by default that of diffusers' guiders, whose notice is for users who name one themselves."""
    notice = logging.getLogger(logger)
    before, notice.disabled = notice.disabled, True
    try:
        yield
    finally:
        notice.disabled = before


@without_notice()
def choose_guider(
    guider: BaseGuidance | None,
    guidance_scale: float | None = None,
    guidance_rescale: float = 0.0,
    classifier_scale: float = 0.0,
    internal_guidance_scale: float = 1.0,
    *,
    weighted: bool = False,
) -> BaseGuidance | None:
    """The guider of a call: the one given, or what the short forms mean; `None` for the conditional prediction alone.

    Args:
        guider: Of the call or of its pipeline.
        guidance_scale, guidance_rescale, classifier_scale, internal_guidance_scale: Short forms, for a call without a guider.
        weighted: Whether the labels of the call have weights.

    Raises:
        ValueError: if more than one of them is given, or one of them is out of range.
    """
    if guider is not None:
        short = {
            "guidance_scale": (guidance_scale, None),
            "guidance_rescale": (guidance_rescale, 0),
            "classifier_scale": (classifier_scale, 0),
            "internal_guidance_scale": (internal_guidance_scale, 1),
        }
        for name, (value, default) in short.items():
            if value != default:
                raise ValueError(
                    f"{name} must not be given together with a guider, which has a scale of its own, got {value}; give the "
                    "guider that you want for this call as guider="
                )
        _check_settings(guider)
        return guider
    if weighted:
        if guidance_scale is not None or classifier_scale != 0 or internal_guidance_scale != 1:
            raise ValueError(
                "class_labels with weights are a guidance of their own, which goes with no guidance_scale, classifier_scale or "
                "internal_guidance_scale"
            )
        return ComposedGuidance(guidance_rescale=guidance_rescale)
    check_guidance_rescale(guidance_rescale)
    guidance_scale = 1.0 if guidance_scale is None else guidance_scale
    if classifier_scale and internal_guidance_scale != 1:
        raise ValueError(
            "classifier_scale and internal_guidance_scale are two guiders, of which a call has one: leave one of them out"
        )
    if internal_guidance_scale != 1:
        return InternalGuidance(internal_guidance_scale, guidance_scale, guidance_rescale)
    if classifier_scale:
        return ClassifierGuidance(classifier_scale, guidance_scale, guidance_rescale=guidance_rescale)
    return classifier_free_guidance(guidance_scale, guidance_rescale)


def classifier_free_guidance(guidance_scale: float, guidance_rescale: float = 0.0) -> ClassifierFreeGuidance | None:
    """The guider for a scale, where 1 is the conditional prediction alone (Ho & Salimans 2022, with w = scale - 1).

    At a scale of 1 there is nothing to guide: `None`, so that a step costs one call of the network.

    Args:
        guidance_rescale: In [0, 1], how far the result gets the standard deviation of the conditional prediction
            back (Lin et al. 2023, arXiv 2305.08891, Section 3.4).

    Raises:
        ValueError: if the scale is not finite or is negative.
    """
    check_guidance_scale(guidance_scale)
    if guidance_scale == 1.0:
        return None
    return ClassifierFreeGuidance(guidance_scale=float(guidance_scale), guidance_rescale=float(guidance_rescale))


def _check_settings(guider: BaseGuidance) -> None:
    """Refuses what is no guider, and settings with which a guider of diffusers would silently make NaN."""
    if not isinstance(guider, BaseGuidance):
        raise ValueError(
            f"guider must be one of diffusers.guiders or of this package, made by its class, got {guider!r}"
        )
    name = type(guider).__name__
    scale = getattr(guider, "guidance_scale", 1.0)
    if not math.isfinite(scale):
        raise ValueError(f"{name} must have a finite guidance_scale, got {scale}")
    is_zero_star = isinstance(guider, ClassifierFreeZeroStarGuidance)
    if is_zero_star and guider.zero_init_steps > 0 and guider.guidance_rescale > 0:
        raise ValueError(
            f"{name} must have zero_init_steps=0 or guidance_rescale=0, since what it makes of the first steps, zeros, has "
            f"no standard deviation to rescale; got {guider.zero_init_steps} and {guider.guidance_rescale}"
        )
    layers = getattr(guider, "auto_guidance_config", None) or getattr(guider, "skip_layer_config", None) or ()
    if any(getattr(config, "dropout", 1.0) < 1 for config in layers):
        warnings.warn(
            f"{name} with a dropout below 1 draws from torch's global generator, so that an image is not its generator's "
            "alone; a dropout of 1 drops the layers entirely",
            stacklevel=9,
        )


def asks_for_unconditional(guider: BaseGuidance, timesteps: Tensor, guide: Sequence[bool]) -> bool:
    """Whether in any of the steps in which it acts a guider asks for a prediction without the condition."""
    for step, (timestep, acts) in enumerate(zip(timesteps, guide, strict=True)):
        if not acts:
            continue
        guider.set_state(step=step, num_inference_steps=len(timesteps), timestep=timestep)
        if any(getattr(batch, guider._identifier_key) == "pred_uncond" for batch in prepare_inputs(guider, {})):
            return True
    return False


def guided_steps(interval: Interval | None, scheduler: SchedulerMixin, timesteps: Tensor) -> list[bool]:
    """In which of the steps guidance acts (limited interval: Kynkaanniemi et al. 2024, arXiv 2404.07724).

    Args:
        interval: `(start, stop)` as fractions of the steps, start included, as diffusers' guiders have them. Or by
            name, with both ends included: `{"sigma": (low, high)}` for sigma / alpha, the paper's noise level, or
            `{"timestep": (low, high)}`.

    Raises:
        ValueError: if the interval is out of order or out of range, or of an unknown unit.
    """
    if interval is None:
        return [True] * len(timesteps)
    by_name = interval if isinstance(interval, Mapping) else {"steps": interval}
    if len(by_name) != 1 or next(iter(by_name)) not in INTERVAL_UNITS:
        raise ValueError(
            f"guidance_interval must be (start, stop) or of one of the units {', '.join(INTERVAL_UNITS)}, such as "
            f"{{'sigma': (0.2, 5.0)}}, got {interval!r}"
        )
    (unit, bounds), *_ = by_name.items()
    largest = 1.0 if unit == "steps" else float("inf")
    try:
        low, high = map(float, bounds)
    except (TypeError, ValueError):
        low = high = float("nan")
    if not 0 <= low <= high <= largest:
        limit = " in [0, 1]" if unit == "steps" else " of at least 0"
        raise ValueError(
            f"guidance_interval must be two numbers{limit}, the smaller one first, got {bounds!r} ({unit})"
        )
    if unit == "steps":
        first, end = int(low * len(timesteps)), int(high * len(timesteps))
        guide = [first <= i < end for i in range(len(timesteps))]
    else:
        values = timesteps.tolist()
        if unit == "sigma":
            like = torch.zeros(1, dtype=torch.float64)
            levels = [noise_level(scheduler, t, like) for t in timesteps.cpu()]
            values = [(level.sigma / level.alpha).item() for level in levels]
        guide = [low <= value <= high for value in values]
    if guide and low < high and not any(guide):
        warnings.warn(
            f"guidance_interval holds none of the {len(guide)} steps, so that none is guided: got {bounds!r} ({unit})",
            stacklevel=6,
        )
    return guide
