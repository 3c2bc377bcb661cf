"""What a pipeline's call does where it does not say it: as the pipeline was saved, such as `training/calibrate.py` chose.

They are in the pipeline's config, under `call_defaults`, and not a guider among its components: beside that no call could say
another `guidance_scale`.
"""

from collections.abc import Mapping
from typing import Any

from diffusers_ext.guidance.guided_denoiser import check_guidance_scale


# Of a pipeline that was saved without.
DEFAULT_NUM_STEPS = 50

CALL_DEFAULTS = ("num_inference_steps", "guidance_scale", "guidance_interval", "start_timestep")

# Arguments of a call that say where it starts, beside which the default does not count.
SAYS_START = ("start_timestep", "latents", "image", "timesteps")

# Arguments of a call that say by what to guide, with the value that says nothing: one that does takes the place of all the
# defaults of guidance, which were chosen together. Those that say where, and how much of it, are about what there is.
SAYS_GUIDANCE = {
    "guider": None,
    "guidance_scale": None,
    "classifier_scale": 0.0,
    "internal_guidance_scale": 1.0,
}
OF_GUIDANCE = ("guidance_scale", "guidance_interval")


def check_call_defaults(defaults: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The defaults as they are saved.

    Args:
        defaults: From some of `CALL_DEFAULTS` to their values; an interval must be by the name of its unit, such as
            `{"sigma": [0.3, 5.0]}`, and goes with a scale.

    Raises:
        ValueError: if there is another name, or a value is out of range.
    """
    if not defaults:
        return None
    unknown = [name for name in defaults if name not in CALL_DEFAULTS]
    if unknown:
        raise ValueError(
            f"call_defaults must be among {', '.join(CALL_DEFAULTS)}, got {', '.join(map(repr, unknown))}"
        )
    steps = defaults.get("num_inference_steps", 1)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"num_inference_steps of call_defaults must be an integer of at least 1, got {steps!r}")
    start = defaults.get("start_timestep", 0)
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise ValueError(f"start_timestep of call_defaults must be an integer of at least 0, got {start!r}")
    if "guidance_scale" in defaults:
        check_guidance_scale(defaults["guidance_scale"])
    saved = dict(defaults)
    if (interval := defaults.get("guidance_interval")) is not None:
        if "guidance_scale" not in defaults or not isinstance(interval, Mapping) or len(interval) != 1:
            raise ValueError(
                "guidance_interval of call_defaults must be a dict of its unit, such as {'sigma': [0.3, 5.0]}, beside a "
                f"guidance_scale, got {interval!r}"
            )
        saved["guidance_interval"] = {unit: list(bounds) for unit, bounds in interval.items()}
    return saved


def says_guidance(given: Mapping[str, Any]) -> bool:
    """Whether a call, by its arguments, says by what to guide."""
    return any(given.get(name, nothing) != nothing for name, nothing in SAYS_GUIDANCE.items())


def with_defaults(given: Mapping[str, Any], defaults: Mapping[str, Any] | None, can_guide: bool) -> dict[str, Any]:
    """Values of the arguments that a call has left open.

    Args:
        given: The arguments of the call by name.
        defaults: Of the pipeline.
        can_guide: Whether the condition of this call is one to guide to.
    """
    defaults, filled = defaults or {}, {}
    if given["num_inference_steps"] is None:
        filled["num_inference_steps"] = defaults.get("num_inference_steps", DEFAULT_NUM_STEPS)
    if all(given.get(name) is None for name in SAYS_START) and "start_timestep" in defaults:
        filled["start_timestep"] = defaults["start_timestep"]
    if can_guide and not says_guidance(given):
        filled |= {name: defaults[name] for name in OF_GUIDANCE if name in defaults and given.get(name) is None}
    return filled
