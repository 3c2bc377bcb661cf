"""The kind of network that a scheduler's config was made for, whichever class of diffusers wrote it.

A network of ours was trained on a Gaussian variance-preserving path: on betas. Of the classes of diffusers, those that
take `beta_schedule` have such a path, and their configs can be read here; the others need a network of another kind.
diffusers leaves out of a config what its class was left to by default, so that the class that reads it puts its own
defaults there. For what belongs to the network, that would be another network.
"""

import inspect
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from diffusers_ext.diffusion.betas import make_betas
from diffusers_ext.diffusion.noising import check_betas


# What the model was trained on, whatever samples it.
PATH_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")

# The paths that a config of ours can name in `path`; "vp" is that of the betas.
SCHEDULER_PATHS = ("vp", "ve", "subvp", "cosine")

# What belongs to the model: all of its path, what it outputs, and the range of its data.
MODEL_KEYS = (
    *PATH_KEYS,
    "trained_betas",
    "rescale_betas_zero_snr",
    "snr_shift_scale",
    "prediction_type",
    "clip_sample",
    "clip_sample_range",
)

# What diffusers means where a class has no such key.
MEANT_BY_ABSENCE = {"rescale_betas_zero_snr": False, "prediction_type": "epsilon"}

# The name of the prediction type "flow" in the configs of diffusers, whose schedulers know it on the linear path alone.
FLOW_PREDICTION = "flow_prediction"

FLOW_MODEL = "a flow-matching model"
VP_MODEL = "a model of a Gaussian path given by betas"

# The kind of model by a part of the scheduler's name. It stands in errors; what a scheduler samples is found by trying.
KINDS = (
    ("CMStochastic", "a consistency model"),
    ("ConsistencyDecoder", "a consistency decoder"),
    ("SCM", "a TrigFlow consistency model"),
    ("EDM", "a model with EDM's preconditioning"),
    ("CosineDPM", "a model with EDM's preconditioning"),
    ("KarrasVe", "a model of the variance-exploding path"),
    ("ScoreSdeVe", "a score model of the variance-exploding SDE"),
    ("ScoreSdeVp", "a score model of the continuous variance-preserving SDE"),
    ("IPNDM", "a model of a path of evenly spaced angles"),
    ("Wuerstchen", "a model of Wuerstchen's continuous cosine path"),
    ("Amused", "a model of discrete tokens"),
    ("VQDiffusion", "a model of discrete tokens"),
    ("BlockRefinement", "a model of discrete tokens"),
    ("DiscreteDDIM", "a model of discrete tokens"),
    ("EntropyBound", "a model of discrete tokens"),
    ("Flow", FLOW_MODEL),
    ("Helios", FLOW_MODEL),
    ("LTX", FLOW_MODEL),
    ("Piflow", FLOW_MODEL),
)


def kind_of_model(name: str, config: Mapping[str, Any]) -> str:
    """The kind of model that a scheduler of another path is for, in words."""
    if is_flow(config):
        return FLOW_MODEL
    return next((kind for part, kind in KINDS if part in name), f"a model that was trained on {name}'s own path")


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler of betas was set to a straight path instead.

    By diffusers' name "flow_prediction": "flow" is what a network outputs, on any path.
    """
    return bool(config.get("use_flow_sigmas")) or config.get("prediction_type") == FLOW_PREDICTION


def has_other_scale(config: Mapping[str, Any]) -> bool:
    """Whether a config is that of a network that sees x_t on a path that does not preserve the variance."""
    return config.get("path") in ("ve", "subvp") and not config.get("unit_scale_input")


def has_betas(cls: type) -> bool:
    """Whether a scheduler class has the Gaussian path of a config's betas."""
    return "beta_schedule" in defaults_of(cls)


@cache
def defaults_of(cls: type) -> dict[str, Any]:
    """The config keys of a scheduler class and their defaults."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {each.name: each.default for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}


def read_model(config: Mapping[str, Any], cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The config of any scheduler with all that belongs to its model explicit, for `cls.from_config` to read.

    What a scheduler in memory was left to by default is in its config; what a file does not say is the default of the
    class that it names. Choices of sampling that were left to their default, such as `timestep_spacing`, stay so.

    Args:
        config: That of a scheduler in memory or from disk, or a dict of options.
        given: Options that go before those of the config.

    Raises:
        ValueError: if it is the config of a model of another path, with both classes and the kind of model.
    """
    _check_scale({**config, **given}, cls)
    maker = _named_class(config)
    in_memory = isinstance(config, FrozenDict) or "_use_default_values" in config
    config = dict(config)
    _check_path(config | given, cls, maker, in_memory)

    unset = config.get("_use_default_values", ())
    config["_use_default_values"] = [key for key in unset if key not in MODEL_KEYS]
    if maker is not None:
        defaults = defaults_of(maker)
        config = {key: defaults[key] for key in MODEL_KEYS if key in defaults} | config
        if "clip_sample" not in defaults and "clip_sample_range" not in config:
            config.setdefault("clip_sample", False)  # it clips nothing, and no class before it said how far
    if maker is not None or in_memory:
        config = MEANT_BY_ABSENCE | config
    config.setdefault("prediction_type", MEANT_BY_ABSENCE["prediction_type"])
    if config.get("variance_type", "") is None and defaults_of(cls).get("variance_type") is not None:
        del config["variance_type"]  # solvers without noise say so of a variance that is not learned

    changed = given.keys() & {*PATH_KEYS, "beta_reference_timesteps"}
    if changed and "trained_betas" not in given and _follow_from_name(config):
        # They stand for the schedule, for classes that do not know its name, and would hide what is asked of it.
        config["trained_betas"] = None

    shift = config.get("snr_shift_scale")
    if shift is not None and shift != 1:
        # Within the betas, and so for every class that reads them; the key itself is CogVideoX's alone.
        config |= {"trained_betas": shift_snr(_betas(config | given), shift).tolist(), "snr_shift_scale": 1.0}
    return config


def read_flow_model(config: Mapping[str, Any], cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a solver of the linear path, in the keys of diffusers' `FlowMatchEulerDiscreteScheduler`.

    Args:
        config, given: As for `read_model`.

    Raises:
        ValueError: if it is the config of a model of another path, with both classes and the kind of model.
    """
    maker = _named_class(config)
    config = dict(config)
    _check_flow(config, cls, maker)
    unset = set(config.get("_use_default_values", ()))
    # One number by two names. An option goes before the config, and there the name that the config's class reads.
    names = ("shift", "flow_shift")
    said = {key for key in names if given.get(key) is not None}
    said = said or {key for key in names if key in config and key not in unset}
    reads_flow_shift = maker is not None and "flow_shift" in defaults_of(maker) and "shift" not in defaults_of(maker)
    config.pop("shift" if "flow_shift" in said and ("shift" not in said or reads_flow_shift) else "flow_shift", None)
    if not str(config.get("use_flow_sigmas")) == "True":
        config.pop("use_flow_sigmas", None)
    # What solvers of another path understand by the word is not the spacing on this one; beside timesteps that were chosen
    # it is theirs, carried along.
    if maker is not None and not issubclass(maker, cls) and config.get("optimal_timesteps") is None:
        config.pop("timestep_spacing", None)
    return config


def _check_flow(config: Mapping[str, Any], cls: type, maker: type | None) -> None:
    """Refuses the config of a model of another path than the linear one."""
    if is_flow(config) or maker is None and "beta_schedule" not in config:
        return
    if maker is not None and not has_betas(maker) and kind_of_model(maker.__name__, config) == FLOW_MODEL:
        return
    name = config.get("_class_name", "a scheduler of betas")
    kind = VP_MODEL if maker is None or has_betas(maker) else kind_of_model(maker.__name__, config)
    raise ValueError(
        f"{cls.__name__} is for {FLOW_MODEL}, whose path is x_t = (1 - t) x_0 + t eps, and the config of {name} is that of "
        f"{kind}: sample it with {name}, or make {cls.__name__} by its class"
    )


def shift_snr(betas: Tensor, scale: float) -> Tensor:
    """Betas of the path whose signal-to-noise ratio is that of `betas` divided by `scale` (CogVideoX)."""
    alpha_bar = (-betas).log1p().cumsum(0).exp()
    alpha_bar = alpha_bar / (scale + (1 - scale) * alpha_bar)
    before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    return 1 - alpha_bar / before


def _betas(config: Mapping[str, Any]) -> Tensor:
    """The betas that a config says, before anything is done to them."""
    if config.get("trained_betas") is not None:
        return check_betas(np.asarray(config["trained_betas"], dtype=np.float64))
    options = {key: config[key] for key in ("beta_start", "beta_end") if key in config}
    options["reference_timesteps"] = config.get("beta_reference_timesteps")
    return make_betas(config.get("beta_schedule", "linear"), config.get("num_train_timesteps", 1000), **options)


def _follow_from_name(config: Mapping[str, Any]) -> bool:
    """Whether the betas of a config are those that the schedule it names makes of its other keys."""
    betas = config.get("trained_betas")
    if betas is None:
        return False
    try:
        named = _betas({**config, "trained_betas": None})
        betas = np.asarray(betas, dtype=np.float64)
    except (TypeError, ValueError):  # of what is wrong the class tells
        return False
    # Up to the rounding of another machine's exponentials.
    return betas.shape == named.shape and np.allclose(betas, named.numpy(), rtol=1e-9, atol=0)


def _named_class(config: Mapping[str, Any]) -> type | None:
    """The scheduler class that a config names, if this package or diffusers has it."""
    name = config.get("_class_name")
    ours = sys.modules[__name__.partition(".")[0]]  # whatever the package is called where its code runs
    cls = getattr(ours, name, getattr(diffusers, name, None)) if isinstance(name, str) else None
    # What needs a library that is not installed is a placeholder there, which says nothing of its keys.
    return cls if isinstance(cls, type) and issubclass(cls, SchedulerMixin) else None


def _check_path(config: Mapping[str, Any], cls: type, maker: type | None, in_memory: bool) -> None:
    """Refuses the config of a model whose path is not given by betas."""
    owners = [maker]
    if maker is not None:
        other = not has_betas(maker)
    elif in_memory:
        other = "beta_schedule" not in config
    else:
        strange = any(not key.startswith("_") and key not in defaults_of(cls) for key in config)
        owners = _classes_with_keys(config) if strange and "beta_schedule" not in config else []
        other = bool(owners) and not any(map(has_betas, owners))
    if not other and not is_flow(config):
        return
    if maker is None:
        owners = [owner for owner in _classes_with_keys(config) if has_betas(owner) != other]
    name = owners[0].__name__ if owners else config.get("_class_name", "another class")
    raise ValueError(
        f"{cls.__name__} is for models of a Gaussian path given by betas, and the config of {name} is that of "
        f"{kind_of_model(name, config)}: sample it with {name}, or make {cls.__name__} by its class, with the path that "
        "the model was trained on"
    )


def _check_scale(config: Mapping[str, Any], cls: type) -> None:
    """Refuses the config of a network that sees x_t on another scale than that of a variance-preserving path."""
    if has_other_scale(config) and "path" not in defaults_of(cls):
        raise ValueError(
            f"{cls.__name__} is for models that see x_t at unit scale, and the config is that of a model of the path "
            f"{config['path']!r} that sees x_t itself: sample it with ScoreSDEScheduler or AnnealedLangevinScheduler, or, "
            "if it was trained on x_t / sqrt(alpha^2 + sigma^2), make one of these with unit_scale_input=True and take "
            "its config"
        )


def _classes_with_keys(config: Mapping[str, Any]) -> list[type]:
    """The schedulers of diffusers that know all keys of a config, those with the fewest others first."""
    keys = {key for key in config if not key.startswith("_")}
    classes = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")]
    classes = [cls for cls in classes if isinstance(cls, type) and issubclass(cls, SchedulerMixin)]
    return sorted((cls for cls in classes if keys <= defaults_of(cls).keys()), key=lambda cls: len(defaults_of(cls)))
